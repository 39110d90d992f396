"""Containers in user namespaces, new and joined, and in time namespaces."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux import capabilities, trees
from crio_native.oci.builtin import launchers as warm
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.runtime import Overlay

from ..machine import Machine
from .conftest import PARENT, Box, status_of

pytestmark = pytest.mark.root

OWN = [{"containerID": 0, "hostID": 100000, "size": 65536}]
NODES_ARE_MADE = trees.HAVE_TREES and trees.HAVE_FSOPEN  # else the host's own are bound


def in_user_namespace(box: Box, *args: str, **linux: Any) -> dict[str, Any]:
    spec = box.spec(*args)
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"] |= {"uidMappings": OWN, "gidMappings": OWN, **linux}
    if not trees.HAVE_TREES:  # see test_builtin_fallbacks: the init has to find the root by its path
        box.directory.chmod(0o711)
    subprocess.run(["chown", "-R", "--no-dereference", "100000:100000", str(box.root)], check=True)
    return spec


def private(path: Path) -> Path:
    """A directory that the container's root may not search, as the kubelet's are."""
    path.mkdir(mode=0o700)
    return path


def test_it_has_the_mappings_and_owns_its_namespaces(box: Box) -> None:
    spec = in_user_namespace(box, "sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; id -u; echo $$; hostname")
    container = box.run(spec=spec)
    lines = container.output().splitlines()
    assert [line.split() for line in lines[:2]] == [["0", "100000", "65536"]] * 2
    assert lines[2:] == ["0", "1", "box"]


SLOW = """
import sys, time
sys.path += sys.argv[3:]
from crio_native.linux import syscalls
clone3 = syscalls.clone3
def slow(flags, **more):
    pid = clone3(flags, **more)
    if pid and flags & syscalls.CLONE_PARENT and not flags & syscalls.CLONE_VM:
        time.sleep(0.2)
    return pid
syscalls.clone3 = slow
from crio_native.oci.builtin.launcher import main
main()
"""


def test_the_parent_hears_of_the_init_before_the_init_has_a_word(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who bears it may take its time to tell."""
    monkeypatch.setattr(warm, "BOOT", SLOW)
    launchers, usual = Launchers(1), box.runtime
    launchers.start()
    try:
        box.runtime = BuiltinRuntime(launchers)
        assert box.run(spec=in_user_namespace(box, "id", "-u")).output() == "0\n"
        box.remove_containers()
    finally:
        box.runtime = usual
        launchers.stop()


def test_a_root_that_is_moved_and_not_pivoted_to(box: Box) -> None:
    """For a user namespace it lies on "/" before that, and cannot be moved onto itself."""
    box.runtime = BuiltinRuntime(box.runtime._launchers, pivot=False)
    script = "id -u; touch /new; ls -d /new /proc/1; cut -d' ' -f5 /proc/self/mountinfo; ls -d /root /../etc"
    said = box.run(spec=in_user_namespace(box, "sh", "-c", script)).output().split()
    assert said[:3] == ["0", "/new", "/proc/1"] and str(box.directory) not in said
    assert said[3:].count("/") == 1 and (box.root / "new").stat().st_uid == 100000


def test_namespaces_are_all_new_and_the_init_is_nobody_outside(box: Box) -> None:
    container = box.create(in_user_namespace(box))
    for kind in ("pid", "net", "ipc", "uts", "mnt", "cgroup", "user"):
        assert not os.path.samestat(
            os.stat(f"/proc/{container.process.pid}/ns/{kind}"), os.stat(f"/proc/self/ns/{kind}")
        ), kind
    status = status_of(Path(f"/proc/{container.process.pid}/status").read_text())
    assert status["Uid"].split() == ["100000"] * 4 and status["Gid"].split() == ["100000"] * 4
    assert status["Groups"].split() == []


def test_its_capabilities_are_those_asked_for(box: Box) -> None:
    spec = in_user_namespace(box, "cat", "/proc/self/status")
    asked = ["CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN"]  # one of them this machine's root may not have
    spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), asked)
    status = status_of(box.run(spec=spec).output())
    assert {int(status[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Bnd")} == {capabilities.mask(asked)}


def test_it_has_its_own_proc_sys_and_queues(box: Box) -> None:
    spec = in_user_namespace(
        box, "sh", "-c", "ls /proc | grep -c '^[0-9]'; ls /sys/class/net; touch /dev/mqueue/q && echo q"
    )
    spec["mounts"].append({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]})
    lines = box.run(spec=spec).output().splitlines()
    assert int(lines[0]) <= 4
    assert lines[1:] == ["lo", "q"]


def test_the_hosts_network_and_processes_are_shown_where_they_are_shared(box: Box) -> None:
    """A new procfs and sysfs are refused there: the host's are bound."""
    spec = in_user_namespace(box, "sh", "-c", "ls /sys/class/net; test -d /proc/$PPID && echo same; mkdir /sys/x")
    spec["linux"]["namespaces"] = [{"type": kind} for kind in ("mount", "ipc", "uts", "user")]
    spec["linux"]["readonlyPaths"], spec["linux"]["maskedPaths"] = [], []
    container = box.run(spec=spec)
    assert container.output().splitlines() == [*sorted(os.listdir("/sys/class/net")), "same"]
    assert container.output("stderr")


def test_the_hosts_sysfs_is_read_only_with_all_that_is_mounted_below(box: Box) -> None:
    spec = in_user_namespace(box, "cat", "/proc/self/mountinfo")
    spec["linux"]["namespaces"].remove({"type": "network"})
    rows = [line.split() for line in box.run(spec=spec).output().splitlines()]
    below = [row for row in rows if row[4].startswith("/sys")]
    assert len(below) > 1 and all({"ro", "nosuid", "nodev", "noexec"} <= set(row[5].split(",")) for row in below)


def test_devices_are_the_hosts_and_work(box: Box) -> None:
    listing = "stat -c '%n %t:%T %u' /dev/null /dev/zero /dev/net/tun; head -c 3 /dev/zero | wc -c"
    spec = in_user_namespace(
        box, "sh", "-c", listing + "; echo x > /dev/null && echo fine; test -p /dev/pipe && echo pipe"
    )
    spec["linux"]["devices"] = [
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
        {"path": "/dev/pipe", "type": "p"},
    ]
    lines = box.run(spec=spec).output().splitlines()
    tun = "0" if NODES_ARE_MADE else "65534"
    assert lines == ["/dev/null 1:3 65534", "/dev/zero 1:5 65534", f"/dev/net/tun a:c8 {tun}", "3", "fine", "pipe"]


@pytest.mark.parametrize(("path", "number"), [("/dev/no-such", 5), ("/dev/zero", 3)])
def test_a_device_that_the_host_has_not_is_made(box: Box, path: str, number: int) -> None:
    """By the host's root, owned as asked by a user of the namespace, who can use it; nothing of the host is covered."""
    look = f"stat -c '%t:%T %a %u %g' {path}; head -c 3 {path} | wc -c; cat /proc/self/mountinfo"
    spec = in_user_namespace(box, "sh", "-c", look)
    asked = {"path": path, "type": "c", "major": 1, "minor": number, "fileMode": 0o640, "uid": 10, "gid": 0}
    spec["linux"]["devices"] = [asked]
    if not NODES_ARE_MADE:
        with pytest.raises(StepFailed, match=f"prepare_devices.*{path}.*host"):
            box.create(spec)
        return
    lines = box.run(spec=spec).output().splitlines()
    assert lines[:2] == [f"1:{number} 640 10 0", "3" if number == 5 else "0"]
    mount = next(line for line in lines if f" {path} " in line).split()
    roots = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == "/"]
    assert {"nosuid", "noexec"} <= set(mount[5].split(",")) and len(roots) == 1


@pytest.mark.parametrize(("field", "value"), [("major", 4096), ("minor", 1 << 20)])
def test_a_device_number_that_no_kernel_has_is_refused(box: Box, field: str, value: int) -> None:
    spec = in_user_namespace(box)
    spec["linux"]["devices"] = [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3} | {field: value}]
    with pytest.raises(InvalidArgument, match=rf"linux.devices\[0\].{field}"):
        box.create(spec)


def test_volumes_that_only_the_hosts_root_reaches(box: Box) -> None:
    directory = private(box.directory / "private")
    (directory / "volume").mkdir(mode=0o777)
    (directory / "volume").chmod(0o777)
    (directory / "file").write_text("text\n")
    spec = in_user_namespace(box, "sh", "-c", "touch /data/new; cat /file; touch /ro/x")
    for target, name, options in (("/data", "volume", []), ("/file", "file", []), ("/ro", "volume", ["ro"])):
        spec["mounts"].append(
            {"destination": target, "type": "bind", "source": str(directory / name), "options": ["rbind", *options]}
        )
    container = box.run(spec=spec)
    assert container.output() == "text\n"
    assert "Read-only" in container.output("stderr")
    assert (directory / "volume/new").stat().st_uid == 100000


@pytest.mark.parametrize("writable", [True, False])
def test_an_overlay_that_only_the_hosts_root_reaches(box: Box, writable: bool) -> None:
    directory = private(box.directory / "store")
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir()
    os.chown(directory / "upper", 100000, 100000)
    spec = in_user_namespace(box, "sh", "-c", "touch /new; stat -c %u /new /bin/busybox")
    (box.directory / "rootfs").rename(directory / "layer")
    box.root = directory / "layer"
    spec["root"]["path"] = str(directory / "merged")
    upper, work = (str(directory / "upper"), str(directory / "work")) if writable else ("", "")
    lowers = ["layer"] if writable else ["layer", "upper"]  # an overlay of one layer alone is no overlay
    overlay = Overlay(str(directory), lowers, upper, work)
    container = box.run(spec=spec, overlay=overlay)
    if writable:
        assert container.output() == "0\n0\n"
        assert (directory / "upper/new").stat().st_uid == 100000
    else:
        assert container.output() == "0\n" and "Read-only" in container.output("stderr")
    with open("/proc/self/mountinfo") as file:
        assert str(directory) not in file.read()


def test_read_only_root_masks_and_working_directory(box: Box) -> None:
    spec = in_user_namespace(box, "sh", "-c", "pwd; touch /x; cat /proc/keys; echo 1 > /proc/sys/kernel/msgmax")
    spec["root"]["readonly"] = True
    spec["process"]["cwd"] = "/tmp/made"
    container = box.run(spec=spec)
    assert container.output() == "/tmp/made\n"
    assert container.output("stderr").count("Read-only") == 2


def test_sysctls_of_its_namespaces(box: Box) -> None:
    spec = in_user_namespace(
        box, "cat", "/proc/sys/kernel/msgmax", "/proc/sys/net/ipv4/ip_default_ttl", "/proc/sys/kernel/domainname"
    )
    values = {"kernel.msgmax": "9000", "net.ipv4.ip_default_ttl": "33", "kernel.domainname": "example"}
    spec["linux"]["sysctl"] = values
    assert box.run(spec=spec).output() == "9000\n33\nexample\n"


def test_limits_and_scores_that_need_the_hosts_root(box: Box) -> None:
    spec = in_user_namespace(box, "sh", "-c", "ulimit -Hn; ulimit -Sn; cat /proc/self/oom_score_adj")
    spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128}]
    spec["process"]["oomScoreAdj"] = 321
    assert box.run(spec=spec).output() == "128\n64\n321\n"


def test_standard_output_can_be_opened_by_a_user(box: Box) -> None:
    spec = in_user_namespace(box, "sh", "-c", "echo text > /dev/stdout; id -u")
    spec["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [7]}
    assert box.run(spec=spec).output() == "text\n1000\n"


def test_a_terminal(box: Box) -> None:
    spec = in_user_namespace(box, "sh", "-c", "test -t 0 && test -c /dev/console && echo tty")
    spec["process"]["terminal"] = True
    assert box.run(spec=spec).output() == "tty\n" or box.run(spec=spec).output() == "tty\r\n"


def test_a_control_group_is_shown(box: Box) -> None:
    spec = in_user_namespace(
        box, "sh", "-c", "ls /sys/fs/cgroup | head -1 | wc -l; cat /proc/self/cgroup", cgroupsPath=f"{PARENT}/u"
    )
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro", "nosuid"]})
    lines = box.run(spec=spec).output().splitlines()
    assert lines[0] == "1" and all(line.endswith(":/") for line in lines[1:])


def test_exec_enters_it(box: Box) -> None:
    container = box.create(in_user_namespace(box)).start()
    code, text = container.exec("sh", "-c", "id -u; cat /proc/self/uid_map; touch /made; cat /proc/self/status")
    assert code == 0 and text.splitlines()[0] == "0" and text.splitlines()[1].split() == ["0", "100000", "65536"]
    assert (box.root / "made").stat().st_uid == 100000
    status = status_of(text)
    assert int(status["CapEff"], 16) == capabilities.mask(container.spec.spec["process"]["capabilities"]["effective"])
    code, text = container.exec("id", "-u", user={"uid": 5, "gid": 6})
    assert text == "5\n"


def test_exec_raises_a_limit(box: Box) -> None:
    container = box.create(in_user_namespace(box)).start()
    _, text = container.exec("sh", "-c", "ulimit -Hn", rlimits=[{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 300}])
    assert text == "300\n"


@pytest.fixture
def pinned(box: Box) -> Iterator[dict[str, str]]:
    """A pod's namespaces, owned by its user namespace, each at a path."""
    pod = subprocess.Popen(
        ["unshare", "--user", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "sleep", "1000"],
        stdout=subprocess.DEVNULL,
    )
    child = ""
    while not child:
        child = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().strip()
    for kind in ("uid", "gid"):
        Path(f"/proc/{pod.pid}/{kind}_map").write_text("0 100000 65536")
    names = {"user": "user", "network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid"}
    yield {kind: f"/proc/{child}/ns/{name}" for kind, name in names.items()}
    pod.kill()
    pod.wait()


@pytest.mark.parametrize("mappings", [OWN, []])
def test_a_pods_namespaces_are_joined(box: Box, pinned: dict[str, str], mappings: list[Any]) -> None:
    spec = in_user_namespace(box, "sh", "-c", "id -u; cat /proc/self/uid_map; ls /sys/class/net; echo $$")
    spec["linux"]["namespaces"] = [{"type": "mount"}, *({"type": kind, "path": path} for kind, path in pinned.items())]
    spec["linux"] |= {"uidMappings": mappings, "gidMappings": mappings}
    del spec["hostname"]
    container = box.create(spec)
    for path in pinned.values():
        name = path.rpartition("/")[2]
        assert os.path.samestat(os.stat(path), os.stat(f"/proc/{container.process.pid}/ns/{name}")), name
    container.start().wait()
    lines = container.output().splitlines()
    assert lines[0] == "0" and lines[1].split()[1] == "100000" and lines[2] == "lo" and int(lines[3]) > 1


def test_namespaces_of_the_host_are_joined_from_a_new_user_namespace(box: Box) -> None:
    """A pod's network namespace may well have been made outside."""
    other = box.create(box.spec())
    spec = in_user_namespace(box, "sh", "-c", "ls /sys/class/net")
    path = f"/proc/{other.process.pid}/ns/net"
    spec["linux"]["namespaces"] = [
        entry if entry["type"] != "network" else {**entry, "path": path} for entry in spec["linux"]["namespaces"]
    ]
    container = box.create(spec)
    assert os.path.samestat(os.stat(path), os.stat(f"/proc/{container.process.pid}/ns/net"))


def test_our_own_user_namespace_by_its_path(box: Box) -> None:
    spec = box.spec("sh", "-c", "id -u; echo $$; stat -c %u /dev/null")
    spec["linux"]["namespaces"].append({"type": "user", "path": f"/proc/{os.getpid()}/ns/user"})
    assert box.run(spec=spec).output() == "0\n1\n0\n"


def test_what_is_no_user_namespace_is_not_entered(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"].append({"type": "user", "path": "/etc/passwd"})
    with pytest.raises(StepFailed, match=r"step 'user_namespace' failed on /etc/passwd.*not a namespace"):
        box.create(spec)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"uidMappings": []}, "linux.uidMappings"),
        ({"gidMappings": []}, "linux.gidMappings"),
        ({"uidMappings": [{"containerID": 1, "hostID": 1, "size": 1}]}, "linux.uidMappings"),
        ({"uidMappings": [{"containerID": 0, "hostID": 2**32 - 2, "size": 2}]}, r"linux.uidMappings\[0\].size"),
        ({"uidMappings": OWN * 2}, "linux.uidMappings"),
        ({"uidMappings": [{"containerID": n, "hostID": n, "size": 1} for n in range(341)]}, "linux.uidMappings"),
        ({"uidMappings": [{"containerID": 0, "hostID": 0, "size": 0}]}, r"linux.uidMappings\[0\].size"),
    ],
)
def test_mappings_that_cannot_be(box: Box, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}"):
        box.create(in_user_namespace(box, **change))


def test_a_user_outside_the_mappings_is_refused(box: Box) -> None:
    spec = in_user_namespace(box)
    spec["process"]["user"] = {"uid": 70000, "gid": 0}
    with pytest.raises(InvalidArgument, match=r"^process.user.uid: is not mapped"):
        box.create(spec)


def test_a_failure_after_the_second_birth_leaves_nothing(box: Box, leaks: Machine) -> None:
    spec = in_user_namespace(box)
    spec["mounts"].append({"destination": "/x", "type": "nosuchfs", "source": "x"})
    with pytest.raises(StepFailed, match=r"step 'mount' failed on /x with ENODEV"):
        box.create(spec)


def test_time_offsets(box: Box) -> None:
    spec = box.spec("sh", "-c", "cat /proc/uptime /proc/self/timens_offsets")
    spec["linux"]["namespaces"].append({"type": "time"})
    spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10**7}, "monotonic": {"secs": -1, "nanosecs": 5}}
    lines = box.run(spec=spec).output().splitlines()
    assert float(lines[0].split()[0]) > 10**7
    assert {line.split()[0]: line.split()[1:] for line in lines[1:]} == {
        "monotonic": ["-1", "5"],
        "boottime": [str(10**7), "0"],
    }


def test_time_offsets_in_a_user_namespace_and_for_an_exec(box: Box) -> None:
    spec = in_user_namespace(box, "sleep", "1000", timeOffsets={"boottime": {"secs": 10**7}})
    spec["linux"]["namespaces"].append({"type": "time"})
    container = box.create(spec).start()
    _, text = container.exec("cat", "/proc/uptime")
    assert float(text.split()[0]) > 10**7


def test_a_time_namespace_is_joined(box: Box) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"].append({"type": "time"})
    spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10**7}}
    first = box.create(spec)
    spec = box.spec("cat", "/proc/uptime")
    spec["linux"]["namespaces"].append({"type": "time", "path": f"/proc/{first.process.pid}/ns/time"})
    assert float(box.run(spec=spec).output().split()[0]) > 10**7


@pytest.mark.parametrize(
    ("offsets", "namespace", "field"),
    [
        ({"boottime": {"secs": 1}}, False, "linux.timeOffsets"),
        ({"realtime": {"secs": 1}}, True, "linux.timeOffsets.realtime"),
        ({"boottime": {"secs": "1"}}, True, "linux.timeOffsets.boottime.secs"),
        ({"boottime": {"nanosecs": 10**9}}, True, "linux.timeOffsets.boottime.nanosecs"),
    ],
)
def test_time_offsets_that_cannot_be(box: Box, offsets: dict[str, Any], namespace: bool, field: str) -> None:
    spec = box.spec()
    spec["linux"]["timeOffsets"] = offsets
    if namespace:
        spec["linux"]["namespaces"].append({"type": "time"})
    with pytest.raises(InvalidArgument, match=f"^{field}:"):
        box.create(spec)


def test_a_clock_before_its_start_is_refused(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"].append({"type": "time"})
    spec["linux"]["timeOffsets"] = {"boottime": {"secs": -(10**8)}}
    with pytest.raises(StepFailed, match=r"new_time_namespace.*timens_offsets"):
        box.create(spec)
