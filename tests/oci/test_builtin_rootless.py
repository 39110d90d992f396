"""Containers of an unprivileged user, made by `crio-oci`: what a user namespace of his own allows."""

from __future__ import annotations

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


def run(oci: Oci, spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:  # noqa: F811
    bundle = oci.write(spec)
    for path in (bundle, bundle / "config.json"):
        os.chown(path, USER, USER)
    user = {"user": USER, "group": USER, "extra_groups": []}
    return oci.call("--rootless", "true", "run", "--bundle", bundle, "c", **user)


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
