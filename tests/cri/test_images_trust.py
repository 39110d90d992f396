"""The trust policy by the CRI: what a kubelet hears of an image that is refused, at the pull and at the container."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon

from ..images_support import BASE, HostileRegistry, picture, reply
from ..images_support import hostile as hostile
from ..trust_support import ACCEPT, REJECT, Gpg, payload
from .conftest import Client, close, refused

pytestmark = pytest.mark.root

SETTINGS = """\
[crio.image]
signature_policy = "{directory}/policy.json"
signature_policy_dir = "{directory}/policies"
"""
# What the kubelet looks for (k8s.io/cri-api, pkg/errors): this prefix, of a message without a code that says more.
PREFIX, CODE = "SignatureValidationFailed: ", grpc.StatusCode.UNKNOWN


@pytest.fixture
def cri() -> Iterator[Client]:
    daemon = ScratchDaemon(settings=SETTINGS)
    try:
        (daemon.directory / "policies").mkdir()
        policy(daemon, "policy.json", ACCEPT)
        daemon.start()
        client = Client(daemon)
        client.load_image()
    except BaseException:
        daemon.close()
        raise
    yield client
    close(client)


def policy(daemon: ScratchDaemon, name: str, *rules: Any, scope: str = "") -> str:
    document = {"default": [REJECT] if scope else rules, "transports": {"docker": {scope: rules}} if scope else {}}
    (daemon.directory / name).write_text(json.dumps(document))
    return str(daemon.directory / name)


def pull(cri: Client, name: str, namespace: str = "") -> str:
    sandbox = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(namespace=namespace))
    return str(cri.call("PullImage", image=pb.ImageSpec(image=name), sandbox_config=sandbox).image_ref)


def test_a_refused_pull_says_which_rule_refused_it(cri: Client, hostile: HostileRegistry) -> None:
    name = hostile.serve("app", picture(BASE))
    own = policy(cri.daemon, "policies/tenant.json", REJECT, scope=hostile.address)
    with refused(CODE, f'{own}: transports.docker["{hostile.address}"][0] (reject): it rejects every image'):
        pull(cri, name, "tenant")
    with pytest.raises(grpc.RpcError) as caught:
        pull(cri, name, "tenant")
    assert caught.value.details().startswith(PREFIX)
    assert not hostile.requests and not cri.call("ImageStatus", image=pb.ImageSpec(image=name)).HasField("image")
    pull(cri, name, "other")


def test_a_container_is_only_made_of_what_its_namespace_trusts(
    cri: Client, hostile: HostileRegistry, tmp_path: Path
) -> None:
    """Another tenant has pulled the image already, which the kubelet then does not pull again."""
    image = picture(BASE)
    name, digest = hostile.serve("app", image, "v1"), image.manifest["digest"]
    id_ = pull(cri, name, "other")
    gpg = Gpg(tmp_path / "home")
    try:
        gpg.key("dev@example.com")
        key = tmp_path / "key.gpg"
        key.write_bytes(gpg.public("dev@example.com"))
        signature = gpg.sign("dev@example.com", payload(digest, name))
    finally:
        gpg.close()
    rule = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}
    policy(cri.daemon, "policies/default.json", rule, scope=f"{hostile.address}/app")
    pod = cri.pod()
    spec = pb.ImageSpec(image=id_, user_specified_image=name)
    config = cri.container_config("/bin/sh")
    config.image.CopyFrom(spec)
    with refused(CODE, PREFIX, f'["{hostile.address}/app"][0] (signedBy): a signature'):
        cri.create(pod, config=config)
    mount = pb.Mount(container_path="/volume", image=spec, readonly=True)
    with refused(CODE, PREFIX, "(reject)"):  # the container's own image is in no scope of this policy
        cri.create(pod, "true", mounts=[mount])
    hostile.routes["/v2/"] = reply(200, b"", {"X-Registry-Supports-Signatures": "1"})
    listed = {"signatures": [{"schemaVersion": 2, "type": "atomic", "content": base64.b64encode(signature).decode()}]}
    hostile.routes[f"/extensions/v2/app/signatures/{digest}"] = reply(200, json.dumps(listed).encode())
    assert cri.create(pod, config=config)
    assert [container.image_ref for container in cri.containers()]


def test_a_policy_that_is_wrong_is_named(cri: Client, hostile: HostileRegistry) -> None:
    name = hostile.serve("app", picture(BASE))
    own = policy(cri.daemon, "policies/tenant.json", {"type": "trustMe"})
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{own}: default[0].type: not one of"):
        pull(cri, name, "tenant")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "sandbox_config.metadata.namespace"):
        pull(cri, name, "../policy")
    (cri.daemon.directory / "policy.json").unlink()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "trust policy", "cannot be read: no such file"):
        pull(cri, name, "other")
