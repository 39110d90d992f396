"""What a container is given, as seen from inside: user, environment, capabilities, mounts, devices, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root


def shell(cri: Client, script: str, **fields: Any) -> str:
    """The output of a script in a container of a pod of its own; the script must succeed."""
    code, output = cri.run("sh", "-c", script, **fields)
    assert code == 0, output
    return output


def test_command_and_environment(cri: Client) -> None:
    config = cri.container_config(
        "sh", args=["-c", 'echo "$0 $1 $GREETING $PATH"; pwd', "zero", "one"], working_dir="/var/new",
        envs=[pb.KeyValue(key="GREETING", value="h\xe9 \"q\"".encode("latin-1"))],
    )  # fmt: skip
    pod = cri.pod()
    container = cri.start(pod, config=config)
    status = cri.ended(container)
    output = Path(status.log_path).read_bytes()
    assert status.exit_code == 0
    assert b'zero one h\xe9 "q" /bin' in output and b"/var/new" in output


def test_users(cri: Client) -> None:
    by_number = {"run_as_user": pb.Int64Value(value=1234), "run_as_group": pb.Int64Value(value=99)}
    assert shell(cri, "id -u; id -g; id -G", security={**by_number, "supplemental_groups": [7]}) == "1234\n99\n99 7\n"
    assert shell(cri, "id -un; id -gn; echo $HOME", security={"run_as_username": "nobody"}) == "nobody\nnogroup\n/\n"
    assert shell(cri, "cd /root 2>/dev/null || echo no", security={"run_as_username": "nobody"}) == "no\n"


def test_status_tells_the_user(cri: Client) -> None:
    pod = cri.pod()
    security = {"run_as_user": pb.Int64Value(value=65534), "supplemental_groups": [3, 5]}
    user = cri.status(cri.start(pod, "sleep", "60", security=security)).user.linux
    assert (user.uid, user.gid, sorted(user.supplemental_groups)) == (65534, 65534, [3, 5, 65534])


def capabilities(output: str) -> dict[str, int]:
    return {line.split(":")[0]: int(line.split()[1], 16) for line in output.splitlines()}


def test_capabilities(cri: Client) -> None:
    script = "grep ^Cap /proc/self/status"
    plain = capabilities(shell(cri, script))
    assert plain["CapEff"] == plain["CapBnd"] == plain["CapPrm"] == 0x5FB
    assert plain["CapInh"] == plain["CapAmb"] == 0
    changed = pb.Capability(add_capabilities=["NET_RAW"], drop_capabilities=["cap_kill"])
    assert capabilities(shell(cri, script, security={"capabilities": changed}))["CapEff"] == 0x5FB & ~(1 << 5) | 1 << 13
    none = pb.Capability(drop_capabilities=["ALL"], add_capabilities=["CHOWN"])
    assert capabilities(shell(cri, script, security={"capabilities": none}))["CapBnd"] == 1
    user = {"run_as_user": pb.Int64Value(value=1000)}
    assert capabilities(shell(cri, script, security=user))["CapEff"] == 0
    ambient = pb.Capability(add_ambient_capabilities=["NET_BIND_SERVICE"])
    held = capabilities(shell(cri, script, security={**user, "capabilities": ambient}))
    assert held["CapEff"] == held["CapAmb"] == 1 << 10


def test_seccomp_and_no_new_privileges(cri: Client) -> None:
    script = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; unshare -r true 2>/dev/null || echo refused"
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    output = shell(cri, script, security={"no_new_privs": True, "seccomp": default})
    assert "NoNewPrivs:\t1" in output and "Seccomp:\t2" in output and "refused" in output
    free = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    assert "Seccomp:\t0" in shell(cri, script, security={"seccomp": free})
    assert "Seccomp:\t0" in shell(cri, script, security={"seccomp_profile_path": "unconfined"})
    assert "Seccomp:\t2" in shell(cri, script, security={"seccomp_profile_path": "runtime/default"})
    assert "Seccomp:\t0" in shell(cri, script)


def test_a_local_seccomp_profile(cri: Client) -> None:
    path = cri.daemon.directory / "no-mkdir.json"
    rule = '{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}'
    path.write_text(f'{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}')
    local = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(path))
    script = "mkdir /tmp/x 2>&1 || true"
    assert "not supported" in shell(cri, script, security={"seccomp": local})
    assert "not supported" in shell(cri, script, security={"seccomp_profile_path": f"localhost/{path}"})


def test_hidden_paths(cri: Client) -> None:
    assert (
        shell(cri, "cat /proc/interrupts | wc -c; echo 1 2>/dev/null > /proc/sys/vm/drop_caches || echo ro")
        == "0\nro\n"
    )
    security = {"masked_paths": ["/etc/passwd"], "readonly_paths": ["/tmp"]}
    assert shell(cri, "wc -c < /etc/passwd; touch /tmp/x 2>/dev/null || echo ro", security=security) == "0\nro\n"


def test_a_read_only_root(cri: Client) -> None:
    script = "touch /x 2>/dev/null || echo ro; touch /dev/shm/y && echo shm; touch /etc/hosts 2>/dev/null || echo ro"
    assert shell(cri, script, security={"readonly_rootfs": True}) == "ro\nshm\nro\n"


def test_a_privileged_container(cri: Client) -> None:
    pod = cri.pod(privileged=True)
    script = "grep CapEff /proc/self/status; grep Seccomp: /proc/self/status; mount -t tmpfs none /tmp && echo mounted"
    code, output = cri.run("sh", "-c", script, pod=pod, security={"privileged": True})
    assert code == 0 and "mounted" in output and "Seccomp:\t0" in output
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "privileged"):
        cri.create(cri.pod(), "true", security={"privileged": True})


def test_mounts(cri: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("data\n")
    mounts = [
        pb.Mount(host_path=str(tmp_path), container_path="/data"),
        pb.Mount(host_path=str(tmp_path), container_path="/data/ro", readonly=True),
        pb.Mount(host_path=str(tmp_path / "file"), container_path="/etc/hosts"),
    ]
    (tmp_path / "ro").mkdir()
    script = "cat /data/file /etc/hosts; echo new > /data/made; touch /data/ro/x 2>/dev/null || echo refused"
    assert shell(cri, script, mounts=mounts) == "data\ndata\nrefused\n"
    assert (tmp_path / "made").read_text() == "new\n"


def test_a_recursive_read_only_mount(cri: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    mount = pb.Mount(host_path=str(tmp_path), container_path="/data", readonly=True, recursive_read_only=True)
    assert shell(cri, "touch /data/x 2>/dev/null || echo refused", mounts=[mount]) == "refused\n"
    mount.readonly = False
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].recursive_read_only"):
        cri.create(cri.pod(), "true", mounts=[mount])


def test_an_absent_mount_source_is_made(cri: Client, tmp_path: Path) -> None:
    source = tmp_path / "not" / "yet"
    shell(cri, "touch /data/x", mounts=[pb.Mount(host_path=str(source), container_path="/data")])
    assert (source / "x").exists()


def test_the_dev_directory(cri: Client) -> None:
    output = shell(
        cri,
        "ls /dev; echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c1 /dev/sda 2>&1; true",
    )
    names = set(output.split())
    assert {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm", "mqueue", "fd"} <= names
    assert not {name for name in names if name.startswith(("sd", "vd", "mem", "kmsg"))}


def test_a_device(cri: Client) -> None:
    device = pb.Device(host_path="/dev/null", container_path="/dev/mine", permissions="rw")
    assert shell(cri, "ls -l /dev/mine | cut -c1; echo x > /dev/mine && echo ok", devices=[device]) == "c\nok\n"


def test_limits_in_the_cgroup(cri: Client) -> None:
    pod = cri.pod()
    resources = {"memory_limit_in_bytes": 48 << 20, "cpu_period": 100000, "cpu_quota": 25000, "cpu_shares": 512}
    container = cri.start(pod, "sleep", "60", resources=resources)
    status = cri.status(container)
    assert status.resources.linux.memory_limit_in_bytes == 48 << 20
    group = f"{cri.daemon.cgroup_parent}/crio-{container}"
    found = list(Path("/sys/fs/cgroup").glob(f"*{group}/memory.limit_in_bytes"))
    found += list(Path("/sys/fs/cgroup").glob(f"{group[1:]}/memory.max"))
    assert [int(path.read_text()) for path in found] == [48 << 20]


def test_sysctls_of_the_pod(cri: Client) -> None:
    pod = cri.pod(linux={"sysctls": {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"}})
    paths = "/proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"
    assert cri.run("sh", "-c", f"cat {paths}", pod=pod) == (0, "80\n1\n")


def test_dns(cri: Client) -> None:
    dns = pb.DNSConfig(servers=["10.0.0.10", "fd00::10"], searches=["svc.local", "local"], options=["ndots:5"])
    pod = cri.pod(dns_config=dns)
    expected = "search svc.local local\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5\n"
    assert cri.run("cat", "/etc/resolv.conf", pod=pod) == (0, expected)


def test_a_terminal(cri: Client) -> None:
    assert "is a tty" in shell(cri, "test -t 1 && echo is a tty; echo $TERM", tty=True)


def test_a_port_of_the_host(cri: Client) -> None:
    import http.client
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mapping = pb.PortMapping(container_port=80, host_port=port)
    pod = cri.pod(port_mappings=[mapping])
    cri.start(pod, "sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
    gateway = cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.network.ip.rsplit(".", 1)[0] + ".1"

    def page() -> str:
        connection = http.client.HTTPConnection(gateway, port, timeout=1)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        except OSError:
            return ""
        finally:
            connection.close()

    assert cri.until(page) == "hello\n"
