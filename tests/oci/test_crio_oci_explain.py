"""crio-oci explain and isolation say what happens, and what is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from crio_native.linux.cgroup import hierarchy

from .command_line import Oci, oci
from .conftest import spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]


def without_cgroups_path(oci: Oci, *args: str) -> Path:
    """A bundle as `spec` writes it, with limits; its container has a group that is named by its id."""
    spec = spec_of(str(oci.root), args)
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]})
    resources = {"pids": {"limit": 5}, "memory": {"limit": 100_000_000, "swap": 100_000_000, "reservation": 30_000_000}}
    spec["linux"]["resources"] = resources | {"devices": [{"allow": False, "access": "rwm"}]}
    return oci.write(spec)


def test_what_is_explained_is_what_is_traced(oci: Oci) -> None:
    """Also of a group that the configuration does not name."""
    bundle, trace = without_cgroups_path(oci, "true"), oci.directory / "trace"
    oci.ok("--trace", trace, "run", "-b", bundle, oci.name)
    traced = [json.loads(line) for line in trace.read_text().splitlines()]
    explained = json.loads(oci.ok("explain", "--json", "--id", oci.name, bundle))["steps"]
    others = {"record_state", "find_command"}
    for processes in (("crio-oci", "runtime", "parent"), ("init",)):
        happened, said = (
            [(row["step"], row["source"]) for row in rows if row["process"] in processes and row["step"] not in others]
            for rows in ([row for row in traced if row["result"] == "ok" or row["step"] == "execute"], explained)
        )
        if processes != ("init",):  # the command's own steps come from no field
            happened, said = ([(step, "") for step, _ in rows] for rows in (happened, said))
        assert happened == said
    assert not oci.left()


@pytest.mark.parametrize("flags", [(), ("--no-pivot",), ("--no-new-keyring",)])
@pytest.mark.parametrize(
    "surroundings", ["", "NOTIFY_SOCKET=/dev/null", "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web"]
)
def test_flags_and_environment_are_explained_as_they_act(oci: Oci, flags: tuple[str, ...], surroundings: str) -> None:
    bundle, trace = oci.bundle("env"), oci.directory / "trace"

    def call(*words: str | Path) -> str:
        line = f'{surroundings} exec "$@" 3</'
        done = subprocess.run(
            ["sh", "-c", line, "sh", *oci.line(*words)], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    there = {line.partition("=")[0] for line in call("--trace", trace, "run", *flags, "-b", bundle, oci.name).split()}
    traced = [json.loads(line) for line in trace.read_text().splitlines()]
    happened = [row["step"] for row in traced if row["process"] == "init" and row["step"] != "find_command"]
    rows = json.loads(call("explain", "--json", "--id", oci.name, *flags, bundle))["steps"]
    explained = [row for row in rows if row["process"] == "init" and row["step"] != "find_command"]
    assert [row["step"] for row in explained] == happened
    told = " ".join(line for row in explained if row["step"] == "environment" for line in row["calls"])
    assert {name for name in there if name in told} >= there - {"HOME", "PWD", "SHLVL"}
    assert {entry.partition("=")[0] for entry in surroundings.split()} <= there


def test_the_groups_of_intels_technology_are_explained(oci: Oci) -> None:
    spec = oci.spec("true")
    spec["linux"]["intelRdt"] = {"enableMonitoring": True, "schemata": ["L3:0=f"]}
    bundle, trace = oci.write(spec), oci.directory / "trace"
    told = json.loads(oci.ok("explain", "--json", "--id", "c", bundle))
    first, *rest = told["steps"]
    assert (
        first["step"] == "make_resctrl" and "/c/schemata" in first["calls"][1] and "mon_groups/c" in first["calls"][2]
    )
    joined = next(row for row in rest if row["step"] == "join_cgroup")
    assert any("resctrl/c/tasks" in line for line in joined["calls"])
    assert any("resctrl/c/mon_groups/c/tasks" in line for line in joined["calls"])
    done = oci.call("--trace", trace, "run", "-b", bundle, "c")
    assert (done.returncode != 0) == any("resctrl" in sentence for sentence in told["assumptions"])
    assert json.loads(trace.read_text().splitlines()[0])["step"] == "make_resctrl"


def test_isolation_knows_the_given_group_and_what_was_updated(oci: Oci) -> None:
    name = oci.name
    oci.ok("create", "-b", without_cgroups_path(oci, "sleep", "1000"), name)
    assert "is created only" in oci.refused("isolation", name)
    oci.ok("start", name)
    assert "pids.max 5\tpids.max 5" in oci.ok("isolation", name)
    limit = Path(f"{hierarchy().mount_of('pids')}/{name}/pids.max")
    limit.write_text("max")
    weaker = oci.call("isolation", name)
    assert weaker.returncode == 1 and "! weaker    linux.resources.pids.limit" in weaker.stdout
    oci.ok("update", "--pids-limit", "-1", "--memory", "-1", name)
    oci.ok("update", "--pids-limit", "0", "--memory", "0", name)  # no memory is no word about it
    assert "1 of" not in oci.ok("isolation", name)
    assert "~ stricter" not in oci.ok("isolation", name)
    oci.ok("update", "--pids-limit", "7", name)
    limit.write_text("8")
    assert "pids.max 7\tpids.max 8" in oci.call("isolation", name).stdout
    process = json.loads(oci.ok("state", name))["pid"]
    for mount in hierarchy().mounts:
        Path(mount, "cgroup.procs").write_text(str(process))
    shown = oci.call("isolation", name).stdout
    assert "! weaker    linux.cgroupsPath unified" in shown or "! weaker    linux.cgroupsPath pids" in shown
    oci.ok("delete", "--force", name)
    assert not oci.left()
