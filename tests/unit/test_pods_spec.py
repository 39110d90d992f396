"""From the CRI's configuration to config.json: pure, so every rule is tested without root."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.config.values import Device as ConfiguredDevice
from crio_native.config.values import Sysctl, Ulimit
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument
from crio_native.linux import capabilities
from crio_native.oci.runtime import ResolvedUser, UserRequest
from crio_native.oci.spec import validate
from crio_native.pods import pod_files, spec, spec_mounts, spec_process, spec_resources
from crio_native.pods.host import Host
from crio_native.pods.profiles import SeccompProfiles
from crio_native.pods.records import Container, Layout, Pod, ProcessRecord
from crio_native.pods.values import (
    Capability,
    ContainerConfig,
    ContainerMetadata,
    ContainerSecurity,
    DNSConfig,
    GroupsPolicy,
    ImageSpec,
    KeyValue,
    LinuxContainerConfig,
    LinuxPodConfig,
    Mount,
    MountPropagation,
    NamespaceMode,
    NamespaceOption,
    PodConfig,
    PodMetadata,
    PodSecurity,
    ProfileType,
    Resources,
    SecurityProfile,
    SELinuxOption,
    UserNamespace,
)

HOST = Host(frozenset(capabilities.NAMES), -1000, False, False, "x86_64", "node")
LAYOUT = Layout(Path("/root-dir"), Path("/run-dir"), Path("/ns"), Path("/logs"))
IMAGE: dict[str, Any] = {
    "Entrypoint": ["/entry"],
    "Cmd": ["image-arg"],
    "Env": ["PATH=/image/bin", "COLOUR=red"],
    "WorkingDir": "/work",
    "User": "web:staff",
}


def pod(**changes: Any) -> Pod:
    options = changes.pop("options", NamespaceOption(pid=NamespaceMode.CONTAINER))
    security = PodSecurity(namespace_options=options, privileged=changes.pop("privileged", False))
    config = PodConfig(metadata=PodMetadata("p", "u", "n"), linux=LinuxPodConfig(security_context=security))
    return Pod("a" * 64, "pod", config, "builtin", 1, hostname="web", cgroup="/parent", state="ready", **changes)


def build(
    *,
    security: ContainerSecurity | None = None,
    settings: Mapping[str, Any] | None = None,
    host: Host = HOST,
    of: Pod | None = None,
    image: dict[str, Any] | None = None,
    resources: Resources | None = None,
    handler: RuntimeHandler | None = None,
    **fields: Any,
) -> spec.Built:
    linux = LinuxContainerConfig(security_context=security or ContainerSecurity())
    fields.setdefault("image", ImageSpec("busybox"))
    config = ContainerConfig(metadata=ContainerMetadata("c"), linux=linux, **fields)
    container = Container(
        "b" * 64,
        "container",
        "a" * 64,
        config,
        "builtin",
        2,
        cgroup="/parent/crio-b",
        resources=resources or Resources(),
    )
    node = spec.Node(replace(RuntimeTable(), **(settings or {})), host, LAYOUT, SeccompProfiles())
    handler = handler or RuntimeHandler(runtime_type="builtin")
    return spec.container_spec(
        of or pod(), container, IMAGE if image is None else image, handler, node, "/proc/7/ns/pid"
    )


def mounts_of(built: spec.Built) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in built.spec["mounts"]}


def test_the_whole_is_a_valid_spec_and_is_json() -> None:
    built = build()
    validate(built.spec)
    assert json.loads(json.dumps(built.spec)) == built.spec


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), ["/entry", "image-arg"]),
        ((), ("mine",), ["/entry", "mine"]),
        (("/bin/x",), (), ["/bin/x"]),
        (("/bin/x",), ("mine",), ["/bin/x", "mine"]),
    ],
)
def test_command_line(command: tuple[str, ...], args: tuple[str, ...], expected: list[str]) -> None:
    assert build(command=command, args=args).spec["process"]["args"] == expected


def test_no_command_at_all() -> None:
    with pytest.raises(InvalidArgument, match=r"config\.command"):
        build(image={})


def test_environment_later_sources_win() -> None:
    envs = (KeyValue("COLOUR", "green"), KeyValue("EMPTY", ""))
    env = build(envs=envs, settings={"default_env": ("COLOUR=blue", "SIZE=1")}, tty=True).spec["process"]["env"]
    assert env == ["PATH=/image/bin", "HOSTNAME=web", "TERM=xterm", "COLOUR=green", "SIZE=1", "EMPTY="]
    assert spec_process.DEFAULT_PATH in build(image={"Cmd": ["x"]}).spec["process"]["env"]


def test_working_directory() -> None:
    assert build().spec["process"]["cwd"] == "/work"
    assert build(working_dir="/mine").spec["process"]["cwd"] == "/mine"
    assert build(image={"Cmd": ["x"]}).spec["process"]["cwd"] == "/"


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        (ContainerSecurity(), UserRequest("web:staff")),
        (ContainerSecurity(run_as_user=0), UserRequest("0")),
        (ContainerSecurity(run_as_username="joe", run_as_group=0), UserRequest("joe", "0")),
        (
            ContainerSecurity(run_as_user=9, supplemental_groups=(1,), supplemental_groups_policy=GroupsPolicy.Strict),
            UserRequest("9", "", (1,), False),
        ),
    ],
)
def test_user(security: ContainerSecurity, expected: UserRequest) -> None:
    assert build(security=security).user == expected


def test_a_user_twice() -> None:
    with pytest.raises(InvalidArgument, match="run_as_username"):
        build(security=ContainerSecurity(run_as_user=1, run_as_username="x"))


@given(st.integers())
def test_an_id_is_in_range_or_refused(number: int) -> None:
    """No number may become another one, as by overflow (CVE-2024-40635)."""
    try:
        assert build(security=ContainerSecurity(run_as_user=number)).user.user == str(number)
        assert 0 <= number <= 2**32 - 2
    except InvalidArgument:
        assert not 0 <= number <= 2**32 - 2


def test_capabilities() -> None:
    def held(request: Capability, bounding: frozenset[str] = HOST.bounding) -> tuple[dict[str, list[str]], list[str]]:
        return spec_process.capability_sets(request, False, ["CAP_CHOWN", "CAP_KILL"], bounding, inherit=False)

    sets, warnings = held(Capability(("net_admin",), ("KILL",)))
    assert sets["bounding"] == sets["effective"] == sets["permitted"] == ["CAP_CHOWN", "CAP_NET_ADMIN"]
    assert sets["inheritable"] == sets["ambient"] == [] and warnings == []
    assert held(Capability(("ALL",), ("SYS_ADMIN",)))[0]["bounding"] == [
        name for name in capabilities.NAMES if name != "CAP_SYS_ADMIN"
    ]
    assert held(Capability(("CHOWN",), ("all",)))[0]["bounding"] == ["CAP_CHOWN"]
    sets, warnings = held(Capability(("CAP_BPF",)), HOST.bounding - {"CAP_BPF"})
    assert "CAP_BPF" not in sets["bounding"] and "CAP_BPF" in warnings[0]
    sets, _ = held(Capability((), (), ("NET_RAW",)))
    assert sets["ambient"] == sets["inheritable"] == ["CAP_NET_RAW"]


def test_privileged() -> None:
    security = ContainerSecurity(privileged=True)
    with pytest.raises(InvalidArgument, match="privileged"):
        build(security=security)
    built = build(security=security, of=pod(privileged=True))
    process, linux = built.spec["process"], built.spec["linux"]
    assert process["capabilities"]["bounding"] == list(capabilities.NAMES)
    assert "seccomp" not in linux and linux["maskedPaths"] == linux["readonlyPaths"] == []
    assert {"allow": True, "access": "rwm"} in linux["resources"]["devices"]
    assert "rw" in mounts_of(built)["/sys"]["options"]
    closed = RuntimeHandler(runtime_type="builtin", privileged_without_host_devices=True)
    assert build(security=security, of=pod(privileged=True), handler=closed).spec["linux"]["devices"] == []


def test_namespaces() -> None:
    def kinds(**options: Any) -> dict[str, str | None]:
        of = pod(options=NamespaceOption(**{"pid": NamespaceMode.CONTAINER, **options}))
        return {n["type"]: n.get("path") for n in build(of=of).spec["linux"]["namespaces"]}

    identity = "a" * 64
    shared = {"ipc": f"/ns/ipcns/{identity}", "network": f"/ns/netns/{identity}", "uts": f"/ns/utsns/{identity}"}
    own = {"mount": None, "cgroup": None}
    assert kinds() == {**own, **shared, "pid": None}
    assert kinds(pid=NamespaceMode.POD) == {**own, **shared, "pid": "/proc/7/ns/pid"}
    assert kinds(pid=NamespaceMode.NODE) == {**own, **shared}
    assert kinds(ipc=NamespaceMode.NODE).keys() == {*own, "network", "uts", "pid"}
    assert kinds(network=NamespaceMode.NODE).keys() == {*own, "ipc", "pid"}


def test_a_callers_mount_replaces_ours() -> None:
    mounts = (
        Mount("/data/deep/er", "/tmp"),
        Mount("/etc/hosts", "/etc/hosts", readonly=True),
        Mount("/data", "/tmp", propagation=MountPropagation.PROPAGATION_PRIVATE),
        Mount("/dev/shm/", "/tmp"),
    )
    built = build(mounts=mounts)
    found = mounts_of(built)
    assert len(found) == len(built.spec["mounts"])
    assert found["/etc/hosts"]["source"] == "/etc/hosts" and "ro" in found["/etc/hosts"]["options"]
    assert found["/dev/shm"]["source"] == "/tmp"
    places = [m["destination"] for m in built.spec["mounts"]]
    assert places.index("/data") < places.index("/data/deep/er")
    assert found["/etc/resolv.conf"]["source"] == f"/root-dir/sandboxes/{'a' * 64}/resolv.conf"


def test_mount_sources(tmp_path: Path) -> None:
    there, absent = tmp_path / "there", tmp_path / "not" / "there"
    there.mkdir()
    mounts = [Mount("/a", str(there)), Mount("/b", str(absent))]
    assert spec_mounts.check_sources(mounts, ()) == [str(absent)]
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[1\]\.host_path.*absent_mount_sources_to_reject"):
        spec_mounts.check_sources(mounts, (str(absent),))
    (there / "file").touch()
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]"):
        spec_mounts.check_sources([Mount("/a", str(there / "file" / "x"))], ())
    assert not absent.exists()


def test_root_propagation() -> None:
    def of(*wanted: MountPropagation) -> str:
        return spec_mounts.root_propagation([Mount("/a", "/b", propagation=p) for p in wanted])

    private, slave, shared = MountPropagation
    assert (of(), of(private), of(private, slave), of(slave, shared)) == ("", "", "rslave", "rshared")


def test_a_group_needs_a_user() -> None:
    with pytest.raises(InvalidArgument, match=r"run_as_group.*needs run_as_user"):
        build(security=ContainerSecurity(run_as_group=5))


def test_hidden_paths() -> None:
    linux = build().spec["linux"]
    assert "/proc/kcore" in linux["maskedPaths"] and "/proc/sys" in linux["readonlyPaths"]
    mapped = build(of=pod(userns=UserNamespace())).spec["linux"]
    assert mapped["maskedPaths"] == mapped["readonlyPaths"] == []
    mine = build(security=ContainerSecurity(masked_paths=("/a",), readonly_paths=("/b",))).spec["linux"]
    assert (mine["maskedPaths"], mine["readonlyPaths"]) == (["/a"], ["/b"])


@pytest.mark.parametrize(
    ("security", "present"),
    [
        (ContainerSecurity(), False),
        (ContainerSecurity(seccomp=SecurityProfile(ProfileType.Unconfined)), False),
        (ContainerSecurity(seccomp=SecurityProfile(ProfileType.RuntimeDefault)), True),
        (ContainerSecurity(seccomp_profile_path="unconfined"), False),
        (ContainerSecurity(seccomp_profile_path="runtime/default"), True),
        # the structured field wins over the deprecated one
        (
            ContainerSecurity(seccomp=SecurityProfile(ProfileType.Unconfined), seccomp_profile_path="runtime/default"),
            False,
        ),
    ],
)
def test_seccomp(security: ContainerSecurity, present: bool) -> None:
    assert ("seccomp" in build(security=security).spec["linux"]) == present


def test_a_changed_profile_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    security = ContainerSecurity(seccomp=SecurityProfile(ProfileType.Localhost, str(path)))
    for action in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG"):
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({"defaultAction": action}))
        assert build(security=security).spec["linux"]["seccomp"]["defaultAction"] == action
    path.write_text("{")
    with pytest.raises(InvalidArgument, match=r"localhost_ref.*not JSON"):
        build(security=security)


def test_labels_that_the_host_cannot_give() -> None:
    asked = ContainerSecurity(apparmor=SecurityProfile(ProfileType.Localhost, "mine"))
    with pytest.raises(FailedPrecondition, match="AppArmor"):
        build(security=asked)
    able = replace(HOST, apparmor=True)
    for name in ("", "a\nb", "x" * 2000):
        with pytest.raises(InvalidArgument, match=r"apparmor\.localhost_ref"):
            build(security=ContainerSecurity(apparmor=SecurityProfile(ProfileType.Localhost, name)), host=able)
    prefixed = ContainerSecurity(apparmor=SecurityProfile(ProfileType.Localhost, "localhost/mine"))
    for security in (asked, prefixed):
        assert build(security=security, host=able).spec["process"]["apparmorProfile"] == "mine"
    assert build(host=able).spec["process"]["apparmorProfile"] == "crio-default"
    assert build().spec["process"]["apparmorProfile"] == ""
    labelled = ContainerSecurity(selinux_options=SELinuxOption(type="x_t", level="s0:c1,c2"))
    assert build(security=labelled).spec["process"]["selinuxLabel"] == ""
    process = build(security=labelled, host=replace(HOST, selinux=True)).spec["process"]
    assert process["selinuxLabel"] == "system_u:system_r:x_t:s0:c1,c2"
    bad = ContainerSecurity(selinux_options=SELinuxOption(type="x:y"))
    with pytest.raises(InvalidArgument, match=r"selinux_options\.type"):
        build(security=bad, host=replace(HOST, selinux=True))


def test_resources() -> None:
    asked = Resources(
        cpu_period=100000, cpu_quota=50000, cpu_shares=1, memory_limit_in_bytes=64 << 20, cpuset_cpus="0-1",
        memory_swap_limit_in_bytes=128 << 20, unified={"memory.high": "1"},
    )  # fmt: skip
    resources = build(resources=asked, settings={"pids_limit": 9}).spec["linux"]["resources"]
    assert resources["cpu"] == {"period": 100000, "quota": 50000, "shares": 2, "cpus": "0-1"}
    assert resources["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert resources["pids"] == {"limit": 9} and resources["unified"] == {"memory.high": "1"}
    with pytest.raises(InvalidArgument, match="memory_swap_limit_in_bytes"):
        build(resources=replace(asked, memory_swap_limit_in_bytes=1))


def test_oom_score_is_clamped_with_a_warning() -> None:
    built = build(resources=Resources(oom_score_adj=-998), host=replace(HOST, oom_score_adj=100))
    assert built.spec["process"]["oomScoreAdj"] == 100 and "-998" in built.warnings[0]
    assert build(resources=Resources(oom_score_adj=-998)).spec["process"]["oomScoreAdj"] == -998


def test_configured_limits_and_devices() -> None:
    settings = {
        "default_ulimits": (Ulimit("nofile", 1024, -1),),
        "additional_devices": (ConfiguredDevice("/dev/null", "/dev/extra", "r"),),
        "read_only": True,
    }
    built = build(settings=settings)
    assert built.spec["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2**64 - 1}]
    [device] = built.spec["linux"]["devices"]
    assert (device["path"], device["major"], device["minor"]) == ("/dev/extra", 1, 3)
    assert built.spec["root"]["readonly"] and mounts_of(built)["/tmp"]["type"] == "tmpfs"


def test_annotations_of_the_caller_do_not_reach_the_runtime() -> None:
    """CVE-2024-3154: a pod's annotation that an external runtime acts upon."""
    hostile = {"org.systemd.property.ExecStart": "x", "run.oci.handler": "x"}
    handler = RuntimeHandler(runtime_type="builtin", default_annotations={"run.oci.systemd.subgroup": ""})
    found = build(annotations=hostile, handler=handler).spec["annotations"]
    assert not hostile.keys() & found.keys()
    assert json.loads(found["io.kubernetes.cri-o.Annotations"]) == hostile
    assert found["run.oci.systemd.subgroup"] == "" and found["io.kubernetes.cri-o.SandboxID"] == "a" * 64


def test_sysctls() -> None:
    own, host = NamespaceOption(), NamespaceOption(network=NamespaceMode.NODE, ipc=NamespaceMode.NODE)
    defaults = (Sysctl("net.ipv4.ip_forward", "1"), Sysctl("kernel.sem", "1 2 3 4"))
    asked = {"net/ipv4/conf/all/x": "1"}
    assert spec_resources.pod_sysctls(asked, defaults, own) == {
        "net.ipv4.ip_forward": "1",
        "kernel.sem": "1 2 3 4",
        "net.ipv4.conf.all.x": "1",
    }
    assert spec_resources.pod_sysctls({}, defaults, host) == {}
    for key in ("net.x.y", "kernel.shmmax", "kernel.panic", "vm.swappiness", "net.a=b", "../x.y", "kernel.hostname"):
        with pytest.raises(InvalidArgument, match=r"config\.linux\.sysctls"):
            spec_resources.pod_sysctls({key: "1"}, (), host)
    with pytest.raises(InvalidArgument, match="printable"):
        spec_resources.pod_sysctls({"net.a.b": "1\n2"}, (), own)


@given(st.text())
def test_host_names_hold_no_second_line(name: str) -> None:
    try:
        pod_files.check_hostname(name)
    except InvalidArgument:
        return
    assert name == "" or (name.isascii() and not any(c.isspace() for c in name) and len(name) <= 64)


@given(st.text(), st.text(), st.text())
def test_resolver_lines_hold_no_second_line(server: str, search: str, option: str) -> None:
    dns = DNSConfig((server,), (search,), (option,))
    try:
        pod_files.check_dns(dns)
    except InvalidArgument:
        return
    assert pod_files._resolv_conf(dns).splitlines() == [f"search {search}", f"nameserver {server}", f"options {option}"]


def test_pod_files(tmp_path: Path) -> None:
    pod_files.write(tmp_path, hostname="web", dns=None, host_network=False, ips=("10.0.0.2", "fd00::2"), owner=(0, 0))
    assert (tmp_path / "hostname").read_text() == "web\n"
    assert "10.0.0.2\tweb\nfd00::2\tweb\n" in (tmp_path / "hosts").read_text()
    assert (tmp_path / "hosts").stat().st_mode & 0o777 == 0o644


def test_exec_process() -> None:
    base = {"args": ["x"], "env": ["A=1"], "cwd": "/", "terminal": True, "user": {"uid": 0, "gid": 0}}
    process = spec.exec_process(base, ("id",), ResolvedUser(5, 6, (7,), "/home/x"))
    assert process["args"] == ["id"] and process["terminal"] is False
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [7]}
    assert process["env"] == ["A=1", "HOME=/home/x"] and base["env"] == ["A=1"]
    assert ProcessRecord(1, 2, 3, 5, 6, (7,), "/h").process().user == ResolvedUser(5, 6, (7,), "/h")


@given(
    st.builds(
        Resources,
        cpu_period=st.integers(),
        cpu_quota=st.integers(),
        cpu_shares=st.integers(),
        memory_limit_in_bytes=st.integers(),
        memory_swap_limit_in_bytes=st.integers(),
        cpuset_cpus=st.text(max_size=10),
        unified=st.dictionaries(st.text(max_size=10), st.text(max_size=5), max_size=2),
    )
)
def test_any_resources_are_refused_or_make_a_valid_spec(asked: Resources) -> None:
    try:
        built = build(resources=asked)
    except CrioError:
        return
    validate(built.spec)


def test_a_link_to_a_source_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc/1/root, for a daemon that lacks a capability of that process."""

    def realpath(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os.path, "realpath", realpath)
    mounts = [Mount(container_path="/m", host_path="/proc/1/root")]
    for look in (lambda: spec_mounts.check_sources(mounts, ()), lambda: spec_mounts.caller_mounts(mounts, {})):
        with pytest.raises(InvalidArgument, match=r"config.mounts\[0\].host_path: cannot be used: permission denied"):
            look()


@pytest.mark.parametrize("text", ["FOO", "=x", ""])
def test_an_images_environment_is_of_names_and_values(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"Env\[1\] must be NAME=VALUE"):
        spec_process.environment(ContainerConfig(), {"Env": ["A=", text]}, (), "host")


def test_what_a_pod_may_use_has_no_limit_by_a_sign_or_by_nothing() -> None:
    for asked in (Resources(), Resources(memory_limit_in_bytes=-1, cpu_quota=-1, memory_swap_limit_in_bytes=-1)):
        spec_resources.check_pod(asked, "config.linux.resources")
