"""What a container made by the built-in executor is kept from, as seen from inside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crio_native.errors import StepFailed
from crio_native.linux import capabilities
from crio_native.oci import seccomp_profile
from crio_native.oci.runtime import UserRequest

from .conftest import CAPABILITIES, Box, status_of

pytestmark = pytest.mark.root


def test_namespaces_are_its_own(box: Box) -> None:
    container = box.create(box.spec())
    for kind in ("pid", "net", "ipc", "uts", "mnt", "cgroup"):
        inside, outside = (os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (container.process.pid, "self"))
        assert inside != outside, kind
    assert os.readlink(f"/proc/{container.process.pid}/ns/user") == os.readlink("/proc/self/ns/user")


def test_a_namespace_that_is_not_asked_for_is_the_hosts(box: Box) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"] = [{"type": "mount"}]
    del spec["hostname"]
    container = box.create(spec)
    for kind in ("pid", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{container.process.pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")


def test_a_namespace_is_joined_by_path(box: Box) -> None:
    first = box.create(box.spec())
    spec = box.spec()
    names = {"network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid"}
    spec["linux"]["namespaces"] = [{"type": "mount"}] + [
        {"type": kind, "path": f"/proc/{first.process.pid}/ns/{name}"} for kind, name in names.items()
    ]
    second = box.create(spec)
    for name in names.values():
        assert os.readlink(f"/proc/{second.process.pid}/ns/{name}") == os.readlink(
            f"/proc/{first.process.pid}/ns/{name}"
        )


def test_capabilities_are_exactly_those_asked_for(box: Box) -> None:
    spec = box.spec("cat", "/proc/self/status")
    spec["process"]["capabilities"]["ambient"] = ["CAP_KILL"]
    spec["process"]["capabilities"]["inheritable"] = ["CAP_KILL"]
    status = status_of(box.run(spec=spec).output())
    mask = capabilities.mask(CAPABILITIES)
    kill = capabilities.mask(["CAP_KILL"])
    found = {name: int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    assert found == {"Inh": kill, "Prm": mask, "Eff": mask, "Bnd": mask, "Amb": kill}


def test_who_waits_in_a_container_shows_no_path_of_the_host(box: Box) -> None:
    container = box.create(box.spec("true"))
    assert Path(f"/proc/{container.process.pid}/cmdline").read_bytes() == b"crio-launcher\0"
    container.start().wait()


def test_inheritable_capabilities_default_to_none(box: Box) -> None:
    """CVE-2022-29162: a file with inheritable file capabilities must not raise a user's."""
    status = status_of(box.run("cat", "/proc/self/status").output())
    assert int(status["CapInh"], 16) == 0 and int(status["CapAmb"], 16) == 0


def test_a_user_keeps_no_capabilities(box: Box) -> None:
    spec = box.spec("cat", "/proc/self/status")
    spec["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [5, 6]}
    status = status_of(box.run(spec=spec).output())
    assert status["Uid"].split() == ["1000"] * 4 and status["Groups"].split() == ["5", "6"]
    assert int(status["CapEff"], 16) == 0 and int(status["CapPrm"], 16) == 0


def test_no_new_privileges(box: Box) -> None:
    spec = box.spec("cat", "/proc/self/status")
    assert status_of(box.run(spec=spec).output())["NoNewPrivs"] == "1"
    spec["process"]["noNewPrivileges"] = False
    assert status_of(box.run(spec=spec).output())["NoNewPrivs"] == "0"


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_seccomp_filter_is_loaded(box: Box, no_new_privileges: bool) -> None:
    spec = box.spec("sh", "-c", "grep Seccomp: /proc/self/status; mkdir /tmp/x; echo $?")
    spec["process"]["noNewPrivileges"] = no_new_privileges
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    }
    container = box.run(spec=spec)
    assert container.output() == "Seccomp:\t2\n1\n"
    assert "Function not implemented" in container.output("stderr")


def test_runtime_default_profile_serves_an_ordinary_command(box: Box) -> None:
    spec = box.spec("sh", "-c", "echo hello; mount -t tmpfs x /tmp")
    profile = seccomp_profile.load_profile(Path(__file__).parents[2] / "conf/seccomp.json")
    spec["linux"]["seccomp"] = seccomp_profile.resolve(profile, set(CAPABILITIES))
    container = box.run(spec=spec)
    assert container.output() == "hello\n"
    assert "not permitted" in container.output("stderr") or "denied" in container.output("stderr")


def test_no_descriptor_of_ours_is_inherited(box: Box) -> None:
    """CVE-2024-21626: a descriptor of a host directory is a way out."""
    listed = box.run("sh", "-c", "ls -l /proc/self/fd").output()
    names = {line.split()[8] for line in listed.splitlines() if "->" in line}
    assert {"0", "1", "2"} <= names <= {"0", "1", "2", "3"}  # 3 is the directory that ls reads
    assert "/dev/null" in listed


def test_standard_input_is_the_containers_own_null_device(box: Box) -> None:
    """Through a descriptor of the host's /dev/null, root inside could change its mode."""
    before = os.stat("/dev/null").st_mode
    container = box.run("sh", "-c", "stat -L -c %d:%i /proc/self/fd/0 /dev/null; chmod 0 /proc/self/fd/0")
    inside = container.output().split()
    assert inside[0] == inside[1]
    assert os.stat("/dev/null").st_mode == before


def test_working_directory_outside_the_root_is_refused(box: Box) -> None:
    for number in (3, 4, 5, 6, 7, 8):
        spec = box.spec("cat", "etc/shadow")
        spec["process"]["cwd"] = f"/proc/self/fd/{number}"
        with pytest.raises(StepFailed, match=r"make_working_directory|change_directory"):
            box.create(spec)


def test_masked_paths_show_nothing(box: Box) -> None:
    spec = box.spec("sh", "-c", "cat /proc/keys; ls /sys/firmware; echo x > /sys/firmware/x; echo $?")
    assert box.run(spec=spec).output() == "1\n"


def test_masking_cannot_reach_the_hosts_null_device(box: Box) -> None:
    before = os.stat("/dev/null").st_mode
    spec = box.spec("sh", "-c", "chmod 0 /proc/keys")
    spec["process"]["capabilities"] = {kind: ["CAP_FOWNER"] for kind in ("bounding", "effective", "permitted")}
    assert box.run(spec=spec).wait().code == 1
    assert os.stat("/dev/null").st_mode == before


def test_read_only_paths(box: Box) -> None:
    spec = box.spec("sh", "-c", "echo other > /proc/sys/kernel/hostname")
    container = box.run(spec=spec)
    assert container.wait().code == 1 and "Read-only" in container.output("stderr")


def test_read_only_root(box: Box) -> None:
    spec = box.spec("sh", "-c", "touch /x; touch /dev/shm/y && echo fine")
    spec["root"]["readonly"] = True
    container = box.run(spec=spec)
    assert "Read-only" in container.output("stderr") and container.output() == "fine\n"
    assert not (box.root / "x").exists()


def test_default_devices(box: Box) -> None:
    listed = box.run("ls", "-l", "/dev").output()
    devices = {line.split()[-1]: line.split()[4:6] for line in listed.splitlines() if line.startswith("c")}
    assert devices == {
        "null": ["1,", "3"],
        "zero": ["1,", "5"],
        "full": ["1,", "7"],
        "random": ["1,", "8"],
        "urandom": ["1,", "9"],
        "tty": ["5,", "0"],
    }
    assert "fd -> /proc/self/fd" in listed and "ptmx -> pts/ptmx" in listed


def test_asked_devices(box: Box) -> None:
    spec = box.spec("stat", "-c", "%A %u %g %t:%T", "/dev/net/tun", "/dev/pipe")
    spec["linux"]["devices"] = [
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 7, "gid": 8},
        {"path": "/dev/pipe", "type": "p"},
    ]
    assert box.run(spec=spec).output() == "crw-r----- 7 8 a:c8\nprw-rw-rw- 0 0 0:0\n"


def test_sysctls_of_its_namespaces(box: Box) -> None:
    path = Path("/proc/sys/kernel/msgmax")
    before = path.read_text()
    spec = box.spec("cat", "/proc/sys/kernel/msgmax", "/proc/sys/net/ipv4/ip_default_ttl")
    spec["linux"]["sysctl"] = {"kernel.msgmax": "9000", "net/ipv4/ip_default_ttl": "33"}
    assert box.run(spec=spec).output() == "9000\n33\n"
    assert path.read_text() == before


def test_limits_umask_and_score(box: Box) -> None:
    spec = box.spec("sh", "-c", "ulimit -Sn; ulimit -Hn; umask; cat /proc/self/oom_score_adj")
    spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]
    spec["process"]["user"]["umask"] = 0o27
    spec["process"]["oomScoreAdj"] = 500
    assert box.run(spec=spec).output() == "100\n200\n0027\n500\n"


def test_the_environment_is_exactly_what_was_asked_for(box: Box) -> None:
    spec = box.spec("env")
    spec["process"]["env"] = ["PATH=/bin", "A=1", "B=x=y", "A=2", "HOME=/h"]
    assert set(box.run(spec=spec).output().split()) == {"PATH=/bin", "A=2", "B=x=y", "HOME=/h"}


@pytest.mark.parametrize(("uid", "given", "home"), [(33, [], "/var/www"), (33, ["HOME="], "/var/www"), (7, [], "/")])
def test_home_comes_from_the_passwd_file_when_it_is_not_given(box: Box, uid: int, given: list[str], home: str) -> None:
    spec = box.spec("sh", "-c", "echo $HOME")
    spec["process"]["env"] = ["PATH=/bin", *given]
    spec["process"]["user"] = {"uid": uid, "gid": uid}
    assert box.run(spec=spec).output().strip() == home


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (UserRequest(), "uid=0(root) gid=0(root) groups=0(root)"),
        (UserRequest("web"), "uid=33(web) gid=44(web) groups=44(web),99(extra)"),
        (UserRequest("33"), "uid=33(web) gid=44(web) groups=44(web),99(extra)"),
        (UserRequest("web:extra"), "uid=33(web) gid=99(extra) groups=99(extra)"),
        (UserRequest("web", supplementary=[7], merge=False), "uid=33(web) gid=44(web) groups=7,44(web)"),
        (UserRequest("12345"), "uid=12345 gid=0(root) groups=0(root)"),
        (UserRequest("12345", "6"), "uid=12345 gid=6 groups=6"),
    ],
)
def test_users_by_name_and_number(box: Box, request_: UserRequest, shown: str) -> None:
    assert box.run("id", user=request_).output().strip() == shown


def test_home_comes_from_the_images_passwd(box: Box) -> None:
    assert box.run("sh", "-c", "echo $HOME", user=UserRequest("web")).output() == "/var/www\n"


def test_exec_runs_in_the_container_with_its_own_credentials(box: Box) -> None:
    container = box.create(box.spec()).start()
    code, text = container.exec("sh", "-c", "hostname; echo $$; cat /proc/self/status; exit 7")
    assert code == 7 and text.startswith("box\n")
    status = status_of(text)
    assert int(status["CapBnd"], 16) == capabilities.mask(CAPABILITIES) and status["NoNewPrivs"] == "1"
    code, text = container.exec("ls", "-l", "/proc/self/fd")
    assert {line.split()[8] for line in text.splitlines() if "->" in line} <= {"0", "1", "2", "3"}
    assert "/dev/null" in text


def test_exec_sees_the_containers_processes_only(box: Box) -> None:
    container = box.create(box.spec()).start()
    _, text = container.exec("sh", "-c", "ls /proc | grep -c '^[0-9]'")
    assert int(text) <= 4  # the init, the shell, ls and grep
