"""Plans as pure functions: order, sources, what each field of config.json becomes; no root, no kernel."""

from __future__ import annotations

import copy
import dataclasses
import marshal
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument
from crio_native.linux import mounts, syscalls
from crio_native.oci.builtin.plan import Host, Plan, container_plan, exec_plan
from crio_native.oci.builtin.steps import STEPS
from crio_native.oci.calls import DESCRIPTIONS
from crio_native.oci.runtime import ContainerSpec, ExecSpec, Overlay
from crio_native.oci.spec import validate

HOST = Host(40, (1 << 41) - 1, -1000)
MAPPINGS = [{"containerID": 0, "hostID": 1000, "size": 10}, {"containerID": 10, "hostID": 50, "size": 1}]
SPEC: dict[str, Any] = {
    "ociVersion": "1.3.0",
    "root": {"path": "rootfs"},
    "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "rro"]},
    ],
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")]},
}


def plan(change: Any = None, *, overlay: Overlay | None = None, **more: Any) -> Plan:
    spec = copy.deepcopy(SPEC)
    if change:
        change(spec)
    validate(spec)
    container = ContainerSpec(id="box", spec=spec, bundle=Path("/bundle"), run_dir=Path("/run/box"), overlay=overlay)
    return container_plan(container, HOST, **{"cgroup_files": [], **more})


def names(found: Plan) -> list[str]:
    return [step.name for step in found.steps]


def step(found: Plan, name: str, number: int = 0) -> dict[str, Any]:
    return dict([step.args for step in found.steps if step.name == name][number])


def user_namespace(spec: dict[str, Any]) -> None:
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"] |= {"uidMappings": MAPPINGS, "gidMappings": MAPPINGS[:1]}


EVERYTHING = {
    "hooks": {kind: [{"path": "/bin/hook"}] for kind in ("prestart", "createContainer", "startContainer", "poststop")},
    "hostname": "h",
    "domainname": "d",
}


def everything(spec: dict[str, Any]) -> None:
    spec |= copy.deepcopy(EVERYTHING)
    spec["process"] |= {
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2**64 - 1}],
        "scheduler": {"policy": "SCHED_BATCH"},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 1},
        "oomScoreAdj": 5,
        "apparmorProfile": "p",
        "terminal": True,
    }
    spec["root"]["readonly"] = True
    spec["linux"] |= {
        "memoryPolicy": {"mode": "MPOL_LOCAL"},
        "personality": {"domain": "LINUX32"},
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "maskedPaths": ["/proc/keys"],
        "readonlyPaths": ["/proc/sys"],
        "netDevices": {"eth1": {}},
        "rootfsPropagation": "slave",
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
    }
    spec["linux"]["namespaces"].append({"type": "time"})


def everything_for_a_user(spec: dict[str, Any]) -> None:
    everything(spec)
    user_namespace(spec)


@pytest.mark.parametrize("change", [None, everything, user_namespace, everything_for_a_user])
def test_a_plan_is_plain_data_of_known_steps_with_a_source_each(change: Any) -> None:
    found = plan(change, seccomp=(b"\0" * 8, 0))
    marshal.dumps([(step.name, dict(step.args)) for step in found.steps])
    marshal.dumps(dict(found.duties))
    assert set(names(found)) <= set(STEPS)
    for each in found.steps:
        assert each.source.startswith(("rule: ", "linux.", "process.", "root.", "mounts[", "host", "domain", "hooks."))


def test_the_order_that_safety_depends_on() -> None:
    found = names(plan(everything, seccomp=(b"\0" * 8, 0), cgroup_files=["/x"]))
    order = [
        *("join_cgroup", "new_namespaces", "root_propagation", "bind_root", "mount", "bind", "make_devices"),
        *("mask_paths", "ask_parent", "release_parent", "console", "read_only_root", "pivot_root"),
        *("limit_bounding_set", "change_user", "write_labels", "wait_for_start", "run_hooks", "find_command"),
        *("default_signals", "seccomp", "set_capabilities", "execute"),
    ]
    last = {name: len(found) - 1 - found[::-1].index(name) for name in order}
    assert sorted(order, key=last.__getitem__) == order
    assert found[-1] == "execute"


def test_a_user_namespace_is_entered_after_all_that_takes_the_hosts_root() -> None:
    found = plan(everything_for_a_user, cgroup_files=["/x"])
    entry = names(found).index("enter_user_namespace")
    before, after = names(found)[:entry], names(found)[entry:]
    needs_host = {
        "join_cgroup",
        "oom_score",
        "raise_limits",
        "user_namespace",
        "open_root",
        "open_bind",
        "open_devices",
        "prepare_devices",
    }
    assert needs_host <= set(before) and not needs_host & set(after)
    assert {"place_root", "attach_bind", "bind_devices", "new_session", "session_keyring"} <= set(after)
    assert step(found, "user_namespace") == {"uid_map": "0 1000 10\n10 50 1\n", "gid_map": "0 1000 10\n", "path": ""}
    assert (found.new_pid_namespace, found.join_pid) == (False, "")
    assert step(found, "enter_user_namespace") == {"new_pid": True, "join_pid": ""}


def test_an_ordinary_container_asks_its_parent_for_nothing() -> None:
    assert plan().duties == {} and not {"ask_parent", "release_parent"} & set(names(plan()))


def test_duties() -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"createRuntime": [{"path": "/a"}], "poststart": [{"path": "/b"}]}
        spec["linux"]["netDevices"] = {"eth1": {"name": "eth0"}, "eth2": {}}

    duties = plan(change).duties
    assert duties["hooks"] == {"createRuntime": [{"path": "/a"}]}
    assert duties["net_devices"] == {"eth1": "eth0", "eth2": "eth2"}
    assert duties["state"]["id"] == "box" and duties["state"]["bundle"] == "/bundle"


def test_a_mount_label_is_for_file_systems_that_take_one() -> None:
    overlay = Overlay("/layers", ["a", "b"], "/upper", "/work")
    found = plan(lambda spec: spec["linux"].update(mountLabel="a:b:c:s0:c1,c2"), overlay=overlay)
    data = {each.args["fstype"]: each.args["data"] for each in found.steps if each.name == "mount"}
    assert data == {"proc": "", "sysfs": "", "tmpfs": 'mode=755,context="a:b:c:s0:c1,c2"'}
    assert step(found, "overlay_root")["data"].endswith(',context="a:b:c:s0:c1,c2"')


def test_layers_are_mapped_before_the_root_is_made_of_them() -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": 1000, "size": 10}]
        spec["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}

    overlay = Overlay("/layers", ["a", "b"], "/upper", "/work", mapped=True)
    found = plan(change, overlay=overlay)
    order = [names(found).index(name) for name in ("user_namespace", "map_layers", "overlay_root", "open_root")]
    assert order == sorted(order) and step(found, "map_layers") == {"base": "/layers"}
    assert "map_layers" not in names(plan(change, overlay=dataclasses.replace(overlay, mapped=False)))


def test_binds_are_opened_before_the_root_when_mounts_go_back_to_the_host() -> None:
    found = names(plan(lambda spec: spec["linux"].update(rootfsPropagation="rshared")))
    assert found.index("open_bind") < found.index("bind_root") < found.index("attach_bind")
    assert "bind" in names(plan(lambda spec: spec["linux"].update(rootfsPropagation="rslave")))


def test_a_control_group_mount_without_a_namespace_shows_the_group_alone() -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "cgroup"]
        spec["mounts"] = [{"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]}]

    found = plan(change, cgroup_directories={"": "/sys/fs/cgroup/box"})
    assert step(found, "bind")["origin"] == "/sys/fs/cgroup/box" and step(found, "bind")["set"] & 1
    found = plan(change, cgroup_directories={"cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct/box"})
    assert "cgroup_v1" in names(found)


def test_ways_into_the_root() -> None:
    assert "pivot_root" in names(plan())
    assert "move_root" in names(plan(pivot=False))

    def joined(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [{"type": "mount", "path": "/proc/7/ns/mnt"}]

    assert {"change_root", "join_mount_namespace"} <= set(names(plan(joined)))


def test_a_notify_socket_is_bound_and_named() -> None:
    found = plan(notify_socket="/run/systemd/notify")
    assert step(found, "bind", 1)["origin"] == "/run/systemd/notify"
    assert step(found, "environment", 1)["entries"] == [f"NOTIFY_SOCKET={step(found, 'bind', 1)['destination']}"]


def test_no_session_keyring() -> None:
    assert "session_keyring" not in names(plan(keyring=False))


def test_what_an_exec_inherits_from_the_containers_configuration() -> None:
    process = {"args": ["/bin/true"], "cwd": "/", "execCPUAffinity": {"initial": "0", "final": "1-2"}}
    linux = {"personality": {"domain": "LINUX32"}, "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0,64"}}
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUSER
    found = exec_plan(ExecSpec(process), HOST, cgroup_files=["/x"], namespaces=flags, linux=linux)
    assert step(found, "memory_policy") == {"mode": 2, "nodes": 1 | 1 << 64}
    assert step(found, "personality") == {"domain": 8}
    assert step(found, "enter_container") == {"flags": flags}
    order = names(found)
    assert step(found, "set_affinity")["cpus"] == [0] and step(found, "set_affinity", 1)["cpus"] == [1, 2]
    assert order.index("set_affinity") < order.index("join_cgroup") < len(order) - 1 - order[::-1].index("set_affinity")


def test_a_string_that_no_bytes_are_for_is_refused_and_foreign_bytes_are_not() -> None:
    def change(spec: dict[str, Any], word: str) -> None:
        spec["process"]["args"] = ["/bin/echo", word]

    plan(lambda spec: change(spec, "\xe4 \U0001f600 \udcff"))
    with pytest.raises(InvalidArgument, match=r"process.args\[1\]: may not contain half"):
        plan(lambda spec: change(spec, "\ud800"))
    for half in ("\ud800", "\udcff" * 65):
        with pytest.raises(InvalidArgument, match=r"^hostname: "):
            plan(lambda spec, half=half: spec.update(hostname=half))
        with pytest.raises(InvalidArgument, match=r"^linux.netDevices\["):
            plan(lambda spec, half=half: spec["linux"].update(netDevices={half: {}}))


def test_an_exec_of_who_is_not_root_enters_the_pid_namespace_from_the_user_namespace() -> None:
    process = {"args": ["/bin/true"], "cwd": "/"}
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID
    assert "enter_pid_namespace" not in names(exec_plan(ExecSpec(process), HOST, cgroup_files=[], namespaces=flags))
    found = exec_plan(ExecSpec(process), Host(40, 0), cgroup_files=[], namespaces=flags)
    order = names(found)
    assert order[:2] == ["enter_pid_namespace", "new_session"] and order.count("new_session") == 1
    assert step(found, "enter_container") == {"flags": syscalls.CLONE_NEWNS}
    for name in ("enter_pid_namespace", "enter_container"):  # before anybody in there can see us
        where = next(step for step in found.steps if step.name == name)
        assert next(iter(DESCRIPTIONS[name](**where.args))) == "prctl(PR_SET_DUMPABLE, 0)"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_exec_that_may_be_traced_appears_when_it_is_no_more_than_its_command(shared: bool, terminal: bool) -> None:
    process = {"args": ["/bin/true"], "cwd": "/", "terminal": terminal}
    process |= {} if shared else {"capabilities": {"bounding": ["CAP_SYS_PTRACE"]}}
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID
    request = ExecSpec(process, shared_pids=shared)
    found = exec_plan(request, HOST, cgroup_files=["/x"], namespaces=flags, seccomp=(b"filter", 0))
    order = names(found)
    last = ["appear", "new_session", *(["control_terminal"] if terminal else []), "execute"]
    assert order[-len(last) :] == last and order.count("new_session") == 1 and "seccomp" in order
    assert step(found, "enter_container") == {"flags": flags}
    for harmless in (syscalls.CLONE_NEWNS, flags | syscalls.CLONE_NEWUSER):  # the host's PIDs; a user namespace
        assert "appear" not in names(exec_plan(request, HOST, cgroup_files=[], namespaces=harmless))
    assert "appear" not in names(
        exec_plan(ExecSpec({"args": ["x"], "cwd": "/"}), HOST, cgroup_files=[], namespaces=flags)
    )


def test_capabilities_that_only_a_user_namespace_can_give() -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["process"]["capabilities"] = {"bounding": ["CAP_SYS_RESOURCE"]}

    poor = Host(40, 0)
    spec = copy.deepcopy(SPEC)
    change(spec)
    container = ContainerSpec(id="box", spec=spec, bundle=Path("/bundle"), run_dir=Path("/run"))
    with pytest.raises(InvalidArgument, match=r"process.capabilities.*does not have them itself"):
        container_plan(container, poor, cgroup_files=[])
    user_namespace(spec)
    container_plan(container, poor, cgroup_files=[])


def test_attributes_of_a_remounted_mount() -> None:
    flags = mounts.remount_flags(
        1 | 4096, mounts.MOUNT_ATTR_NOEXEC | mounts.MOUNT_ATTR_NOATIME, mounts.MOUNT_ATTR_RDONLY
    )
    assert flags == mounts.MS_NOEXEC | mounts.MS_NOATIME
    assert mounts.remount_flags(1024, 0, mounts.MOUNT_ATTR_ATIME) == mounts.MS_RELATIME
