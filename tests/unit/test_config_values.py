"""The languages inside configuration strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.config import values
from crio_native.errors import InvalidArgument
from crio_native.images import references
from crio_native.linux import capabilities


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("", 0),
        ("0s", 0),
        ("30s", 30),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("2us", 2e-6),
        ("3µs", 3e-6),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert values.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["5", "5 s", "-5s", "5d", "s", "5s ", "1m30", "\u0665s", "1e3s", "721h", "9" * 30 + "s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="it is"):
        values.parse_duration(text)


@given(st.integers(0, values.DURATION_MAX * values.NANOSECOND))
def test_a_printed_duration_is_read_back_exactly(nanoseconds: int) -> None:
    seconds = nanoseconds / values.NANOSECOND
    assert values.parse_duration(values.format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12 MiB", 12 << 20),
        ("512KiB", 512 << 10),
        ("1g", 1 << 30),
        ("1.5k", 1536),
        ("7", 7),
        ("7b", 7),
        ("2PB", 2 << 50),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1 M B", "MiB", "1x", "1e3", "8192PiB", "1" * 20])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="it is"):
        values.parse_size(text)


@given(st.integers(0, values.SIZE_MAX))
def test_a_printed_size_is_read_back_exactly(size: int) -> None:
    assert values.parse_size(values.format_size(size)) == size


@pytest.mark.parametrize(
    "text",
    [
        "net.ipv4.ip_forward=1+kernel.core_pattern=|/evil",  # CVE-2022-0811: a second setting smuggled in the first
        "net.ipv4.ip_forward=1\nkernel.core_pattern=|/evil",
        "net.ipv4.ip_forward = 1",
        "net.ipv4.ip_forward=",
        "net.ipv4.ip_forward",
        "net.ipv4.ip_forward=|/bin/sh",
        "net/../kernel/core_pattern=x",
        "net.ipv4/../../kernel.core_pattern=x",
        "kernel.core_pattern=x",
        "kernel.shm_rmid_forced/../core_pattern=1",
        "kernel.semx=1",
        "fs.file-max=1",
        "net=1",
        "=1",
        "nét.ipv4.x=1",
    ],
)
def test_what_is_no_sysctl_of_a_pod(text: str) -> None:
    with pytest.raises(ValueError):
        values.parse_sysctl(text)


@pytest.mark.parametrize(
    "key", ["kernel.sem", "kernel.shmmax", "kernel.shm_rmid_forced", "kernel.msgmax", "fs.mqueue.msg_max"]
)
def test_sysctls_of_the_ipc_namespace(key: str) -> None:
    assert values.parse_sysctl(f"{key}=1") == (key, "1")


@pytest.mark.parametrize(
    "text",
    ["nofile", "nofile=", "files=1", "nofile=2:1", "nofile=-1:5", "nofile=-2", "nofile=1:2:3", "nofile=9" + "9" * 19],
)
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match=r"limit|soft"):
        values.parse_ulimit(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/etc/shadow",
        "dev/x",
        "/dev",
        "/dev/",
        "/dev/../etc",
        "/dev/x:/etc/y",
        "/dev/x:",
        "/dev/x:rr",
        "/dev/x:q",
        "/dev/x:/dev/y:",
        "/dev/a:/dev/b:/dev/c",
        "/dev/x:rwm:rwm",
        "/dev/a b",
    ],
)
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(ValueError):
        values.parse_device(text)


@pytest.mark.parametrize(
    "text", ["0", "0:1", "0:1:0", "a:1:1", "0:4294967295:1", "4294967294:0:2", ":", "0:0:1,", " 0:0:1", "-1:0:1"]
)
def test_what_is_no_mapping(text: str) -> None:
    with pytest.raises(ValueError):
        values.parse_id_mappings(text)
    assert values.parse_id_mappings("0:4294967294:1") == ((0, 4294967294, 1),)


IMAGES = "pause localhost/a:b registry.k8s.io/pause:3.9 Registry.K8s.io/a/b__c-d.e [::1]:5000/x:y 127.0.0.1:5000/x"
NO_IMAGES = "Pause Pause:3 registry.k8s.io/Pause:3.9 a:b:c a@sha256:1 /a a/ a//b -a a..b a:-b http://a/b a_/b"


@pytest.mark.parametrize("text", [*IMAGES.split(), f"a@sha256:{'0' * 64}", f"r.io/a:b@sha512:{'f' * 128}"])
def test_an_image_is_what_the_images_room_takes(text: str) -> None:
    assert values.parse_image(text) == text
    references.parse(text)


@pytest.mark.parametrize("text", ["", "a b", "a\n", *NO_IMAGES.split(), "a-" * 2000])
def test_what_is_no_image(text: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        values.parse_image(text)
    with pytest.raises(InvalidArgument):
        references.parse(text)


@pytest.mark.parametrize("text", ["0-", "-1", "1,,2", "0-3,", "a", "3-1", "0 1", "1-2-3", "123456"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(ValueError):
        values.parse_cpuset(text)


@pytest.mark.parametrize(
    "text", ["/etc/localtime", "../x", "Europe/../x", "Europe/Berlin\n", "a/b/c/d/e", "Europe//Berlin"]
)
def test_what_is_no_time_zone(text: str) -> None:
    with pytest.raises(ValueError):
        values.parse_timezone(text)


def test_capabilities_are_the_kernels() -> None:
    assert tuple(capabilities.NAMES) == values.CAPABILITIES


@pytest.mark.parametrize(
    "parse",
    [
        values.parse_duration,
        values.parse_size,
        values.parse_sysctl,
        values.parse_ulimit,
        values.parse_device,
        values.parse_id_mappings,
        values.parse_capability,
        values.parse_environment,
        values.parse_cpuset,
        values.parse_path,
        values.parse_port,
        values.parse_regex,
        values.parse_timezone,
    ],
)
@given(text=st.text(max_size=40) | st.from_regex(r"[-0-9a-z:=,./ ]{0,20}"))
def test_any_text_is_read_or_refused_by_value_error(parse: Callable[[str], Any], text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert str(error)
