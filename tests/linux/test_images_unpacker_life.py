"""The unpacker's processes: one for each layer, borne by one for all, and none that stays."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crio_native.errors import Internal
from crio_native.images import unpacking
from crio_native.images.unpacking import unpack

from ..images_support import member, tar
from ..machine import reap_orphans
from ..waiting import wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


def children() -> set[int]:
    """Our child processes: other tests' fixtures have some."""
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def interrupted(target: Path, act: Callable[[int, int], None]) -> Iterator[bytes]:
    """An archive of which a part comes; once that is unpacked, what is done to the fork server and to the unpacker."""
    before = children()
    yield tar(member("x", data=b"1" * 2000))[:1024]
    wait_for(lambda: list(target.iterdir()))
    (server,) = children() - before
    (pid,) = children_of(server)
    act(server, pid)


def ends_of(pid: int) -> set[str] | None:
    """The pipe that it reads and the socket of its report, once it has closed all that it was born with."""
    known = {name: target for name in os.listdir(f"/proc/{pid}/fd") if (target := link(f"/proc/{pid}/fd/{name}"))}
    ends = {name: target for name, target in known.items() if target.startswith(("pipe:", "socket:")) and name != "2"}
    return set(ends.values()) if set(ends) == {"0", "1"} else None


def link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""  # closed meanwhile


def test_errors_of_the_source_come_through_and_no_child_is_left(target: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield tar(member("x", data=b"1"))[:512]
        raise RuntimeError("the source broke")

    before = children()
    with pytest.raises(RuntimeError, match="the source broke"):
        unpack(target, broken())
    assert children() <= before


def test_a_child_that_is_killed_is_told(target: Path) -> None:
    with pytest.raises(Internal, match="layer: the unpacker died with status 137, killed"):
        unpack(target, interrupted(target, lambda server, pid: os.kill(pid, signal.SIGKILL)))


def test_several_at_once_are_siblings_without_each_others_descriptors(tmp_path: Path) -> None:
    before, seen, enough = children(), threading.Barrier(3), threading.Event()

    def held() -> Iterator[bytes]:
        data = tar(member("x", data=b"1"))
        yield data[:512]
        seen.wait(20)
        enough.wait(20)
        yield data[512:]

    targets = [tmp_path / name for name in ("one", "two")]
    for target in targets:
        target.mkdir()
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(unpack, target, held()) for target in targets]
        seen.wait(20)
        try:
            (server,) = children() - before
            unpackers = wait_for(lambda: pids if len(pids := children_of(server)) == 2 else None)
            ends = [wait_for(functools.partial(ends_of, pid)) for pid in unpackers]
            assert ends[0].isdisjoint(ends[1])
        finally:
            enough.set()
        assert [each.result().bytes for each in made] == [made[0].result().bytes] * 2
    assert children() <= before and all((target / "x").read_bytes() == b"1" for target in targets)


def test_what_bears_the_children_is_killed_and_made_anew(target: Path) -> None:
    before = children()

    def murder(server: int, pid: int) -> None:
        def gone() -> bool:
            reap_orphans()
            return not Path(f"/proc/{pid}").exists()

        os.kill(server, signal.SIGKILL)
        wait_for(gone)

    with pytest.raises(Internal, match="layer: the unpacker died with status unknown"):
        unpack(target, interrupted(target, murder))
    assert children() <= before
    (target / "x").unlink()
    unpack(target, [tar(member("x", data=b"1"))])
    assert (target / "x").read_bytes() == b"1"


def test_an_unpacker_that_does_not_end_is_killed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped, here."""
    monkeypatch.setattr(unpacking, "END_TIMEOUT", 0.3)
    before = children()

    def stop(server: int, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        unpack(target, interrupted(target, stop))
    assert children() <= before
