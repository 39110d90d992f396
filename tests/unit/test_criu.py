"""CRIU's command lines, what is read of a checkpoint, and which of CRIU's words are told: without CRIU."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, StepFailed
from crio_native.oci import criu
from crio_native.pods import checkpoint

SPEC: dict[str, Any] = {
    "process": {},
    "mounts": [{"destination": "/data", "source": "/srv/data"}],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
}
NOTHING = criu.Saved({}, [])


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that is there; nobody runs it."""
    directory = tmp_path / "programs"
    directory.mkdir()
    (directory / "criu").touch(0o755)
    monkeypatch.setattr(criu, "_PATH", f"/nowhere:{directory}")
    return str(directory / "criu")


def dump(spec: dict[str, Any] = SPEC, saved: criu.Saved = NOTHING, **more: Any) -> list[str]:
    options = more.pop("options", criu.Options())
    return criu.dump_line(os.getpid(), spec, saved, options, images="/i", work="/w", root="/r", **more)


def restore(spec: dict[str, Any] = SPEC, saved: criu.Saved = NOTHING, **more: Any) -> list[str]:
    given: dict[str, Any] = {
        "images": "/i", "work": "/w", "root": "/r", "pid_file": "/p", "cgroup": "/g", "streams": [7, 8, 9],
        "cgroup_directories": {"cpu": "/sys/fs/cgroup/cpu/g", "": "/sys/fs/cgroup/g"}, "below": "/b",
    }  # fmt: skip
    return criu.restore_line(spec, saved, criu.Options(), **given | more)


def pairs(line: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(line) if name == option]


def test_the_first_criu_of_the_path(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert criu.program() == program
    monkeypatch.setattr(criu, "_PATH", "/nowhere")
    with pytest.raises(FailedPrecondition, match="this host has no program `criu`"):
        criu.program()


def test_containers_that_have_no_checkpoint() -> None:
    criu.check_spec(SPEC)
    linux = {"namespaces": [{"type": "pid"}, {"type": "user"}]}
    shared = {"namespaces": [{"type": "pid", "path": "/p"}]}
    for spec, words in (
        ({**SPEC, "process": {"terminal": True}}, "with a terminal"),
        ({**SPEC, "linux": linux}, "in a user namespace"),
        ({**SPEC, "linux": {}}, "without a PID namespace of its own"),
        ({**SPEC, "linux": shared}, "without a PID namespace of its own"),
    ):
        with pytest.raises(FailedPrecondition, match=f"a container {words}"):
            criu.check_spec(spec)


def test_dump(program: str) -> None:
    line = dump(saved=criu.Saved({"/data": {"destination": "/data", "below": ""}}, []), freezer="/f")
    assert line[:6] == [program, "dump", "--tree", str(os.getpid()), "--root", "/r"]
    assert pairs(line, "--images-dir") == ["/i"] and pairs(line, "--work-dir") == ["/w"]
    assert pairs(line, "--log-file") == ["dump.log"]
    assert pairs(line, "--external") == ["mnt[/data]:/data"]
    assert pairs(line, "--freeze-cgroup") == ["/f"]
    assert "--manage-cgroups=soft" in line
    assert not {"--leave-running", "--track-mem", "--tcp-established"} & set(line)


def test_dump_with_options() -> None:
    options = criu.Options(True, True, True, True, "full")
    line = dump(options=options, leave="running", parent="../first")
    switches = {"--tcp-established", "--ext-unix-sk", "--shell-job", "--file-locks", "--manage-cgroups=full"}
    assert switches | {"--leave-running", "--track-mem"} <= set(line)
    assert pairs(line, "--prev-images-dir") == ["../first"]


def test_pre_dump() -> None:
    """It leaves the container running by itself, and CRIU refuses to be told so."""
    line = dump(pre_dump=True, leave="running")
    assert line[1] == "pre-dump" and "--track-mem" in line and "--leave-running" not in line


def test_a_network_of_somebody_elses_stays_outside() -> None:
    spec = {**SPEC, "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}]}}
    inode = os.stat("/proc/self/ns/net").st_ino
    assert pairs(dump(spec), "--external") == [f"net[{inode}]:extRootNetNS"]
    assert pairs(restore(spec, network=5), "--inherit-fd") == ["fd[5]:extRootNetNS"]
    own = {**SPEC, "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]}}
    assert not pairs(dump(own), "--external")


def test_bad_mode_of_control_groups() -> None:
    with pytest.raises(InvalidArgument, match="--manage-cgroups-mode: must be one of soft, full, strict, ignore"):
        dump(options=criu.Options(manage_cgroups_mode="loose"))


def test_restore() -> None:
    mounts = {
        "/data": {"destination": "/data", "below": ""},
        "/sys/fs/cgroup/cpu": {"cgroup": "cpu"},
        "/sys/fs/cgroup": {"cgroup": "cgroup"},
        "/proc/kcore": {"device": "null"},
    }
    line = restore(saved=criu.Saved(mounts, ["/dev/null", "pipe:[1]", "socket:[22]"]))
    assert line[1:3] == ["restore", "--restore-detached"]
    assert pairs(line, "--cgroup-root") == ["/g"] and pairs(line, "--log-file") == ["restore.log"]
    assert pairs(line, "--external") == [
        "mnt[/data]:/srv/data",
        "mnt[/sys/fs/cgroup/cpu]:/sys/fs/cgroup/cpu/g",
        "mnt[/sys/fs/cgroup]:/sys/fs/cgroup/g",
        "mnt[/proc/kcore]:/dev/null",
    ]
    assert pairs(line, "--inherit-fd") == ["fd[8]:pipe:[1]", "fd[9]:socket:[22]"]


def test_namespaces_to_join() -> None:
    joined = [{"type": "pid"}, {"type": "ipc", "path": "/i"}, {"type": "uts", "path": "/u"}]
    assert pairs(restore({**SPEC, "linux": {"namespaces": joined}}), "--join-ns") == ["ipc:/i", "uts:/u"]


@pytest.mark.parametrize("name", ["pipe:[1]:x", "pipe:", "/etc/passwd", "pipe:[x]", "pipe:[1]\n"])
def test_other_streams_are_left_to_the_images(name: str) -> None:
    assert not pairs(restore(saved=criu.Saved({}, [name, name, name])), "--inherit-fd")


def test_a_mount_inside_a_bind_has_another_name() -> None:
    """What its own leads through, a neighbour of the volume could swap until CRIU mounts it."""
    deeper = {"destination": "/data", "below": "/below"}
    inside = criu.Saved({"/data/x": deeper, "/data": {**deeper, "below": ""}, "/data/y": deeper}, [])
    assert pairs(restore(saved=inside), "--external") == [
        "mnt[/data/x]:/b/0",
        "mnt[/data]:/srv/data",
        "mnt[/data/y]:/b/1",
    ]
    assert criu.sources_below(SPEC, inside) == [("/srv/data", "/below")] * 2


@pytest.mark.parametrize("below", ["/../source-other", "-other", "/below/.", "//below", "/", "/a/", "/.."])
def test_a_mount_inside_a_bind_stays_there(below: str) -> None:
    with pytest.raises(InvalidArgument, match="does not lead straight down"):
        criu.sources_below(SPEC, criu.Saved({"/data/x": {"destination": "/data", "below": below}}, []))


@pytest.mark.parametrize("what", [{}, {"source": "/etc"}, {"device": "../etc/passwd"}, {"device": "sda"}])
def test_a_mount_of_nothing_known(what: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="says nothing that is known of a mount"):
        restore(saved=criu.Saved({"/x": what}, []))


def test_a_mount_that_is_missing() -> None:
    with pytest.raises(InvalidArgument, match="is missing: the checkpoint needs a mount there"):
        restore(saved=criu.Saved({"/x": {"destination": "/x", "below": ""}}, []))
    with pytest.raises(InvalidArgument, match="shows a cgroup hierarchy that this host has not"):
        restore(saved=criu.Saved({"/x": {"cgroup": "rdma"}}, []), cgroup_directories={"cpu": "/c"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = criu.Saved({"/data": {"destination": "/data", "below": ""}}, ["pipe:[1]", "", ""])
    criu.write(saved, str(tmp_path))
    with pytest.raises(NotFound, match=r"no inventory\.img"):
        criu.read(str(tmp_path))
    (tmp_path / "inventory.img").write_text("image")
    criu.write(saved, str(tmp_path))
    assert criu.read(str(tmp_path)) == saved
    (tmp_path / "inventory.img").write_text("im")
    with pytest.raises(InvalidArgument, match=r"inventory\.img is damaged: it has 2 bytes now \(got 5\)"):
        criu.read(str(tmp_path))
    (tmp_path / criu.SIZES).write_text("{}")
    (tmp_path / criu.DESCRIPTORS).unlink()
    with pytest.raises(NotFound, match=r"no descriptors\.json: another program made it"):
        criu.read(str(tmp_path))


@pytest.mark.parametrize("descriptors", ["{}", "[1]", "null", '"pipe:[1]"'])
def test_streams_that_are_none(tmp_path: Path, descriptors: str) -> None:
    (tmp_path / "inventory.img").touch()
    criu.write(NOTHING, str(tmp_path))
    (tmp_path / criu.DESCRIPTORS).write_text(descriptors)
    with pytest.raises(InvalidArgument, match=r"descriptors\.json: must be a list of names"):
        criu.read(str(tmp_path))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", ".img", "a/b.img", "a.img\n"])
def test_sizes_of_no_image_are_not_told(tmp_path: Path, name: str) -> None:
    """Whoever writes them could ask for the size of any file of the host's."""
    (tmp_path / "inventory.img").touch()
    criu.write(NOTHING, str(tmp_path))
    (tmp_path / criu.SIZES).write_text(json.dumps({name: 0}))
    with pytest.raises(InvalidArgument, match=r"sizes\.json: is no image's name"):
        criu.read(str(tmp_path))


@pytest.mark.parametrize("sizes", ["[]", '{"none.img": 5}', '{"inventory.img": "0"}', '{"a\\u0000": 0}'])
def test_sizes_that_are_none(tmp_path: Path, sizes: str) -> None:
    (tmp_path / "inventory.img").touch()
    criu.write(NOTHING, str(tmp_path))
    (tmp_path / criu.SIZES).write_text(sizes)
    with pytest.raises((InvalidArgument, NotFound)):
        criu.read(str(tmp_path))


@pytest.mark.parametrize("place", ["x", "", "/x]:/etc", "/a\nb", "/a\0"])
def test_places_that_criu_would_take_for_something_else(tmp_path: Path, place: str) -> None:
    (tmp_path / "inventory.img").touch()
    criu.write(criu.Saved({place: {"device": "null"}}, []), str(tmp_path))
    with pytest.raises(InvalidArgument, match="is no mount's place"):
        criu.read(str(tmp_path))


def test_a_symlink_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "inventory.img").touch()
    criu.write(NOTHING, str(tmp_path))
    (tmp_path / criu.EXTERNAL).unlink()
    (tmp_path / "elsewhere").write_text(json.dumps({}))
    (tmp_path / criu.EXTERNAL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match=r"external\.json: cannot be read"):
        criu.read(str(tmp_path))


LOG = """(00.1) Warn  (criu/x.c:1): slow
(00.2) Error (criu/cr.c:2): Can't setup RLIMIT_NOFILE for self
(00.3) Error (criu/mount.c:3): No mapping for /x
(00.4) pie: 1: Error (pie/p.c:4): pie broke
"""


@pytest.mark.parametrize(
    ("log", "stderr", "code", "words"),
    [
        (LOG, "noise", 1, r"on /.*/dump\.log: \(criu/mount\.c:3\): No mapping for /x; \(pie/p\.c:4\): pie broke$"),
        (None, "Error (criu/vdso.c:5): odd\n", 1, r": \(criu/vdso\.c:5\): odd$"),
        (None, "criu: bad library\n", 127, ": criu: bad library$"),
        ("", "", 1, "ended with code 1 and told no error"),
        ("(00.1) fine\n", "", -9, "ended with signal 9 and told no error"),
        ("x" * 200_000 + "\nError (a): last\n", "", 1, r"\(a\): last$"),
    ],
)
def test_the_words_of_a_failure(tmp_path: Path, log: str | None, stderr: str, code: int, words: str) -> None:
    if log is not None:
        (tmp_path / "dump.log").write_text(log)
    error = criu.failure("dump", code, str(tmp_path), stderr)
    assert error.step == "criu dump"
    with pytest.raises(type(error), match=words):
        raise error


def test_old_logs_are_removed_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "restore.log").symlink_to(precious)
    (tmp_path / "dump.log").touch()
    criu.clear(str(tmp_path), "restore")
    criu.clear(str(tmp_path), "restore")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.log", "precious", "programs"]


def script(program: str, text: str) -> None:
    Path(program).write_text(f"#!/bin/sh\n{text}\n")


@pytest.mark.parametrize("act", ["dump", "pre-dump"])
def test_it_runs_to_its_end_and_its_words_are_kept(program: str, tmp_path: Path, act: str) -> None:
    """Standard error is no pipe: what a CRIU makes, or leaves, may hold it."""
    line = [program, act]
    script(program, "exit 0")
    criu.run(line, str(tmp_path))
    script(program, f"echo 'Error (criu/x.c:1): odd' > {tmp_path}/dump.log; /bin/sleep 0.5 & exit 3")
    with pytest.raises(StepFailed, match=r"criu dump.*\(criu/x\.c:1\): odd"):
        criu.run(line, str(tmp_path))
    script(program, "exec /bin/sleep 1000")
    with pytest.raises(DeadlineExceeded, match=r"criu dump did not end within 0\.1 s"):
        criu.run(line, str(tmp_path), seconds=0.1)


def test_the_lock_is_held_as_long_as_criu_runs(program: str, tmp_path: Path) -> None:
    script(program, "exec /bin/sleep 0.5")
    with criu.locked(str(tmp_path)) as lock, pytest.raises(DeadlineExceeded):
        criu.run([program, "dump"], str(tmp_path), keep=[lock], seconds=0.1)
    criu.await_end(str(tmp_path), 1.0)
    script(program, "(exec /bin/sleep 0.5) & exit 0")
    with criu.locked(str(tmp_path)) as lock:
        criu.run([program, "dump"], str(tmp_path), keep=[lock])
    with pytest.raises(DeadlineExceeded, match="did not end within"):
        criu.await_end(str(tmp_path), 0.1)
    criu.await_end(str(tmp_path), 5.0)


def test_a_program_that_fits_the_kernel_is_asked_once(program: str, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    script(program, f"echo $@ >> {asked}; echo 'no such thing' >&2; exit 1")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="does not work with this kernel: no such thing"):
            checkpoint.check_criu("this")
    script(program, f"echo $@ >> {asked}")
    for _ in range(3):
        checkpoint.check_criu("this")
    assert asked.read_text() == "check\n" * 3
    os.utime(program, ns=(0, 0))  # it was exchanged
    checkpoint.check_criu("this")
    assert asked.read_text() == "check\n" * 4
