"""Option values of crioctl: what is accepted, what it means, and that nothing else gets through."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import parse

SLAVE, SHARED = api.PROPAGATION_HOST_TO_CONTAINER, api.PROPAGATION_BIDIRECTIONAL


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("64m", 64 << 20),
        ("64M", 64 << 20),
        ("64Mi", 64 << 20),
        ("64MiB", 64 << 20),
        ("1.5g", 3 << 29),
        ("10kb", 10240),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse.size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "m", "1x", "1 2", "1e9", "0.1", "8388608t", "9223372036854775808", "٣m"]
)
def test_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="want"):
        parse.size(text)


@given(st.integers(1, 2**40 - 1), st.sampled_from("bkm"))
def test_size_is_exact_for_whole_numbers(number: int, unit: str) -> None:
    assert parse.size(f"{number}{unit}") == number * {"b": 1, "k": 1024, "m": 1024**2}[unit]


@pytest.mark.parametrize(("text", "quota"), [("0.5", 50_000), ("2", 200_000), (".01", 1_000), ("1.", 100_000)])
def test_cpus(text: str, quota: int) -> None:
    assert parse.cpus(text) == quota


@pytest.mark.parametrize("text", ["", ".", "0", "0.001", "-1", "1e3", "inf", "nan", "100001", "half"])
def test_cpus_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="want"):
        parse.cpus(text)


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/a:/b", api.Mount(host_path="/a", container_path="/b")),
        ("/a:/b:rw", api.Mount(host_path="/a", container_path="/b")),
        ("/a:/b:ro", api.Mount(host_path="/a", container_path="/b", readonly=True)),
        ("/a:/b:rro", api.Mount(host_path="/a", container_path="/b", readonly=True, recursive_read_only=True)),
        ("/a:/b:ro,rslave", api.Mount(host_path="/a", container_path="/b", readonly=True, propagation=SLAVE)),
        ("/a:/b:rshared,z", api.Mount(host_path="/a", container_path="/b", propagation=SHARED, selinux_relabel=True)),
    ],
)
def test_volume(text: str, mount: api.Mount) -> None:
    assert parse.volume(text) == mount


@pytest.mark.parametrize(
    "text", ["", "/a", "/a:", ":/b", "a:/b", "/a:b", "/a:/b:odd", "/a:/b:ro:rw", "/a:/b:rro,rslave", "/a\0:/b"]
)
def test_volume_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"want|must|is not|cannot"):
        parse.volume(text)


paths = st.text(st.characters(blacklist_characters=":\0", blacklist_categories=["Cs"])).map(lambda text: f"/{text}")


@given(paths, paths, st.booleans())
def test_volume_keeps_paths_as_they_are(host: str, container: str, readonly: bool) -> None:
    mount = parse.volume(f"{host}:{container}" + (":ro" if readonly else ""))
    assert (mount.host_path, mount.container_path, mount.readonly) == (host, container, readonly)


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("8080:80", api.PortMapping(host_port=8080, container_port=80)),
        ("53:53/udp", api.PortMapping(host_port=53, container_port=53, protocol=api.UDP)),
        ("127.0.0.1:1:2/sctp", api.PortMapping(host_port=1, container_port=2, host_ip="127.0.0.1", protocol=api.SCTP)),
        ("[::1]:1:2", api.PortMapping(host_port=1, container_port=2, host_ip="::1")),
    ],
)
def test_publish(text: str, mapping: api.PortMapping) -> None:
    assert parse.publish(text) == mapping


@pytest.mark.parametrize(
    "text",
    ["", "80", "0:80", "80:65536", "80:80/icmp", "host:1:2", "::1:1:2", "[1::1:2", "1.2.3:1:2", "80:80/", "-1:80"],
)
def test_publish_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"want|not"):
        parse.publish(text)


def test_variable_takes_the_callers_own_value() -> None:
    assert parse.variable("A=b=c") == api.KeyValue(key="A", value=b"b=c")
    assert parse.variable("A=") == api.KeyValue(key="A", value=b"")
    assert parse.variable("A", {b"A": b"\xff"}) == api.KeyValue(key="A", value=b"\xff")
    for text in ("", "=x", "MISSING"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse.variable(text, {})


def test_user() -> None:
    both = parse.user("1000:5")
    assert (both.run_as_user.value, both.run_as_group.value, both.run_as_username) == (1000, 5, "")
    root = parse.user("0")
    assert root.HasField("run_as_user") and not root.HasField("run_as_group")
    named = parse.user("web:5")
    assert (named.run_as_username, named.run_as_group.value, named.HasField("run_as_user")) == ("web", 5, False)


@pytest.mark.parametrize("text", ["", ":5", "a:b", "1:", "4294967295", "9" * 5000, "1:4294967295", "1:2:3"])
def test_user_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"want|at most"):
        parse.user(text)


def test_seccomp() -> None:
    assert parse.seccomp("unconfined").profile_type == api.SecurityProfile.Unconfined
    assert parse.seccomp("localhost//etc/p.json").localhost_ref == "/etc/p.json"
    for text in ("", "localhost/p.json", "localhost/", "default"):
        with pytest.raises(ValueError, match="want"):
            parse.seccomp(text)


@given(st.integers(0, 4_000_000_000), st.integers(0, 10**9 - 1), st.integers(-14 * 60, 14 * 60))
def test_timestamp_reads_every_rfc3339_time_to_the_nanosecond(seconds: int, nanos: int, offset: int) -> None:
    local = datetime.fromtimestamp(seconds + offset * 60, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    zone = f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02}:{abs(offset) % 60:02}"
    assert parse.timestamp(f"{local}.{nanos:09}{zone}") == seconds * 10**9 + nanos
    short = f".{nanos:09}".rstrip("0").rstrip(".")
    utc = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert parse.timestamp(f"{utc}{short}Z") == seconds * 10**9 + nanos


@pytest.mark.parametrize("text", ["", "2026", "2026-02-31T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01T25:00:00Z"])
def test_timestamp_is_none_for_anything_else(text: str) -> None:
    assert parse.timestamp(text) is None


def test_since_takes_durations_and_times() -> None:
    assert abs(parse.since("1h30m") - (time.time_ns() - 5400 * 10**9)) < 10**10
    assert parse.since("1970-01-01T00:00:01Z") == 10**9
    with pytest.raises(ValueError, match="want"):
        parse.since("yesterday")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5h", 5400), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172800)]
)
def test_duration(text: str, seconds: float) -> None:
    assert parse.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1w", "-5m", "1h 30m", "9" * 50, "1s" * 50])
def test_duration_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="want"):
        parse.duration(text)


@pytest.mark.parametrize("text", ["..", "a/b", "-a", "", "a" * 64, "ä", "a\n"])
def test_name_refuses_what_could_leave_a_directory(text: str) -> None:
    with pytest.raises(ValueError, match="want"):
        parse.name(text)


@pytest.mark.parametrize(
    "function",
    [parse.size, parse.cpus, parse.volume, parse.publish, parse.pair, parse.variable, parse.user, parse.seccomp,
     parse.capability, parse.name, parse.duration, parse.since],
)  # fmt: skip
@given(text=st.text(max_size=40) | st.from_regex(r"[0-9a-z/:.=,\[\]-]{0,40}", fullmatch=True))
def test_any_text_is_read_or_refused_with_a_value_error(function: Callable[[str], object], text: str) -> None:
    try:
        function(text)
    except ValueError as error:
        assert not isinstance(error, UnicodeError), "refused by accident"
