"""What crioctl prints, and how it finds what is meant."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import parse, run, show
from crio_native.cli.ctl.find import Container, Node, Pod
from crio_native.errors import InvalidArgument, NotFound


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 50, "2048.0 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (60, "1m"), (61, "1m 1s"), (3 * 3600 + 61, "3h 1m"), (90000, "1d 1h")]
)
def test_age(seconds: int, text: str) -> None:
    now = 2 * 10**18
    assert show.age(now - seconds * 10**9, now) == text


def test_age_of_what_has_not_been_or_is_to_come() -> None:
    assert show.age(0) == "-"
    assert show.age(10, now=5) == "0s"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_cell_stays_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    row = ["0123456789abc", "registry.example.com/a/long/name:1.2.3", "running"]
    show.print_table(["CONTAINER", "IMAGE", "STATE"], [row])
    title, line = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert (title.split(), line.split()) == (["CONTAINER", "IMAGE", "STATE"], row)


def pod(id_: str, name: str, namespace: str = "default") -> Pod:
    return Pod(api.PodSandbox(id=id_, metadata=api.PodSandboxMetadata(name=name, namespace=namespace)))


def container(id_: str, name: str, inside: Pod) -> Container:
    return Container(api.Container(id=id_, pod_sandbox_id=inside.id, metadata=api.ContainerMetadata(name=name)), inside)


WEB, MINE = pod("aa11", "web"), pod("ab22", "mine", "crioctl")
APP, PROXY, MINE_TOO = container("c1", "app", WEB), container("c2", "proxy", WEB), container("d1", "mine", MINE)
ODD = container("e1", "aa11", MINE)
NODE = Node([WEB, MINE], [APP, PROXY, MINE_TOO])


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("aa11", WEB),
        ("aa", WEB),
        ("web", WEB),
        ("default/web", WEB),
        ("c1", APP),
        ("web/app", APP),
        ("mine", MINE),
        ("d", MINE),
    ],
)
def test_target(reference: str, found: Pod | Container) -> None:
    assert NODE.target(reference) is found


def test_an_id_beats_a_name_and_a_name_beats_a_beginning() -> None:
    node = Node([WEB], [ODD])
    assert node.target("aa11") is WEB
    named_like_a_beginning = container("f1", "c", WEB)
    assert Node([WEB], [APP, named_like_a_beginning]).target("c") is named_like_a_beginning


def test_a_pod_stands_for_its_only_container() -> None:
    assert NODE.container("ab22") is MINE_TOO
    with pytest.raises(InvalidArgument, match=r"ambiguous.*web/app.*web/proxy"):
        NODE.container("web")


def test_nothing_and_too_much() -> None:
    for reference in ("", "nothing"):
        with pytest.raises(NotFound):
            NODE.target(reference)
    with pytest.raises(InvalidArgument, match="ambiguous"):
        NODE.target("a")


@pytest.mark.parametrize(
    "image", ["busybox", "registry:5000/a/busybox:1.2", "busybox@sha256:00", "docker.io/x/Busy_Box"]
)
def test_default_name_comes_from_the_image_and_is_a_name(image: str) -> None:
    name = run.default_name(image)
    assert name.startswith("busy") and parse.name(name) == name
    assert run.default_name(image) != name


@given(st.text())
def test_default_name_is_a_name_whatever_the_image(image: str) -> None:
    parse.name(run.default_name(image))
