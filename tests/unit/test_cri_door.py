"""The door: protobuf in, values out and back; names, signals, status codes, joining of repeated calls."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.jobs import Jobs
from crio_native.cri.listing import framed
from crio_native.cri.messages import _signal
from crio_native.cri.status_codes import status_code
from crio_native.cri.translate import from_message, to_message
from crio_native.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    StepFailed,
    Unimplemented,
)
from crio_native.pods import names, signals
from crio_native.pods.values import ContainerConfig, PodConfig, PodMetadata, from_json, to_json


def full_container() -> Any:
    linux = pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(
            cpu_shares=3, hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=5)], unified={"a.b": "c"}
        ),
        security_context=pb.LinuxContainerSecurityContext(
            run_as_user=pb.Int64Value(value=0),
            capabilities=pb.Capability(add_capabilities=["X"]),
            namespace_options=pb.NamespaceOption(pid=pb.TARGET, target_id="t"),
            seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="/x"),
            supplemental_groups=[1, 2],
            supplemental_groups_policy=pb.Strict,
        ),
    )
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="c", attempt=2),
        image=pb.ImageSpec(image="i", annotations={"k": "v"}),
        envs=[pb.KeyValue(key="K", value=b"\xff\xfe")],
        mounts=[pb.Mount(container_path="/a", host_path="/b", propagation=pb.PROPAGATION_BIDIRECTIONAL)],
        labels={"l": "1"},
        stop_signal=pb.SIGNAL_SIGUSR2,
        tty=True,
        linux=linux,
    )


def test_there_and_back() -> None:
    message = full_container()
    value = from_message(ContainerConfig, message, "config")
    assert value.linux.security_context.run_as_user == 0 and value.linux.security_context.run_as_group is None
    assert value.envs[0].value.encode(errors="surrogateescape") == b"\xff\xfe"
    assert value.stop_signal == "SIGNAL_SIGUSR2"
    assert to_message(pb.ContainerConfig(), value) == message
    import json

    assert from_json(ContainerConfig, json.loads(json.dumps(to_json(value)))) == value


def test_an_empty_message_is_all_defaults() -> None:
    assert from_message(PodConfig, pb.PodSandboxConfig()) == PodConfig()
    assert from_message(ContainerConfig, pb.ContainerConfig()) == ContainerConfig()


def test_a_field_that_is_not_understood_is_refused() -> None:
    message = full_container()
    message.windows.SetInParent()
    with pytest.raises(Unimplemented, match=r"config\.windows"):
        from_message(ContainerConfig, message, "config")
    with pytest.raises(Unimplemented, match=r"config\.windows"):
        from_message(PodConfig, pb.PodSandboxConfig(windows=pb.WindowsPodSandboxConfig()), "config")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.command.append("a\0b"), r"config\.command\[0\]"),
        (lambda m: m.labels.update({"k": "a\0"}), r"config\.labels"),
        (lambda m: m.command.extend(["x"] * 20000), r"config\.command"),
        (lambda m: m.args.append("x" * (2 << 20)), r"config\.args\[0\]"),
        (lambda m: setattr(m, "stop_signal", 999), r"config\.stop_signal"),
        (lambda m: setattr(m.mounts.add(), "propagation", 17), r"config\.mounts\[1\]\.propagation"),
    ],
)
def test_bounds(change: Callable[[Any], Any], where: str) -> None:
    message = full_container()
    change(message)
    with pytest.raises(InvalidArgument, match=where):
        from_message(ContainerConfig, message, "config")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_refusal(data: bytes) -> None:
    message = pb.ContainerConfig()
    try:
        message.ParseFromString(data)
    except Exception:  # protobuf's own refusal
        return
    try:
        from_message(ContainerConfig, message, "config")
    except (InvalidArgument, Unimplemented):
        pass


@given(st.text(), st.text(), st.text(), st.integers(0, 2**32 - 1))
def test_pod_names(name: str, uid: str, namespace: str, attempt: int) -> None:
    try:
        result = names.pod_name(PodMetadata(name, uid, namespace, attempt))
    except InvalidArgument as error:
        assert error.field.startswith("config.metadata.")
        return
    assert result.isascii() and "/" not in result and not any(c.isspace() for c in result) and len(result) < 900


def test_ids() -> None:
    assert names.is_id(names.new_id()) and names.new_id() != names.new_id()
    assert not names.is_id("../" + "a" * 61) and not names.is_id("a" * 64 + "\n")


@pytest.mark.parametrize(
    ("cri", "image", "number"),
    [
        ("", "", 15),
        ("", "SIGQUIT", 3),
        ("", "9", 9),
        ("", "usr1", 10),
        ("", "SIGRTMIN+3", 37),
        ("", "SIGRTMAX-1", 63),
        ("SIGNAL_SIGHUP", "SIGQUIT", 1),
        ("SIGNAL_SIGRTMINPLUS15", "", 49),
        ("SIGNAL_SIGRTMAXMINUS14", "", 50),
        ("SIGNAL_SIGRTMAX", "", 64),
    ],
)
def test_stop_signals(cri: str, image: str, number: int) -> None:
    assert signals.stop_signal(cri, image) == number
    if cri:
        assert _signal(number) == pb.Signal.Value(cri)


@pytest.mark.parametrize("text", ["SIGNOPE", "0", "65", "-9", "SIGRTMIN+99", "\uff19", "_IGN", "SIG_DFL", "S" * 999])
def test_no_signals(text: str) -> None:
    with pytest.raises(InvalidArgument):
        signals.stop_signal("", text)


def test_every_signal_of_the_cri_is_known() -> None:
    for name in pb.Signal.keys()[1:]:
        assert 1 <= signals.stop_signal(name, "") <= 64


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("f", 1, "r"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("pod", "x"), grpc.StatusCode.NOT_FOUND),
        (AlreadyExists("x"), grpc.StatusCode.ALREADY_EXISTS),
        (StepFailed("mount", errno.EPERM), grpc.StatusCode.INTERNAL),
        (StepFailed("exec", errno.ESRCH, "", "the container has ended"), grpc.StatusCode.FAILED_PRECONDITION),
        (StepFailed("write", errno.ENOSPC), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (OSError(errno.ENOSPC, "x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ZeroDivisionError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_status_codes(error: Exception, code: grpc.StatusCode) -> None:
    assert status_code(error) is code


@given(st.lists(st.text(max_size=300), max_size=5))
def test_entries_joined_are_a_list(ids: list[str]) -> None:
    ids = [text.encode("utf-8", "replace").decode() for text in ids]
    data = b"".join(framed(pb.Container(id=text)) for text in ids)
    assert [c.id for c in pb.ListContainersResponse.FromString(data).containers] == ids


def test_repeated_calls_join() -> None:
    async def scene() -> None:
        jobs, release, runs = Jobs(), threading.Event(), []

        def work(stage: Callable[[str], None]) -> int:
            runs.append(1)
            stage("holding the door")
            release.wait(5)
            return 42

        with ThreadPoolExecutor(2) as pool:
            with pytest.raises(DeadlineExceeded, match=r"making x is still holding the door after .* retry"):
                await jobs.run(pool, "x", "making x", work, seconds=0.2, subject=1)
            with pytest.raises(AlreadyExists, match="another configuration"):
                await jobs.run(pool, "x", "making x", work, seconds=1, subject=2)
            waiting = asyncio.ensure_future(jobs.run(pool, "x", "making x", work, seconds=5, subject=1))
            cancelled = asyncio.ensure_future(jobs.run(pool, "x", "making x", work, seconds=5, subject=1))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            release.set()
            assert await waiting == 42 and len(runs) == 1
            assert await jobs.run(pool, "x", "making x", work, seconds=None, subject=2) == 42
            await jobs.drain(1)

    asyncio.run(scene())


def test_a_failed_job_fails_for_all_who_wait_and_is_forgotten() -> None:
    async def scene() -> None:
        jobs = Jobs()

        def work(stage: Callable[[str], None]) -> int:
            raise NotFound("image", "x")

        with ThreadPoolExecutor(2) as pool:
            calls = [jobs.run(pool, "x", "making x", work, seconds=5) for _ in range(3)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, NotFound) for result in results)
            with pytest.raises(NotFound):
                await jobs.run(pool, "x", "making x", work, seconds=5)

    asyncio.run(scene())
