"""crio-oci when something comes between: a signal, a second command, a damaged record, a full disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from crio_native.linux import process

from ..waiting import wait_for
from .command_line import PROGRAM, Oci, children, oci
from .conftest import spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]

DAMAGE = {"empty": b"", "cut": b'{"id": "c", "pid": 4', "other": b'{"id": "../c"}', "bytes": b"\xff\xfe"}


@pytest.mark.parametrize("damage", [*DAMAGE, "directory", "number"])
def test_a_damaged_state_hides_no_other_container_and_can_be_removed(oci: Oci, damage: str) -> None:
    spec = spec_of(str(oci.root), ("sleep", "1000"))
    for name in ("c", "whole"):
        spec["linux"]["cgroupsPath"] = f"/{oci.name}-{name}"
        oci.ok("run", "--detach", "-b", oci.write(spec), name)
    pid, file = json.loads(oci.ok("state", "c"))["pid"], oci.state / "c/state.json"
    record = json.loads(file.read_text()) | {"pid": "1", "cgroupsPath": f"/{oci.name}-whole"}
    file.unlink()
    if damage == "directory":
        file.mkdir()
    else:
        file.write_bytes(DAMAGE.get(damage) or json.dumps(record).encode())
    listed = oci.call("list", "-q")
    assert (listed.returncode, listed.stdout) == (0, "whole\n")
    assert "the state of container 'c' cannot be read" in listed.stderr
    assert "cannot be read" in oci.refused("delete", "c")
    assert "no hook of it is run" in oci.call("delete", "--force", "c").stderr
    assert not Path(f"/proc/{pid}/root/proc").exists()  # what was in the group that its config.json names
    assert oci.ok("list", "-q") == "whole\n"
    assert oci.status("whole") == "running"
    oci.ok("delete", "-f", "whole")
    assert not oci.left()


def test_without_state_and_config_no_group_is_touched(oci: Oci) -> None:
    oci.running("c")
    pid = json.loads(oci.ok("state", "c"))["pid"]
    for name in ("state.json", "config.json"):
        (oci.state / "c" / name).write_text("")
    (oci.state / "c/elsewhere").symlink_to(oci.root)
    assert "its control group is left" in oci.call("delete", "--force", "c").stderr
    assert not list(oci.state.glob("c")) and (oci.root / "bin").is_dir()
    os.kill(pid, signal.SIGKILL)  # it was let live
    groups = list(Path("/sys/fs/cgroup").glob(f"*/{oci.name}/c"))
    wait_for(lambda: not any((group / "cgroup.procs").read_text() for group in groups))
    for group in groups:
        group.rmdir()
        group.parent.rmdir()


@pytest.mark.parametrize("filled", [True, False], ids=["state.json", "config.json"])
def test_a_root_that_is_full_is_named(oci: Oci, filled: bool) -> None:
    oci.state.mkdir()
    line = f"mount -t tmpfs -o size=8k full {oci.state}; echo >{oci.state}/log"
    line += f"; head -c 4096 /dev/zero >{oci.state}/other" * filled
    line += f"; {PROGRAM} --log {oci.state}/log --root {oci.state} create -b {oci.bundle('true')} c; ls {oci.state}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", line], capture_output=True, text=True, timeout=30)
    name = ".state.json" if filled else "config.json"
    why = f"{oci.state}/c/{name}: no space left on device: the container's state cannot be kept"
    assert f"crio-oci: {why}\n" in done.stderr, done.stderr
    assert done.stdout.split() == ["log", "other"][: 1 + filled]


def at_once(oci: Oci, count: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """The command, several times at the same moment."""
    line = oci.line(*words)
    begun = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    return [subprocess.CompletedProcess(line, process.wait(30), "", process.communicate()[1]) for process in begun]


def test_of_several_starts_one_starts_and_of_several_deletes_all_succeed(oci: Oci) -> None:
    spec = oci.spec("sleep", "1000")
    spec["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"echo >>{oci.directory}/{kind}"]}]
        for kind in ("poststart", "poststop")
    }
    bundle = oci.write(spec)
    for number in range(6):
        oci.ok("create", "-b", bundle, "c")
        started = at_once(oci, 4, "start", "c")
        assert sorted(done.returncode for done in started) == [0, 1, 1, 1]
        words = {done.stderr for done in started if done.returncode}
        assert words == {"crio-oci: cannot start an already running container: 'c'\n"}
        assert all(done.returncode == 0 for done in at_once(oci, 5, "delete", "--force", "c"))
        for kind in ("poststart", "poststop"):
            assert (oci.directory / kind).read_text() == "\n" * (number + 1)
    assert not oci.left()


def test_a_create_whose_container_is_deleted_meanwhile_says_so(oci: Oci) -> None:
    spec = oci.spec("true", terminal=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{oci.directory}/console")  # and nobody accepts: the create waits for that
    listener.listen(0)
    connections = [socket.socket(socket.AF_UNIX)]
    connections[0].connect(f"{oci.directory}/console")
    line = oci.line("create", "-b", oci.write(spec), "--console-socket", f"{oci.directory}/console", "c")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as making, listener:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "created")
        oci.ok("delete", "--force", "c")
        while making.poll() is None:
            listener.settimeout(0.1)
            try:
                connections.append(listener.accept()[0])
            except TimeoutError:
                continue
        assert making.stderr is not None
        assert making.stderr.read() == "crio-oci: container 'c' was deleted, or killed, while it was made\n"
    for connection in connections:
        connection.close()
    assert not oci.left()


def test_a_create_that_is_killed_leaves_what_delete_can_remove(oci: Oci) -> None:
    spec = oci.spec("true")
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = oci.line("create", "-b", oci.write(spec), "c")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        wait_for(lambda: len(children(making.pid)) == 2)  # the init and the hook
        hook = children(making.pid)[-1]
        making.kill()
        os.kill(hook, signal.SIGKILL)  # nobody is left who would
    assert oci.status("c") == "stopped"
    oci.ok("delete", "--force", "c")
    wait_for(lambda: not oci.left())


def test_an_init_without_its_creator_undoes_nothing(oci: Oci) -> None:
    """A path of the host's is another file in the container: here a volume's."""
    volume = oci.directory / "volume"
    files = [volume / "c" / name for name in ("config.json", "state.json", "start")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("precious")
    spec = oci.spec("true")
    spec["mounts"].append({"destination": str(oci.state), "type": "bind", "source": str(volume), "options": ["bind"]})
    spec["hooks"] = {"createContainer": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = oci.line("create", "-b", oci.write(spec), "c")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as making:
        wait_for(lambda: len(children(making.pid)) == 1)
        (init,) = children(making.pid)
        wait_for(lambda: len(children(init)) == 1)
        making.kill()
    os.kill(children(init)[0], signal.SIGTERM)  # the hook fails, and there is nobody to tell
    wait_for(lambda: process.start_time(init) is None)
    assert all(file.read_text() == "precious" for file in files)
    assert (oci.state / "c" / "state.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_create_that_is_terminated_undoes_itself(oci: Oci, number: signal.Signals) -> None:
    spec = oci.spec("true")
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = oci.line("create", "-b", oci.write(spec), "c")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        wait_for(lambda: len(children(making.pid)) == 2)  # the init and the hook
        making.send_signal(number)
        assert making.wait(10) != 0
    wait_for(lambda: not oci.left())


def test_a_hangup_that_the_caller_ignores_is_ignored(oci: Oci) -> None:
    spec = oci.spec("true")
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "0.5"]}]}
    line = ["nohup", *oci.line("create", "-b", oci.write(spec), "c")]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        making.send_signal(signal.SIGHUP)
        assert making.wait(10) == 0
    assert oci.status("c") == "created"
    oci.ok("delete", "c")


def test_a_create_that_fails_early_leaves_alone_the_group_of_another(oci: Oci) -> None:
    """It has not made the group of that name yet, and must not undo it."""
    oci.ok("run", "--detach", "-b", oci.bundle("sleep", "1000"), "c")
    spec = oci.spec("true")
    rule = {"names": ["no_such_call"], "action": "SCMP_ACT_ERRNO"}
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    spec["annotations"] = {"run.oci.seccomp_fail_unknown_syscall": "1"}
    assert "no system call" in oci.refused("create", "-b", oci.write(spec), "d")
    assert oci.status("c") == "running"
