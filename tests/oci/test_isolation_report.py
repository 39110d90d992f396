"""The report against real containers: nothing is weaker where nothing is, and each weakness is seen."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.cli import crioctl
from crio_native.cli import oci as crio_oci
from crio_native.errors import InvalidArgument, NotFound
from crio_native.linux.cgroup import hierarchy
from crio_native.oci.isolation import Finding, Verdict, report

from ..apart import MARK
from ..cri.conftest import Client, cri, shared  # noqa: F401  fixtures
from ..waiting import wait_for
from .conftest import Box, Container

pytestmark = pytest.mark.root

CGROUP = f"/{MARK}isolation"


def full_spec(box: Box) -> dict[str, Any]:
    """A container with something in every field that the report compares."""
    spec = box.spec()
    spec["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(box.directory), "options": ["rbind", "ro", "nosuid"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    ]
    spec["process"] |= {
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
        "oomScoreAdj": 500,
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [7]},
    }
    # What a user keeps of these the kernel decides: none.
    spec["process"]["capabilities"] |= {"effective": [], "permitted": []}
    spec["linux"] |= {
        "cgroupsPath": CGROUP,
        "resources": {
            "memory": {"limit": 64 << 20},
            "pids": {"limit": 50},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0"},
            "devices": [{"allow": False, "access": "rwm"}],
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO"}],
        },
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
    }
    return spec


@pytest.fixture
def full(box: Box) -> Iterator[Container]:
    container = box.create(full_spec(box)).start()
    assert container.exec("true") == (0, "")  # by then the init has execed
    yield container


def weaker(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.field: finding for finding in findings if finding.weaker}


def test_a_container_is_as_asked(full: Container) -> None:
    findings = report(full.process.pid, full.spec.spec)
    assert {finding.field: finding for finding in findings if finding.verdict is not Verdict.SAME} == {}
    fields = " ".join(finding.field for finding in findings)
    for part in ("namespaces", "capabilities", "seccomp", "mounts", "maskedPaths", "devices", "descriptors", "memory"):
        assert part in fields


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        holder: Any = spec
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = to

    return change


def add_to(*path: Any, entry: Any) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        holder: Any = spec
        for part in path:
            holder = holder[part]
        holder.append(entry)

    return change


def test_a_container_in_a_user_namespace_is_as_asked(box: Box) -> None:
    """Its numbers are told in its own words, its devices are the host's, bound."""
    spec = box.spec()
    spec["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    spec["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}
    spec["process"]["user"] = {"uid": 5, "gid": 6, "additionalGids": [7]}
    for directory in (box.directory, box.root):
        directory.chmod(0o755)
    spec["process"]["capabilities"] |= {"effective": [], "permitted": []}
    container = box.create(spec).start()
    container.exec("true")
    findings = report(container.process.pid, spec)
    assert {finding.field: finding for finding in findings if finding.verdict is not Verdict.SAME} == {}
    asked = copy.deepcopy(spec)
    asked["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    assert "linux.uidMappings" in weaker(report(container.process.pid, asked))


# What is asked for after the container was made without it, and the field that must be found weaker.
ASKED_FOR_MORE = {
    "process.capabilities.bounding": set_at("process", "capabilities", "bounding", to=["CAP_KILL"]),
    "mounts[1] /dev": add_to("mounts", 1, "options", entry="noexec"),
    "linux.maskedPaths /proc/uptime": add_to("linux", "maskedPaths", entry="/proc/uptime"),
    "linux.maskedPaths /proc/tty": add_to("linux", "maskedPaths", entry="/proc/tty"),
    "linux.readonlyPaths /tmp": add_to("linux", "readonlyPaths", entry="/tmp"),
    "linux.resources.memory.limit": set_at("linux", "resources", "memory", "limit", to=32 << 20),
    "linux.resources.pids.limit": set_at("linux", "resources", "pids", "limit", to=10),
    "linux.resources.cpu.quota": set_at("linux", "resources", "cpu", "quota", to=10_000),
    "process.rlimits RLIMIT_NOFILE": set_at(
        "process", "rlimits", 0, to={"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}
    ),
    "process.oomScoreAdj": set_at("process", "oomScoreAdj", to=900),
    "process.user.additionalGids": set_at("process", "user", "additionalGids", to=[]),
    "root.readonly": set_at("root", "readonly", to=True),
    "linux.namespaces user": add_to("linux", "namespaces", entry={"type": "user"}),
    "process.apparmorProfile": set_at("process", "apparmorProfile", to="strict"),
    "process.selinuxLabel": set_at("process", "selinuxLabel", to="a:b:c"),
    "mounts[7] /etc": add_to("mounts", entry={"destination": "/etc", "type": "tmpfs", "options": []}),
    "linux.cgroupsPath memory": set_at("linux", "cgroupsPath", to="/elsewhere"),
}


@pytest.mark.parametrize("field", ASKED_FOR_MORE)
def test_what_is_weaker_than_asked_is_seen(full: Container, field: str) -> None:
    asked = copy.deepcopy(dict(full.spec.spec))
    if field == "linux.namespaces user":
        asked["linux"]["uidMappings"] = asked["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    ASKED_FOR_MORE[field](asked)
    found = weaker(report(full.process.pid, asked))
    assert field in found, list(found)


def test_limits_are_those_of_the_group_it_is_in(full: Container) -> None:
    """Also where config.json does not name it; in a hierarchy's root nothing is limited."""
    asked = copy.deepcopy(dict(full.spec.spec))
    del asked["linux"]["cgroupsPath"]
    assert weaker(report(full.process.pid, asked)) == {}
    asked["linux"]["resources"]["pids"]["limit"] = 10
    assert set(weaker(report(full.process.pid, asked))) == {"linux.resources.pids.limit"}
    for mount in hierarchy().mounts:
        Path(mount, "cgroup.procs").write_text(str(full.process.pid))
    limits = {f"linux.resources.{name}" for name in ("memory.limit", "pids.limit", "cpu.quota", "devices")}
    assert limits <= set(weaker(report(full.process.pid, asked)))


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with another below it."""
    for path in (tmp_path, tmp_path / "sub"):
        path.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tree", path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path / "sub", tmp_path], check=True)


def remount(container: Container, path: str, options: str) -> None:
    """As whoever has the host's root may, from outside."""
    enter = ["nsenter", "--mount", "--root", "--wd", "--target", str(container.process.pid), "/bin/mount"]
    subprocess.run([*enter, "-o", f"remount,bind,{options}", "none", path], check=True)


def test_what_holds_for_a_tree_holds_for_all_its_mounts(box: Box, tree: Path) -> None:
    spec = box.spec()
    options = ["rbind", "rro", "rnoexec", "nosymfollow"]
    spec["mounts"].append({"destination": "/vol", "type": "bind", "source": str(tree), "options": options})
    container = box.create(spec).start()
    container.exec("true")
    assert {found.field for found in report(container.process.pid, spec) if found.verdict is not Verdict.SAME} == set()
    remount(container, "/vol/sub", "rw,noexec")
    (found,) = weaker(report(container.process.pid, spec)).values()
    assert (found.field, found.asked) == ("mounts[5] /vol: /vol/sub", "noexec ro on all below")
    assert found.found == "tmpfs; without ro"
    remount(container, "/vol", "ro,noexec")  # without nosymfollow
    assert set(weaker(report(container.process.pid, spec))) == {"mounts[5] /vol", found.field}


@pytest.mark.parametrize("option", ["idmap", "ridmap"])
def test_a_mount_whose_owners_are_not_mapped_is_seen(box: Box, tree: Path, option: str) -> None:
    mapping = [{"containerID": 0, "hostID": 1000, "size": 10}]
    mount = {"destination": "/vol", "type": "bind", "source": str(tree), "options": ["rbind"]}
    mapped = {**mount, "options": ["rbind", option], "uidMappings": mapping, "gidMappings": mapping}
    asked, plain = box.spec(), box.spec()
    asked["mounts"].append(mapped)
    plain["mounts"].append(mount)
    container, other = box.create(asked).start(), box.create(plain).start()
    container.exec("true"), other.exec("true")
    assert weaker(report(container.process.pid, asked)) == {}
    below = {"mounts[5] /vol: /vol/sub"} if option == "ridmap" else set()
    assert set(weaker(report(other.process.pid, asked))) == {"mounts[5] /vol"} | below


# What the container was made without, against the full spec: the other way round.
MADE_WITHOUT = {
    "linux.seccomp": lambda spec: spec["linux"].pop("seccomp"),
    "process.noNewPrivileges": lambda spec: spec["process"].pop("noNewPrivileges"),
    "linux.namespaces network": lambda spec: spec["linux"]["namespaces"].remove({"type": "network"}),
    "linux.namespaces pid": lambda spec: spec["linux"]["namespaces"].remove({"type": "pid"}),
    "mounts[5] /data": lambda spec: spec["mounts"][5]["options"].remove("ro"),
    "linux.resources.devices": lambda spec: spec["linux"]["resources"].pop("devices"),
    "device files": lambda spec: spec["linux"]["devices"].append(
        {"path": "/dev/loop9", "type": "b", "major": 7, "minor": 9}
    ),
    "process.user.uid": lambda spec: spec["process"]["user"].update(uid=0),
    "mount /extra": lambda spec: spec["mounts"].append({"destination": "/extra", "type": "tmpfs", "source": "x"}),
}


@pytest.mark.parametrize("field", MADE_WITHOUT)
def test_a_container_that_was_made_weaker_is_seen(box: Box, field: str) -> None:
    asked = full_spec(box)
    spec = copy.deepcopy(asked)
    MADE_WITHOUT[field](spec)
    container = box.create(spec).start()
    container.exec("true")
    assert field in weaker(report(container.process.pid, asked))


def test_another_root_and_symlinks_are_as_asked(box: Box) -> None:
    """Mounted over the root, mounted themselves and copied; what somebody stacks on the root is seen."""
    spec, link = box.spec(), box.directory / "link"
    link.symlink_to("somewhere")
    over = {"destination": "/", "type": "bind", "source": str(box.root), "options": ["bind"]}
    spec["mounts"] = [over, *spec["mounts"]]
    for path, options in {"/itself": ["src-nofollow", "dest-nofollow"], "/copy": ["copy-symlink"]}.items():
        spec["mounts"].append({"destination": path, "type": "bind", "source": str(link), "options": ["bind", *options]})
    container = box.create(spec).start()
    container.exec("true")
    assert {found.field for found in report(container.process.pid, spec) if found.verdict is not Verdict.SAME} == set()
    link.unlink()
    link.symlink_to("elsewhere")
    changed = {found.field for found in report(container.process.pid, spec) if found.verdict is Verdict.DIFFERENT}
    assert len(changed) == 2 and all(field.endswith(("/itself", "/copy")) for field in changed)
    inside = ["nsenter", "--mount", "--target", str(container.process.pid), "/bin/mount", "-t", "tmpfs", "x", "/"]
    subprocess.run(inside, check=True)
    assert "mount /" in weaker(report(container.process.pid, spec))


def test_a_file_that_replaced_the_mounts_source_is_told(box: Box) -> None:
    """A kubelet replaces files by rename; the container keeps the old one."""
    source = box.directory / "file"
    source.write_text("old")
    spec = box.spec()
    spec["mounts"].append({"destination": "/file", "type": "bind", "source": str(source), "options": ["bind"]})
    container = box.create(spec).start()
    (box.directory / "new").write_text("new")
    (box.directory / "new").rename(source)
    found = {finding.field: finding.verdict for finding in report(container.process.pid, spec)}
    assert found["mounts[5] /file"] is Verdict.DIFFERENT


def leaky_process(box: Box) -> subprocess.Popen[bytes]:
    """A process with a root of its own that holds a directory and a socket of the host."""
    program = f"""
import os, socket, sys
leak = os.open("/", os.O_RDONLY | os.O_DIRECTORY); os.set_inheritable(leak, True)
pair = socket.socketpair(); [end.set_inheritable(True) for end in pair]
os.execvp("unshare", ["unshare", "-mn", "--propagation", "private", "sh", "-c",
    "mount --rbind {box.root} {box.root} && cd {box.root} && pivot_root . tmp && exec /bin/busybox chroot . /bin/sh -c "
    "'/bin/busybox umount -l /tmp; exec /bin/sleep 1000'"])
"""
    return subprocess.Popen([sys.executable, "-c", program], close_fds=False, stdin=subprocess.DEVNULL)


def test_leaked_descriptors_are_seen(box: Box) -> None:
    process = leaky_process(box)
    try:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert process.poll() is None
        spec = box.spec()
        spec["linux"]["namespaces"] = [{"type": "mount"}, {"type": "network"}]
        del spec["hostname"]
        found = [finding for finding in report(process.pid, spec) if finding.field.startswith("descriptor ")]
        leaks = " ".join(finding.found for finding in found if finding.weaker)
        assert "/ on a mount that is not the container's" in leaks
        assert "of another network namespace" in leaks
    finally:
        process.kill()
        process.wait()


def test_the_containers_own_sockets_and_files_are_no_leak(box: Box) -> None:
    container = box.create(box.spec("sh", "-c", "exec 5</etc/passwd 6<>/dev/shm/x; sleep 1000")).start()
    container.exec("true")
    assert "descriptors" in {finding.field for finding in report(container.process.pid, container.spec.spec)}


def test_a_process_that_has_ended(box: Box) -> None:
    container = box.run("true")
    with pytest.raises(NotFound):
        report(container.process.pid, container.spec.spec)
    with pytest.raises(NotFound):
        report(2**22 + 1, container.spec.spec)


def test_a_process_that_is_ending(box: Box) -> None:
    """It has lost its namespaces and its root, and waits, not yet a zombie, for those that it takes along."""
    freezers = [mount for mount in hierarchy().mounts if mount.endswith("/freezer")]
    if not freezers:
        pytest.skip("only cgroup v1 keeps a killed process from ending")
    group = Path(freezers[0], f"{MARK}ending")
    group.mkdir()
    container = box.create(box.spec("sh", "-c", "sleep 1000 & wait")).start()
    pid = container.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text())
    child = children.read_text().split()[0]
    try:
        (group / "cgroup.procs").write_text(child)
        (group / "freezer.state").write_text("FROZEN")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}/ns/net").exists())
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        with pytest.raises(NotFound, match="it has ended"):
            report(pid, container.spec.spec)
    finally:
        (group / "freezer.state").write_text("THAWED")
        container.wait()
        group.rmdir()


def test_a_wrong_config_is_refused(full: Container) -> None:
    with pytest.raises(InvalidArgument, match="ociVersion"):
        report(full.process.pid, {})


def test_hostile_names_do_not_reach_the_terminal(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    (box.root / "\x1b[31mevil").mkdir()
    (box.root / "\x1b[31mevil/sleep").write_bytes((box.root / "bin/busybox").read_bytes())
    (box.root / "\x1b[31mevil/sleep").chmod(0o755)
    spec = box.spec("/\x1b[31mevil/sleep", "1000")
    container = box.create(spec).start()
    container.exec("true")
    config = box.directory / "config.json"
    config.write_text(json.dumps(spec))
    assert crio_oci.command(["isolation", "--pid", str(container.process.pid), "--config", str(config)]) in (0, 1)
    shown = capfd.readouterr().out
    assert "evil" in shown and "\x1b" not in shown


def test_the_command_says_it_in_json_and_by_its_exit_code(
    full: Container, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(full.spec.spec))
    words = ["--json", "--pid", str(full.process.pid), "--config", str(tmp_path)]
    assert crio_oci.command(["isolation", *words]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert {"field", "asked", "found", "verdict", "weaker"} == set(rows[0])
    asked = {**full.spec.spec, "root": {**full.spec.spec["root"], "readonly": True}}
    (tmp_path / "config.json").write_text(json.dumps(asked))
    assert crio_oci.command(["isolation", *words]) == 1
    assert [row["field"] for row in json.loads(capfd.readouterr().out) if row["weaker"]] == ["root.readonly"]
    assert crio_oci.command(["isolation", *words[1:]]) == 1
    assert "! weaker    root.readonly\tread-only\twritable" in capfd.readouterr().out


@pytest.mark.parametrize("words", [[], ["--pid", "1"], ["a", "--pid", "1"], ["--config", "x", "a"], ["--pid", "x"]])
def test_a_wrong_command_line(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert crio_oci.command(["isolation", *words]) == 1
    shown = capfd.readouterr().err
    assert shown.startswith("crio-oci: ") and shown.endswith("; see crio-oci help isolation\n")
    assert shown.count("\n") == 1


def test_crioctl_shows_a_pods_container(cri: Client, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    pod = cri.pod()
    security = {"no_new_privs": True, "masked_paths": ["/proc/keys"]}
    created = cri.create(pod, "sleep", "1000", security=security)
    with pytest.raises(SystemExit) as end:
        crioctl.main(["--socket", str(cri.daemon.socket), "isolation", created])
    assert end.value.code == 1 and "is created only" in capfd.readouterr().err
    container = cri.start(pod, "sleep", "1000", security=security)
    with pytest.raises(SystemExit) as end:
        crioctl.main(["--socket", str(cri.daemon.socket), "isolation", "--json", container])
    rows = json.loads(capfd.readouterr().out)
    assert end.value.code == 0, [row for row in rows if row["weaker"]]
    assert {row["field"]: row["found"] for row in rows}["linux.maskedPaths /proc/keys"] == "the null device"
    cri.call("StopContainer", container_id=container, timeout=0)
    with pytest.raises(SystemExit) as end:
        crioctl.main(["--socket", str(cri.daemon.socket), "isolation", container])
    assert end.value.code == 1 and "not running" in capfd.readouterr().err
