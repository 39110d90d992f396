"""CNI's words: results and errors of all versions, recorded attachments, and what a pod asks its plugins for."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import CrioError, InvalidArgument, ResourceExhausted, StepFailed, Unavailable
from crio_native.network.cni import results
from crio_native.network.cni.attachment import Attachments, CniAttachment, Subject
from crio_native.network.cni.protocol import PluginFailed, emit, failure, parse_result
from crio_native.network.conflist import NetworkList
from crio_native.network.model import PortMapping
from crio_native.network.process import Ended
from crio_native.pods import networking
from crio_native.pods.values import PodConfig

MODERN = {
    "cniVersion": "1.1.0",
    "interfaces": [
        {"name": "cni0"},
        {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x", "mtu": 1400},
    ],
    "ips": [
        {"address": "10.1.0.2/16", "gateway": "10.1.0.1", "interface": 1},
        {"address": "fd01::2/64", "interface": 1},
    ],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1", "mtu": 1300}, {"dst": "::/0"}],
    "dns": {"nameservers": ["10.1.0.10"]},
}
OLDEST = {
    "cniVersion": "0.2.0",
    "ip4": {"ip": "10.1.0.2/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]},
    "ip6": {"ip": "fd01::2/64", "routes": [{"dst": "::/0"}]},
    "dns": {"nameservers": ["10.1.0.10"]},
}


def parsed(data: Any) -> dict[str, Any]:
    return parse_result("cni ADD plugins[0]", "own", json.dumps(data).encode())


def attachment() -> CniAttachment:
    plugins = [{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.0.0/16"}}, {"type": "own", "key": [1]}]
    network = NetworkList.parse({"name": "my-net", "cniVersion": "1.0.0", "plugins": plugins}, "x", lambda kind: True)
    subject = Subject("sandbox", "/run/netns/x", "eth0", (("IgnoreUnknown", "1"), ("K8S_POD_NAME", "web")), {"dns": {}})
    return CniAttachment.begin(network, "1.0.0", subject)


# Results.


@pytest.mark.parametrize(
    ("version", "family"),
    [("0.3.0", "4"), ("0.3.1", "4"), ("0.4.0", "4"), ("1.0.0", None), ("1.1.0", None)],
)
def test_a_result_in_each_version(version: str, family: str | None) -> None:
    written = emit(parsed(MODERN), version)
    assert written["cniVersion"] == version and written["ips"][0].get("version") == family
    again = parsed(written)
    assert {**again, "cniVersion": "1.1.0"} == MODERN


def test_the_oldest_results() -> None:
    result = parsed(OLDEST)
    assert [item["address"] for item in result["ips"]] == ["10.1.0.2/16", "fd01::2/64"]
    assert emit(result, "0.2.0") == OLDEST
    with_version = {**MODERN, "ips": [{**item, "version": "4"} for item in MODERN["ips"][:1]]}  # type: ignore[index]
    assert "version" not in parsed(with_version)["ips"][0]


def test_what_a_pod_has_of_a_result() -> None:
    ports = (PortMapping(8080, 80),)
    found = results.merge(results.expected("net", ports), parsed(MODERN), attachment())
    assert found.addresses == ("10.1.0.2/16", "fd01::2/64") and found.gateways == ("10.1.0.1", "")
    assert (found.mac, found.host_interface, found.port_mappings) == ("02:00:00:00:00:01", "cni0", ports)
    assert (found.table, found.bridge) == ("crio_cni_net", "")
    outside = copy.deepcopy(MODERN)
    outside["ips"][0]["interface"] = 0  # type: ignore[index]
    found = results.merge(results.expected("net", ()), parsed(outside), attachment())
    assert found.addresses == ("fd01::2/64",), "an address of the node's link is not the pod's"


def test_a_link_whose_name_is_a_path_is_left_alone() -> None:
    names = ["../../kernel", "..", "all", "a b", "x" * 16, "veth0", "", "default"]
    assert results.host_links({"interfaces": [{"name": name} for name in names]}) == ["veth0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ips": "10.1.0.2"}, "ips: must be a list"),
        ({"ips": [{}]}, r"ips\[0\]: 'address'"),
        ({"ips": [{"address": "10.1.0.2/16", "gateway": "x"}]}, r"ips\[0\]: 'x' does not appear to be"),
        ({"ips": [{"address": "10.1.0.2/16", "interface": -1}]}, r"ips\[0\]\.interface: -1 is no index"),
        ({"interfaces": [{"name": 7}]}, r"interfaces\[0\]\.name: 7 is no text"),
        ({"routes": [{"dst": "everywhere"}]}, r"routes\[0\]: 'everywhere'"),
        ({"routes": [{}] * 1025}, "routes: must be a list of at most 1024"),
    ],
)
def test_a_wrong_result_is_named_by_its_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginFailed, match=words):
        parsed({**MODERN, **change})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["10.1.0.2/16", "::/0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "ips ip4 ip6 ip address gateway interface interfaces name sandbox routes dst gw dns".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_is_a_result_or_an_error_of_ours(data: Any) -> None:
    try:
        result = parsed(data)
        for version in ("0.2.0", "0.3.1", "1.1.0"):
            json.dumps(emit(result, version))
        results.merge(results.expected("net", ()), result, attachment())
    except PluginFailed as error:
        assert error.step.startswith("cni ADD plugins[")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_result_or_an_error_of_ours(data: bytes) -> None:
    with contextlib.suppress(PluginFailed):
        assert parse_result("cni ADD plugins[0]", "own", data) == parsed(json.loads(data))  # `{}`, say
    assert isinstance(failure("cni DEL plugins[0]", "own", Ended(1, data, data)), PluginFailed)


# Errors.


def test_an_errors_words_reach_the_caller() -> None:
    told = json.dumps({"cniVersion": "1.0.0", "code": 100, "msg": "no\nroute", "details": "to \x1b[31mhost"}).encode()
    error = failure("cni ADD plugins[2]", "own", Ended(1, told, b"ignored"))
    assert str(error) == "step 'cni ADD plugins[2]' failed on own: code 100: no route: to ?[31mhost"
    assert (error.code, error.message, isinstance(error, StepFailed)) == (100, "no route", True)
    assert isinstance(failure("x", "own", Ended(1, b'{"code": 11}', b"")), Unavailable)
    long = failure("x", "own", Ended(-9, b"", b"x" * 100_000))
    assert "was ended by signal 9" in str(long) and len(str(long)) < 1000


# Records.


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = attachment()
    assert [program.kind for program in written.programs] == ["own"], "the bridge is built in"
    files = Attachments(tmp_path / "results")
    files.put(written)
    assert Attachments(tmp_path / "results").get("sandbox") == written
    files.remove(written)
    assert list((tmp_path / "results").iterdir()) == [] and Attachments(tmp_path / "results").all() == {}


def test_a_record_that_libcni_wrote(tmp_path: Path) -> None:
    """Without our own keys: every plugin of the list was a program then."""
    document = json.loads(attachment().to_json())
    del document["programs"], document["cniVersion"]
    (tmp_path / "my-net-sandbox-eth0").write_text(json.dumps(document))
    found = Attachments(tmp_path).get("sandbox")
    assert found is not None and [program.kind for program in found.programs] == ["bridge", "own"]
    assert found.version == "1.0.0"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes the place of the file's descriptor: the kernel's own ENOSPC."""
    real = os.open
    monkeypatch.setattr(
        "crio_native.network.cni.attachment.os.open", lambda path, *rest: real("/dev/full", os.O_WRONLY)
    )
    with pytest.raises(ResourceExhausted, match="my-net-sandbox-eth0: No space left on device; free space"):
        Attachments(tmp_path).put(attachment())
    assert list(tmp_path.iterdir()) == []


@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_set_aside(data: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        CniAttachment.from_json(data)


# What a pod's configuration asks for.


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10M", 10**7), ("1.5G", 1_500_000_000), ("512Ki", 524_288), ("2e6", 2_000_000), ("1000", 1000), ("1P", 10**15),
     ("2000000m", 2000)],
)  # fmt: skip
def test_bandwidth_in_kubernetes_notation(text: str, rate: int) -> None:
    asked = networking.capabilities(PodConfig(annotations={"kubernetes.io/ingress-bandwidth": text}))["bandwidth"]
    assert asked == {"ingressRate": rate, "ingressBurst": (2**31 - 1) * 8}


@given(st.text(max_size=12))
def test_any_bandwidth_is_a_number_or_refused(text: str) -> None:
    try:
        networking.capabilities(PodConfig(annotations={"kubernetes.io/egress-bandwidth": text}))
    except InvalidArgument as error:
        assert error.field == "config.annotations[kubernetes.io/egress-bandwidth]"


@given(json_values)
def test_any_list_with_programs_is_one_or_an_error_of_ours(plugin: Any) -> None:
    try:
        NetworkList.parse(
            {"name": "x", "plugins": [plugin, {"type": "own", "capabilities": plugin}]}, "x", lambda kind: True
        )
    except CrioError as error:
        assert str(error).startswith("x: ")
