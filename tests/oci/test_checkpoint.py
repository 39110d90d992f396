"""`crio-oci checkpoint` and `restore` on real containers, as an engine drives them: with pipes as standard streams."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.linux import syscalls
from crio_native.oci import criu, seccomp_profile

from ..conftest import criu_trouble
from ..waiting import wait_for
from .command_line import PROGRAM, SECONDS, Oci, oci
from .conftest import CAPABILITIES, spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]

CAP_SYS_RESOURCE = 24
COUNT = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"


@pytest.fixture(scope="module")
def works() -> None:
    """A CRIU that fits the kernel.  Debian 12's fits no recent one, so CI could not run these: an expected failure,
    for a skip is forbidden there."""
    if why := criu_trouble():
        pytest.xfail(f"needs a CRIU that fits this kernel: {why}")


class Engine:
    """Runs and restores containers, and reads what they write."""

    def __init__(self, oci: Oci) -> None:
        self.oci, self.images = oci, oci.directory / "images"
        self._pipes: list[Pipe] = []

    def spec(self, script: str = COUNT, group: str = "c") -> dict[str, Any]:
        spec = spec_of(str(self.oci.root), ("sh", "-c", script))
        spec["linux"]["cgroupsPath"] = f"/{self.oci.name}-{group}"
        return spec

    def run(self, spec: dict[str, Any], name: str = "c") -> Pipe:
        return self._detached("run", "--detach", "--bundle", self.oci.write(spec), name)

    def restore(self, spec: dict[str, Any], name: str = "c", *words: str | Path) -> Pipe:
        bundle = self.oci.write(spec)
        return self._detached("restore", "--detach", "--image-path", self.images, "--bundle", bundle, *words, name)

    def _detached(self, *words: str | Path) -> Pipe:
        """crio-oci's own errors go to a log, for what it has as standard error becomes the container's."""
        pipe, log = Pipe(), self.oci.directory / "log"
        self._pipes.append(pipe)
        line = [str(PROGRAM), "--log", str(log), "--root", str(self.oci.state), *map(str, words)]
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, stdout=pipe.write, stderr=pipe.write, timeout=SECONDS, check=False
        )
        pipe.close_write()
        assert done.returncode == 0, log.read_text()
        return pipe

    def checkpoint(self, name: str = "c", *words: str | Path) -> None:
        self.oci.ok("checkpoint", "--image-path", self.images, *words, name)

    def refused(self, spec: dict[str, Any], *words: str | Path) -> str:
        """The words with which a restore fails; it leaves nothing."""
        before = sorted(self.oci.left())
        bundle = self.oci.write(spec)
        told = self.oci.refused("restore", "-d", "--image-path", self.images, "-b", bundle, *words, "new")
        assert sorted(self.oci.left()) == before
        return told

    def delete(self, name: str = "c") -> None:
        self.oci.ok("delete", "--force", name)
        assert not self.oci.left()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()


class Pipe:
    """A container's output."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._text = b""

    def close_write(self) -> None:
        os.close(self.write)

    def line(self) -> str:
        while b"\n" not in self._text:
            assert self._more(), f"it ended after {self._text!r}"
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def rest(self) -> str:
        """To its end: when nobody has the pipe any more."""
        while self._more():
            continue
        text, self._text = self._text, b""
        return text.decode()

    def _more(self) -> bool:
        assert select.select([self.read], [], [], 10)[0], f"nothing came after {self._text!r}"
        data = os.read(self.read, 4096)
        self._text += data
        return bool(data)

    def close(self) -> None:
        os.close(self.read)


@pytest.fixture
def engine(works: None, oci: Oci) -> Iterator[Engine]:
    engine = Engine(oci)
    yield engine
    engine.close()


def exec_in(engine: Engine, *words: str, name: str = "c") -> str:
    return engine.oci.ok("exec", name, *words)


def pid_of(engine: Engine, name: str = "c") -> int:
    pid: int = json.loads(engine.oci.ok("state", name))["pid"]
    return pid


def saved(engine: Engine, spec: dict[str, Any]) -> dict[str, Any]:
    """A container that has said one line, saved and gone."""
    engine.run(spec).line()
    engine.checkpoint()
    assert not engine.oci.left()
    return spec


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_memory_and_output_go_on(engine: Engine) -> None:
    spec = engine.spec()
    pipe = engine.run(spec)
    assert pipe.line() == "1"
    engine.checkpoint()
    assert not engine.oci.left()
    last = int(pipe.rest().split()[-1])
    assert int(engine.restore(spec).line()) == last + 1
    assert engine.oci.status("c") == "running"
    engine.delete()


def test_leave_running(engine: Engine) -> None:
    spec = engine.spec()
    pipe = engine.run(spec)
    engine.checkpoint("c", "--leave-running")
    assert engine.oci.status("c") == "running"
    before = int(pipe.line())
    assert int(pipe.line()) == before + 1
    second = {**spec, "linux": spec["linux"] | {"cgroupsPath": f"/{engine.oci.name}-second"}}
    engine.restore(second, "second").line()  # beside the one that it was made of
    engine.oci.ok("delete", "--force", "c")
    engine.delete("second")


def test_a_paused_container_stays_paused(engine: Engine) -> None:
    engine.run(engine.spec())
    engine.oci.ok("pause", "c")
    engine.checkpoint("c", "--leave-running")
    assert engine.oci.status("c") == "paused"
    engine.delete()


def test_restored_twice_under_another_id_and_group(engine: Engine) -> None:
    spec = saved(engine, engine.spec())
    groups = {}
    for name in ("one", "two"):
        spec["linux"]["cgroupsPath"] = f"/{engine.oci.name}-{name}"
        engine.restore(spec, name).line()
        groups[name] = set(paths(Path(f"/proc/{pid_of(engine, name)}/cgroup").read_text()))
        assert set(paths(exec_in(engine, "cat", "/proc/1/cgroup", name=name))) == {"/"}
    assert groups == {name: {f"/{engine.oci.name}-{name}"} for name in groups}
    engine.oci.ok("delete", "--force", "one")
    engine.delete("two")


def paths(cgroup: str) -> list[str]:
    """Of every hierarchy."""
    return [line.split(":", 2)[2] for line in cgroup.splitlines()]


def test_isolation_is_as_asked(engine: Engine) -> None:
    """By what the kernel says of the restored processes; a second checkpoint of them is as good."""
    spec = engine.spec()
    spec["linux"]["seccomp"] = profile()
    spec["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "pids": {"limit": 50}}
    spec["process"] |= {
        "user": {"uid": 0, "gid": 0, "umask": 0o27, "additionalGids": [7]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
        "oomScoreAdj": 500,
    }
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]})
    engine.run(spec).line()
    before = findings(engine)
    for _ in range(2):
        engine.checkpoint()
        engine.restore(spec).line()
        after = findings(engine)
        assert after == before
        assert "nothing is weaker" in after
    status = Path(f"/proc/{pid_of(engine)}/status").read_text()
    assert "Seccomp:\t2\n" in status and "NoNewPrivs:\t1\n" in status
    [limit] = Path("/sys/fs/cgroup").glob(f"memory/{engine.oci.name}-c/memory.limit_in_bytes")
    assert int(limit.read_text()) == 64 << 20
    engine.delete()


def findings(engine: Engine) -> str:
    """Without the numbers of namespaces, and without that of time: CRIU makes one, in which clocks go on."""
    text = re.sub(r":\[[0-9]+\]", "", engine.oci.ok("isolation", "c"))
    return re.sub(r".*linux.namespaces time.*\n", "", text)


def profile() -> dict[str, Any]:
    """The default profile, with a call refused that nothing else refuses."""
    resolved = seccomp_profile.resolve(seccomp_profile.default_profile(), set(CAPABILITIES))
    for rule in resolved["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in ("mkdir", "mkdirat")]
    return resolved


def test_another_user(engine: Engine) -> None:
    """With no capabilities: CRIU has to read another user's limits."""
    spec = engine.spec()
    spec["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [7]}
    spec["process"]["capabilities"] |= {"effective": [], "permitted": []}
    engine.run(spec).line()
    if not syscalls.capget()[1] & 1 << CAP_SYS_RESOURCE:
        assert "Can't get rlimit" in engine.oci.refused("checkpoint", "--image-path", engine.images, "c")
        assert engine.oci.status("c") == "running"
        engine.delete()
        return
    before = findings(engine)
    engine.checkpoint()
    engine.restore(spec).line()
    assert findings(engine) == before
    engine.delete()


def test_a_seccomp_filter_goes_on_refusing(engine: Engine) -> None:
    """CRIU takes the filter off while its own code runs in the processes, and has to put it back."""
    script = "while :; do mkdir /tmp/x 2>&1 && echo made; sleep 0.02; done"
    spec = engine.spec(script)
    spec["linux"]["seccomp"] = profile()
    pipe = engine.run(spec)
    assert "Operation not permitted" in pipe.line()
    engine.checkpoint()
    pipe = engine.restore(spec)
    for _ in range(3):
        assert "Operation not permitted" in pipe.line()
    engine.delete()


def test_binds(engine: Engine) -> None:
    """Read-write, read-only, with a mount below, of a file, behind a symlink of the image, with an own mount inside."""
    sources = {name: engine.oci.directory / name for name in ("rw", "ro", "tree", "run")}
    for path in sources.values():
        path.mkdir()
        (path / "which").write_text(path.name)
    (sources["rw"] / "own").mkdir()
    (sources["rw"] / "hidden").mkdir()
    (sources["rw"] / "hidden/secret").touch()
    below = sources["tree"] / "below"
    below.mkdir()
    (engine.oci.root / "run").mkdir()
    (engine.oci.root / "var").mkdir()
    (engine.oci.root / "var/run").symlink_to("/run")
    file = engine.oci.directory / "file"
    file.write_text("file")
    spec = engine.spec("echo kept >/rw/own/kept; " + COUNT)
    spec["linux"]["maskedPaths"].append("/rw/hidden")
    spec["mounts"] += [
        {"destination": "/rw", "type": "bind", "source": str(sources["rw"]), "options": ["bind"]},
        {"destination": "/rw/own", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/ro", "type": "bind", "source": str(sources["ro"]), "options": ["bind", "ro", "nosuid"]},
        {"destination": "/tree", "type": "bind", "source": str(sources["tree"]), "options": ["rbind"]},
        {"destination": "/var/run", "type": "bind", "source": str(sources["run"]), "options": ["bind"]},
        {"destination": "/etc/file", "type": "bind", "source": str(file), "options": ["bind", "ro"]},
    ]
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", below], check=True)
    try:
        (below / "deep").write_text("deep")
        engine.run(spec).line()
        table = shown(engine)
        engine.checkpoint()
        (below / "deep").write_text("new")
        engine.restore(spec).line()
        assert shown(engine) == table
        assert exec_in(engine, "cat", "/rw/which", "/ro/which", "/tree/which", "/run/which") == "rwrotreerun"
        assert exec_in(engine, "cat", "/tree/below/deep", "/etc/file") == "newfile"
        assert exec_in(engine, "cat", "/rw/own/kept") == "kept\n"
        assert exec_in(engine, "ls", "/rw/hidden") == ""
        assert exec_in(engine, "touch", "/rw/touched") == ""
        assert (sources["rw"] / "touched").exists()
        for protected in ("/ro/touched", "/etc/file"):
            assert "Read-only" in engine.oci.refused("exec", "c", "touch", protected)
        engine.delete()
        missing = {**spec, "mounts": [mount for mount in spec["mounts"] if mount["destination"] != "/ro"]}
        assert "mounts: is missing: the checkpoint needs a mount there (got '/ro')" in engine.refused(missing)
    finally:
        subprocess.run(["umount", below], check=True)


def test_in_a_new_root_file_system(engine: Engine) -> None:
    """Where nobody has made yet what the mounts cover; as an image is restored on another machine."""
    file = engine.oci.directory / "file"
    file.write_text("file")
    spec = engine.spec()
    spec["mounts"] += [
        {"destination": "/etc/deep/file", "type": "bind", "source": str(file), "options": ["bind", "ro"]},
        {"destination": "/made", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/made/inside", "type": "bind", "source": str(file.parent), "options": ["bind", "ro"]},
    ]
    saved(engine, spec)
    new = engine.oci.directory / "new"
    shutil.copytree(engine.oci.root / "bin", new / "bin", symlinks=True)
    spec["root"]["path"] = str(new)
    engine.restore(spec).line()
    assert exec_in(engine, "cat", "/etc/deep/file", "/made/inside/file") == "filefile"
    engine.delete()


def shown(engine: Engine) -> list[tuple[str, ...]]:
    """The mounts as the container sees them, without what the kernel numbers."""
    rows = [line.split() for line in exec_in(engine, "cat", "/proc/1/mountinfo").splitlines()]
    return sorted((row[4], ",".join(sorted(row[5].split(",")))) for row in rows)


@pytest.mark.parametrize("kinds", [("network",), ("network", "ipc", "uts")])
def test_joined_namespaces(engine: Engine, kinds: tuple[str, ...]) -> None:
    """As containers join their pod's."""
    names = {"network": "net", "ipc": "ipc", "uts": "uts"}
    line = ["unshare", *(f"--{names[kind]}" for kind in kinds), "sleep", "1000"]
    with subprocess.Popen(line) as keeper:
        try:
            wait_for(lambda: os.readlink(f"/proc/{keeper.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
            spec = engine.spec()
            if "uts" in kinds:
                del spec["hostname"]
            for entry in spec["linux"]["namespaces"]:
                if entry["type"] in kinds:
                    entry["path"] = f"/proc/{keeper.pid}/ns/{names[entry['type']]}"
            saved(engine, spec)
            engine.restore(spec).line()
            for kind in kinds:
                where = f"ns/{names[kind]}"
                assert os.readlink(f"/proc/{pid_of(engine)}/{where}") == os.readlink(f"/proc/{keeper.pid}/{where}")
            engine.delete()
        finally:
            keeper.kill()


def test_in_the_foreground(engine: Engine) -> None:
    """Its output and its exit code are the restore's; a signal is passed on; nothing stays."""
    spec = saved(engine, engine.spec("trap 'echo got; exit 7' TERM; " + COUNT))
    line = [PROGRAM, "--root", engine.oci.state, "restore", "--image-path", engine.images, "-b", engine.oci.write(spec)]
    with subprocess.Popen([*map(str, line), "c"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        assert made.stdout.readline().strip().isdecimal()
        made.terminate()
        assert made.stdout.read().endswith("got\n")
        assert made.wait(10) == 7
    assert not engine.oci.left()


def test_pid_file(engine: Engine) -> None:
    spec = saved(engine, engine.spec())
    path = engine.oci.directory / "pid"
    engine.restore(spec, "c", "--pid-file", path)
    assert int(path.read_text()) == pid_of(engine)
    engine.delete()


def test_the_image_directory_is_private_and_what_is_there_is_replaced(engine: Engine) -> None:
    engine.run(engine.spec()).line()
    for _ in range(2):
        engine.checkpoint("c", "--leave-running")
    assert engine.images.stat().st_mode & 0o777 == 0o700
    assert (engine.images / criu.EXTERNAL).stat().st_mode & 0o777 == 0o600
    engine.delete()


def test_the_log_in_a_directory_of_its_own(engine: Engine) -> None:
    """A symlink in its place, from somebody's archive, is not followed."""
    spec = saved(engine, engine.spec())
    precious = engine.oci.directory / "precious"
    precious.write_text("precious")
    for name in ("restore.log", "stats-restore"):
        (engine.images / name).symlink_to(precious)
    engine.restore(spec)
    engine.delete()
    engine.restore(spec, "c", "--work-path", engine.oci.directory / "work")
    assert (engine.oci.directory / "work/restore.log").exists()
    assert precious.read_text() == "precious"
    engine.delete()


def test_memory_saved_before(engine: Engine) -> None:
    """Where the kernel does not track memory, CRIU says so, and the container goes on."""
    spec = engine.spec()
    pipe = engine.run(spec)
    done = engine.oci.call("checkpoint", "--pre-dump", "--image-path", engine.images / "first", "c")
    before = int(pipe.line())
    assert int(pipe.line()) == before + 1
    if done.returncode:
        assert "step 'criu dump' failed" in done.stderr and "rack" in done.stderr
        engine.delete()
        return
    engine.images = engine.images / "second"
    engine.checkpoint("c", "--parent-path", "../first")
    engine.restore(spec).line()
    engine.delete()


def test_hooks_of_a_restored_container(engine: Engine) -> None:
    spec = saved(engine, engine.spec())
    record = engine.oci.directory / "hooks"
    script = f"echo $0 $(cat) >>{record}"
    spec["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", script, kind]}] for kind in ("poststart", "poststop")
    }
    engine.restore(spec)
    engine.delete()
    assert [line.split()[0] for line in record.read_text().splitlines()] == ["poststart", "poststop"]
    spec["hooks"]["poststart"] = [{"path": "/bin/false"}]
    assert "step 'poststart' failed" in engine.refused(spec)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_container_that_cannot_be_saved(engine: Engine) -> None:
    assert "does not exist" in engine.oci.refused("checkpoint", "c")
    engine.oci.ok("create", "-b", engine.oci.bundle("true"), "c")
    assert "container not running: 'c' is created" in engine.oci.refused("checkpoint", "c")
    engine.oci.ok("delete", "c")
    spec = engine.spec()
    spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "pid"]
    engine.run(spec)
    assert "without a PID namespace of its own" in engine.oci.refused("checkpoint", "c")
    made_up(engine.images)
    assert "without a PID namespace of its own" in engine.refused(spec)
    assert engine.oci.status("c") == "running"  # though its group has the name that the other was to have
    engine.delete()


def made_up(images: Path, external: str = "{}", descriptors: str = "[]") -> None:
    images.mkdir(exist_ok=True)
    (images / "inventory.img").touch()
    (images / criu.SIZES).write_text("{}")
    (images / criu.EXTERNAL).write_text(external)
    (images / criu.DESCRIPTORS).write_text(descriptors)


def test_a_terminal(engine: Engine) -> None:
    spec = engine.spec()
    spec["process"]["terminal"] = True
    made_up(engine.images)
    told = engine.refused(spec, "--console-socket", engine.oci.directory / "none")
    assert "a container with a terminal has no checkpoint" in told


def test_an_output_that_is_a_file(engine: Engine) -> None:
    """CRIU's own words; the container goes on."""
    engine.oci.running("c")
    told = engine.oci.refused("checkpoint", "--image-path", engine.images, "c")
    assert "step 'criu dump' failed" in told and "Can't lookup mount" in told
    assert engine.oci.status("c") == "running"
    engine.delete()


@pytest.mark.parametrize(
    "words",
    [
        ("--lazy-pages",),
        ("--auto-dedup",),
        ("--empty-ns", "network"),
        ("--page-server", "1.2.3.4:5"),
        ("--status-fd", "3"),
    ],
)
def test_options_that_there_are_not(engine: Engine, words: tuple[str, ...]) -> None:
    engine.run(engine.spec())
    told = engine.oci.refused("checkpoint", "--image-path", engine.images, *words, "c")
    assert f"{words[0]} is not available in this version" in told
    assert not engine.images.exists()
    engine.delete()


def test_bad_options(engine: Engine) -> None:
    spec = engine.spec()
    engine.run(spec)
    for words, told in (
        (("--parent-path", "/abs"), "--parent-path"),
        (("--parent-path", "../none"), "--parent-path"),
        (("--manage-cgroups-mode", "loose"), "--manage-cgroups-mode: must be one of soft, full, strict, ignore"),
    ):
        assert told in engine.oci.refused("checkpoint", "--image-path", engine.images, *words, "c")
    assert engine.oci.status("c") == "running"
    made_up(engine.images)
    bundle = engine.oci.write(spec)
    assert "container with id exists" in engine.oci.refused(
        "restore", "-d", "--image-path", engine.images, "-b", bundle, "c"
    )
    assert "lsm-profile is not available" in engine.refused(spec, "--lsm-profile", "apparmor:x")
    engine.delete()


def test_images_that_are_none(engine: Engine) -> None:
    spec = engine.spec()
    assert "not found: the directory has no inventory.img" in engine.refused(spec)
    engine.images.mkdir()
    assert "not found: the directory has no inventory.img" in engine.refused(spec)
    (engine.images / "inventory.img").touch()
    assert "another program made it" in engine.refused(spec)
    made_up(engine.images)
    assert "step 'criu restore' failed" in engine.refused(spec)


def test_images_that_are_damaged(engine: Engine) -> None:
    """Also such as CRIU alone finds out, when it has made processes already; nothing of them stays."""
    spec = saved(engine, engine.spec())
    core = min(engine.images.glob("core-*.img"))
    core.write_bytes(b"\0" * core.stat().st_size)
    assert "step 'criu restore' failed" in (told := engine.refused(spec)) and "told no error" not in told
    pages = min(engine.images.glob("pages-*.img"))
    os.truncate(pages, pages.stat().st_size // 2)
    assert "pages-1.img is damaged" in engine.refused(spec)
    pages.unlink()
    assert "has no pages-1.img, which was there when it was made" in engine.refused(spec)


def test_a_criu_that_is_killed_leaves_nothing(engine: Engine) -> None:
    """It cannot tidy up, so its orphans are ours to end."""
    spec = saved(engine, engine.spec())
    line = [PROGRAM, "--root", engine.oci.state, "restore", "-d", "--image-path", engine.images]
    line += ["-b", engine.oci.write(spec), "c"]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([*map(str, line)], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors) as made:
            wait_for((engine.images / "restore.log").exists)
            kill_child(made.pid, "criu")
            assert made.wait(10) == 1
        errors.seek(0)
        assert "step 'criu restore' failed" in errors.read()
    assert not engine.oci.left()


def kill_child(parent: int, name: str) -> None:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().strip() == name:
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_restore_that_is_interrupted_leaves_nothing(engine: Engine, number: signal.Signals) -> None:
    spec = saved(engine, engine.spec())
    line = [PROGRAM, "--root", engine.oci.state, "restore", "-d", "--image-path", engine.images]
    line += ["-b", engine.oci.write(spec), "c"]
    with subprocess.Popen([*map(str, line)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as made:
        wait_for((engine.images / "restore.log").exists)
        made.send_signal(number)
        assert made.wait(10) != 0
    assert not engine.oci.left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_checkpoint_that_has_begun_ends(engine: Engine, number: signal.Signals) -> None:
    """Who kills CRIU then has processes with CRIU's code in them."""
    spec = engine.spec()
    engine.run(spec).line()
    line = [str(PROGRAM), "--root", str(engine.oci.state), "checkpoint", "--image-path", str(engine.images), "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, process_group=0) as saving:
        wait_for((engine.images / "dump.log").exists)
        os.killpg(saving.pid, number)
        assert saving.wait(10) == 0
    assert not engine.oci.left()
    engine.restore(spec).line()
    engine.delete()


@pytest.mark.parametrize(
    ("external", "words"),
    [
        ("[]", "must map mounts"),
        ("{", "is not JSON"),
        ("\0", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"/x": 5}', "must say with words"),
        ('{"/x": {"destination": 5}}', "must say with words"),
        ('{"/x]:/etc": {"device": "null"}}', "is no mount's place"),
        ('{"/x\\ny": {"device": "null"}}', "is no mount's place"),
        ('{"x": {"device": "null"}}', "is no mount's place"),
        ('{"/x": {"device": "sda"}}', "says nothing that is known"),
        ('{"/x": {}}', "says nothing that is known"),
        ('{"/x": {"source": "/etc"}}', "says nothing that is known"),
        ('{"/x": {"destination": "/data", "below": "/../../etc"}}', "does not lead straight down"),
        ('{"/x": {"destination": "/data", "below": "/link"}}', "levels of symbolic links"),
        ('{"/x": {"destination": "/data", "below": "/link/passwd"}}', "levels of symbolic links"),
        ('{"/x": {"destination": "/data", "below": "-other"}}', "does not lead straight down"),
        ('{"/x": {"cgroup": "../../etc"}}', "shows a cgroup hierarchy that this host has not"),
        (" " * (2 << 20), "may have at most"),
    ],
)
def test_foreign_metadata(engine: Engine, external: str, words: str) -> None:
    """Checkpoints come from other machines, and binds hold what containers wrote: neither may name a host's file."""
    data = engine.oci.directory / "data"
    data.mkdir()
    (engine.oci.directory / "data-other").mkdir()
    (data / "link").symlink_to("/etc")
    spec = engine.spec()
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": str(data), "options": ["bind"]})
    made_up(engine.images, external)
    assert words in engine.refused(spec)


def test_metadata_that_is_no_file(engine: Engine) -> None:
    spec = engine.spec()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)):
        made_up(engine.images)
        path = engine.images / criu.DESCRIPTORS
        path.unlink()
        make(path)
        assert "Traceback" not in (told := engine.refused(spec)) and criu.DESCRIPTORS in told
        with contextlib.suppress(IsADirectoryError, PermissionError):
            path.unlink()
            continue
        path.rmdir()
