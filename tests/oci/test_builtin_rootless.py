"""Containers of an unprivileged user, made by `crio-oci`: what a user namespace of his own allows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .command_line import Oci, oci  # noqa: F401  (the fixture)
from .conftest import spec_of

pytestmark = pytest.mark.root

USER = 12345


@pytest.fixture
def bundles(oci: Oci) -> Iterator[Oci]:  # noqa: F811
    subprocess.run(["chown", "-R", "--no-dereference", f"{USER}:{USER}", str(oci.directory)], check=True)
    yield oci


def spec_for(oci: Oci, *args: str) -> dict[str, Any]:  # noqa: F811
    """As `crio-oci spec --rootless` would have it."""
    spec = spec_of(str(oci.root), args)
    own = [{"containerID": 0, "hostID": USER, "size": 1}]
    spec["linux"] |= {"uidMappings": own, "gidMappings": own}
    spec["linux"]["namespaces"] += [{"type": "user"}, {"type": "time"}]
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/dev/pts"]  # gid=5 is not mapped
    return spec


def run(oci: Oci, spec: dict[str, Any], *flags: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    bundle = oci.write(spec)
    for path in (bundle, bundle / "config.json"):
        os.chown(path, USER, USER)
    return call(oci, "run", *flags, "--bundle", str(bundle), "c")


def call(oci: Oci, *words: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    return oci.call("--rootless", "true", *words, user=USER, group=USER, extra_groups=[])


def test_a_container_of_his_own(bundles: Oci) -> None:
    script = "id; cat /proc/self/uid_map; echo x > /dev/null && head -c 2 /dev/zero | wc -c; echo $$; touch /made"
    done = run(bundles, spec_for(bundles, "sh", "-c", script))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("uid=0(root) gid=0") and lines[1].split() == ["0", str(USER), "1"]
    assert lines[2:] == ["2", "1"]
    assert (bundles.root / "made").stat().st_uid == USER


def test_volumes_time_and_protection(bundles: Oci) -> None:
    (bundles.root / "data").mkdir()
    spec = spec_for(bundles, "sh", "-c", "cat /data/x; touch /data/y; cat /proc/uptime; cat /proc/keys")
    source = bundles.directory / "volume"
    source.mkdir()
    (source / "x").write_text("text\n")
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", "ro"]})
    spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10**7}}
    done = run(bundles, spec)
    lines = done.stdout.splitlines()
    assert lines[0] == "text" and float(lines[1].split()[0]) > 10**7 and len(lines) == 2, done.stderr
    assert "Read-only" in done.stderr


def test_a_container_that_waits_for_its_start_is_open_to_its_user(bundles: Oci) -> None:
    """Not dumpable, its init would keep him out of its namespaces; a network is set up through them."""
    bundle = bundles.write(spec_for(bundles, "sleep", "1000"))
    for path in (bundle, bundle / "config.json"):
        os.chown(path, USER, USER)
    created = call(bundles, "create", "--bundle", str(bundle), "c")
    assert created.returncode == 0, created.stderr
    pid = json.loads(call(bundles, "state", "c").stdout)["pid"]
    line = ["readlink", f"/proc/{pid}/ns/net"]
    seen = subprocess.run(line, capture_output=True, text=True, user=USER, group=USER, extra_groups=[])
    assert seen.stdout == os.readlink(f"/proc/{pid}/ns/net") + "\n", seen.stderr
    done = call(bundles, "exec", "c", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    call(bundles, "delete", "--force", "c")


@pytest.mark.parametrize("pid", ["new", "hosts"])
def test_exec_in_his_container(bundles: Oci, pid: str) -> None:
    spec = spec_for(bundles, "sleep", "1000")
    if pid == "hosts":
        spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "pid"]
        # Such a user namespace may not mount a procfs of the host's processes.
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/proc"]
        spec["linux"] |= {"maskedPaths": [], "readonlyPaths": []}
    started = run(bundles, spec, "--detach")
    assert started.returncode == 0, started.stderr
    done = call(bundles, "exec", "c", "sh", "-c", "id -u; echo $$; exit 3")
    assert done.returncode == 3, done.stderr
    root, own = done.stdout.split()
    assert root == "0" and (int(own) < 10) == (pid == "new")
    pid_file = bundles.directory / "state" / "exec.pid"
    assert call(bundles, "exec", "--detach", "--pid-file", str(pid_file), "c", "sleep", "1000").returncode == 0
    line = Path(f"/proc/{pid_file.read_text()}/cmdline").read_bytes()
    assert line == b"sleep\0001000\0"
    failed = call(bundles, "exec", "c", "no-such-command")
    assert failed.returncode == 255 and "not found in $PATH" in failed.stderr
    os.kill(int(pid_file.read_text()), 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}, "uid_map with EPERM"),
        (
            {
                "uidMappings": [
                    {"containerID": 0, "hostID": USER, "size": 1},
                    {"containerID": 1, "hostID": 5, "size": 9},
                ]
            },
            "newuidmap",
        ),
    ],
)
def test_ids_that_are_not_his(bundles: Oci, change: dict[str, Any], message: str) -> None:
    spec = spec_for(bundles, "true")
    spec["linux"] |= change
    done = run(bundles, spec)
    assert done.returncode == 1 and "step 'user_namespace' failed" in done.stderr and message in done.stderr


def test_without_a_user_namespace_the_failing_step_is_named(bundles: Oci) -> None:
    spec = spec_for(bundles, "true")
    spec["linux"]["namespaces"] = [{"type": "mount"}]
    spec["linux"] |= {"uidMappings": [], "gidMappings": []}
    del spec["hostname"]
    done = run(bundles, spec)
    assert done.returncode == 1 and "step 'new_namespaces' failed with EPERM" in done.stderr
    assert not Path(bundles.state / "c").exists()
