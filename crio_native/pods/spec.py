"""A container's config.json (runtime-spec 1.3) from the CRI's configuration, the image's, and the node's.

Nothing is made here; of the host only what a field names is looked at.  The parts have modules (`spec_process`,
`spec_mounts`, `spec_security`, `spec_resources`); this one puts them together and adds namespaces and annotations.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import InvalidArgument
from crio_native.linux import scheduling
from crio_native.oci.runtime import UserRequest
from crio_native.pods import (
    cdi,
    devices,
    infra_cpus,
    linked_logs,
    oci_hooks,
    pod_annotations,
    selinux,
    spec_mounts,
    spec_process,
    spec_resources,
    spec_security,
    userns,
)
from crio_native.pods.high_performance import Wishes
from crio_native.pods.host import Host
from crio_native.pods.profiles import SeccompProfiles
from crio_native.pods.records import Container, Layout, Pod
from crio_native.pods.values import ContainerConfig, Device, NamespaceMode, NamespaceOption, to_json

OCI_VERSION = "1.3.0"
NO_WISHES = Wishes()


@dataclass(frozen=True, slots=True)
class Node:
    """What of the node a spec depends on."""

    settings: RuntimeTable
    host: Host
    layout: Layout
    profiles: SeccompProfiles


@dataclass(frozen=True, slots=True)
class Built:
    """The spec, who the command runs as, host directories to make first, and what to tell the operator."""

    spec: dict[str, Any]
    user: UserRequest
    absent_sources: list[str]
    warnings: list[str]


def container_spec(
    pod: Pod,
    container: Container,
    image_config: Mapping[str, Any],
    handler: RuntimeHandler,
    node: Node,
    pid_path: str,
    volumes: Mapping[int, str] = MappingProxyType({}),
    declared: Sequence[dict[str, Any]] = (),
    wishes: Wishes = NO_WISHES,
) -> Built:
    """Raises InvalidArgument with the CRI field's path, FailedPrecondition for what this host cannot do.

    image_config: the image configuration's ``config`` object.  pid_path: the PID namespace to join, "" for a new one;
    looked at only where the container's mode says so.  volumes: where image volumes are mounted, by their mounts'
    indices.  declared: mounts for the volumes that the image itself declares.  wishes: of a
    latency-sensitive container.
    """
    config, settings, host = container.config, node.settings, node.host
    security = config.linux.security_context
    if security.privileged and not pod.config.linux.security_context.privileged:
        raise InvalidArgument(
            "config.linux.security_context.privileged", True, "needs a pod whose security_context.privileged is true"
        )
    options = security.namespace_options or pod.config.namespaces
    capabilities, warnings = spec_process.capability_sets(
        security.capabilities,
        security.privileged,
        settings.default_capabilities,
        host.bounding,
        inherit=settings.add_inheritable_capabilities,
    )
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, settings.workloads, config.metadata.name)
    score, clamped = spec_resources.oom_score(container.resources.oom_score_adj, host.oom_score_adj)
    labels = selinux.of_container(pod, security, settings, host)
    masked, readonly_paths = spec_security.hidden_paths(security, own_user_namespace=pod.userns is not None)
    asked = _devices(container, handler, settings, allowed)
    injected = cdi.edits(_cdi_devices(config), settings.cdi_spec_dirs, asked)
    if settings.device_ownership_from_security_context:
        asked.give_to(security.run_as_user, security.run_as_group)
    bound = asked.bound() if pod.userns else []
    resources = spec_resources.linux_resources(
        container.resources,
        min_memory=handler.container_min_memory,
        pids_limit=settings.pids_limit,
        field="config.linux.resources",
    )
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": config.tty,
            "user": {"uid": 0, "gid": 0},  # the real one is resolved in the root file system
            "args": spec_process.arguments(config, image_config),
            "env": spec_process.environment(
                config,
                image_config,
                (*settings.default_env, *_gomaxprocs(pod, container, settings), *wishes.environment()),
                pod.hostname,
                injected.env,
            ),
            "cwd": spec_process.working_directory(config, image_config),
            "capabilities": capabilities,
            "rlimits": spec_process.rlimits(settings.default_ulimits),
            "noNewPrivileges": security.no_new_privs,
            "apparmorProfile": spec_security.apparmor(security, host, settings.apparmor_profile),
            "selinuxLabel": labels.process,
            "oomScoreAdj": score,
            **_exec_affinity(container, handler, wishes),
        },
        "root": {
            "path": str(node.layout.bundle(container.id) / "rootfs"),
            "readonly": security.readonly_rootfs or settings.read_only,
        },
        "mounts": [*_mounts(pod, container, node, volumes, declared, allowed), *injected.mounts, *bound],
        "linux": {
            "namespaces": _namespaces(options, pod, node.layout, pid_path),
            **_id_mappings(pod),
            "resources": {**resources, "devices": asked.rules},
            "devices": [] if bound else asked.nodes,
            "cgroupsPath": container.cgroup,
            "maskedPaths": masked,
            "readonlyPaths": readonly_paths,
            "mountLabel": labels.files,
            "rootfsPropagation": spec_mounts.root_propagation(config.mounts),
        },
        "annotations": {
            **handler.default_annotations,
            **allowed.passed_on(),
            **crio_annotations(pod, container, node.layout),
        },
    }
    seccomp = spec_security.seccomp(
        security,
        node.profiles,
        capabilities["bounding"],
        default=handler.seccomp_profile or settings.seccomp_profile,
        privileged=settings.privileged_seccomp_profile,
    )
    if seccomp is not None:
        spec["linux"]["seccomp"] = seccomp
    spec["linux"] |= injected.linux
    spec["hooks"] = _hooks(pod, config, spec["process"]["args"], settings, injected)
    umask = allowed.umask()
    if umask is not None:
        spec["process"]["user"]["umask"] = umask
    absent = spec_mounts.check_sources(
        config.mounts, settings.absent_mount_sources_to_reject, settings.bind_mount_prefix
    )
    user = spec_process.user(security, image_config)
    user = dataclasses.replace(user, supplementary=(*user.supplementary, *injected.groups))
    return Built(spec, user, absent, [*warnings, *clamped])


def infra_spec(pod: Pod, node: Node, label: str = "") -> dict[str, Any]:
    """The pause process of a pod that shares its PID namespace: no privileges, an empty root, the pod's namespaces.

    label: SELinux's, of the process.  The pod's files have one too, and who looks for it looks at process 1's mounts:
    so the pod's /dev/shm is there.
    """
    labelled = node.host.selinux and pod.config.namespaces.ipc is not NamespaceMode.NODE
    options = NamespaceOption(pod.config.namespaces.network, NamespaceMode.CONTAINER, pod.config.namespaces.ipc)
    user = userns.pause_user(pod.userns)
    none: dict[str, list[str]] = {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")}
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "user": {"uid": user, "gid": user},
            "args": ["pause"],
            "env": [],
            "cwd": "/",
            "capabilities": none,
            "noNewPrivileges": True,
            "oomScoreAdj": max(-998, node.host.oom_score_adj),
            **({"selinuxLabel": label} if label else {}),
        },
        "root": {"path": str(node.layout.bundle(pod.id) / "rootfs"), "readonly": True},
        "mounts": [spec_mounts.shared_memory(node.layout.shm(pod.id))] if labelled else [],
        "linux": {
            "namespaces": _namespaces(options, pod, node.layout, ""),
            **_id_mappings(pod),
            "cgroupsPath": f"{pod.cgroup}/crio-{pod.id}",
            "resources": {"devices": devices.default_rules(), **infra_cpus.resources(node.settings.infra_ctr_cpuset)},
        },
        "annotations": _pod_annotations(pod, node.settings),
    }


def _pod_annotations(pod: Pod, settings: RuntimeTable) -> dict[str, str]:
    """What a pod's first container tells a runtime that makes the pod itself, as a virtual machine: also how large the
    pod will be."""
    handler = settings.runtimes.get(pod.handler) or RuntimeHandler()
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, settings.workloads)
    linux = pod.config.linux
    sizes = {"pod-linux-overhead.crio.io": linux.overhead, "pod-linux-resources.crio.io": linux.resources}
    told = {
        name: json.dumps({key: value for key, value in to_json(size).items() if value})
        for name, size in sizes.items()
        if size is not None
    }
    return {**handler.default_annotations, **allowed.passed_on(), **told}


def exec_process(
    spec_process_object: Mapping[str, Any], args: tuple[str, ...], user: Any, *, terminal: bool = False
) -> dict[str, Any]:
    """The process object of a command to run inside a container: the container's own, with another command."""
    process = {**spec_process_object, "args": list(args), "terminal": terminal}
    process.pop("consoleSize", None)
    if terminal and not any(text.startswith("TERM=") for text in process["env"]):
        process["env"] = [*process["env"], "TERM=xterm"]
    if user is not None:
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)}
        if not any(text.startswith("HOME=") for text in process["env"]):
            process["env"] = [*process["env"], f"HOME={user.home}"]
    return process


def _namespaces(options: NamespaceOption, pod: Pod, layout: Layout, pid_path: str) -> list[dict[str, str]]:
    pins = layout.pins(pod.id)
    result = [{"type": "mount"}, {"type": "cgroup"}]
    if options.pid is NamespaceMode.CONTAINER:
        result.append({"type": "pid"})
    elif options.pid is not NamespaceMode.NODE:
        result.append({"type": "pid", "path": pid_path})
    if pod.config.namespaces.ipc is not NamespaceMode.NODE:
        result.append({"type": "ipc", "path": str(pins["ipc"])})
    if pod.config.namespaces.network is not NamespaceMode.NODE:
        result.append({"type": "network", "path": str(pins["net"])})
        result.append({"type": "uts", "path": str(pins["uts"])})
    if pod.userns is not None:
        result.append({"type": "user", "path": str(pins["user"])})
    return result


def _id_mappings(pod: Pod) -> dict[str, Any]:
    if pod.userns is None:
        return {}
    return {"uidMappings": userns.to_oci(pod.userns.uids), "gidMappings": userns.to_oci(pod.userns.gids)}


def _mounts(
    pod: Pod,
    container: Container,
    node: Node,
    volumes: Mapping[int, str],
    declared: Sequence[dict[str, Any]],
    allowed: pod_annotations.Allowed,
) -> list[dict[str, Any]]:
    security, settings = container.config.linux.security_context, node.settings
    shm = "/dev/shm" if pod.config.namespaces.ipc is NamespaceMode.NODE else node.layout.shm(pod.id)
    ours = [
        *spec_mounts.system_mounts(privileged=security.privileged, groups_writable=allowed.is_set("cgroup_rw")),
        *spec_mounts.configured_mounts(settings.default_mounts_file, settings.timezone),
        *spec_mounts.pod_files(node.layout.pod_dir(pod.id), shm, readonly=security.readonly_rootfs),
        *(spec_mounts.scratch_mounts() if settings.read_only else ()),
        *declared,
    ]
    asked = spec_mounts.caller_mounts(container.config.mounts, volumes, settings.bind_mount_prefix)
    asked = linked_logs.keep_read_only(asked, allowed)
    return spec_mounts.merge(ours, asked)


def _gomaxprocs(pod: Pod, container: Container, settings: RuntimeTable) -> list[str]:
    """Go counts the machine's CPUs; a container that asked for few is told a number that fits its request."""
    unwanted = pod.config.annotations.get("skip-gomaxprocs.crio.io") == "true"
    if unwanted or not settings.min_injected_gomaxprocs:
        return []
    return [f"GOMAXPROCS={max(settings.min_injected_gomaxprocs, -(-container.resources.cpu_shares // 1024))}"]


def _exec_affinity(container: Container, handler: RuntimeHandler, wishes: Wishes) -> dict[str, Any]:
    """Which CPU an exec begins on, with exec_cpu_affinity "first"; the runtimes' programs are told at each exec."""
    if handler.runtime_type != "builtin" or handler.exec_cpu_affinity != "first":
        return {}
    cpus = wishes.shared or scheduling.parse_list(container.resources.cpuset_cpus, scheduling.MAX_CPU)
    return {"execCPUAffinity": {"initial": str(min(cpus))}} if cpus else {}


def _cdi_devices(config: ContainerConfig) -> dict[str, str]:
    return cdi.requested([device.name for device in config.CDI_devices], config.annotations)


def _hooks(
    pod: Pod, config: ContainerConfig, args: list[str], settings: RuntimeTable, injected: cdi.Edits
) -> dict[str, list[dict[str, Any]]]:
    """The operator's, and those of CDI devices."""
    configured = oci_hooks.of_container(
        settings.hooks_dir,
        annotations={**pod.config.annotations, **config.annotations},
        command=args,
        has_bind_mounts=bool(config.mounts),
    )
    stages = [*configured, *(stage for stage in injected.hooks if stage not in configured)]
    return {stage: [*configured.get(stage, ()), *injected.hooks.get(stage, ())] for stage in stages}


def _devices(
    container: Container, handler: RuntimeHandler, settings: RuntimeTable, allowed: pod_annotations.Allowed
) -> devices.Devices:
    security = container.config.linux.security_context
    configured = [Device(d.container, d.host, d.permissions) for d in settings.additional_devices]
    return devices.of_container(
        container.config.devices,
        [*configured, *allowed.devices(settings.allowed_devices)],
        all_of_host=security.privileged and not handler.privileged_without_host_devices,
    )


def crio_annotations(pod: Pod, container: Container, layout: Layout) -> dict[str, str]:
    """What CRI-O writes into a config.json, for the tools that read it there.

    The caller's own annotations are data inside one of these values, and no annotations of the spec themselves unless
    the handler allows them: an external runtime acts on some names (CVE-2024-3154).
    """
    config, meta = container.config, pod.config.metadata
    values = {
        "Annotations": json.dumps(dict(config.annotations)),
        "ContainerID": container.id,
        "ContainerName": container.name,
        "ContainerType": "container",
        "Created": str(container.created_at),
        "HostName": pod.hostname,
        "CgroupParent": pod.cgroup,
        "HostNetwork": str(pod.config.namespaces.network is NamespaceMode.NODE).lower(),
        "Image": container.image_id.removeprefix("sha256:"),
        "ImageName": config.image.user_specified_image or config.image.image,
        "ImageRef": container.image_ref,
        "KubeName": meta.name,
        "Labels": json.dumps(dict(config.labels)),
        "LogPath": container.log_path,
        "Metadata": json.dumps(to_json(config.metadata)),
        "MountPoint": str(layout.bundle(container.id) / "rootfs"),
        "Name": container.name,
        "Namespace": meta.namespace,
        "NamespaceOptions": json.dumps(to_json(pod.config.namespaces)),
        "PrivilegedRuntime": str(config.linux.security_context.privileged).lower(),
        "ResolvPath": str(layout.pod_dir(pod.id) / "resolv.conf"),
        "HostnamePath": str(layout.pod_dir(pod.id) / "hostname"),
        "RuntimeHandler": container.handler,
        "SandboxID": pod.id,
        "SandboxName": pod.name,
        "ShmPath": str(layout.shm(pod.id)),
        "Stdin": str(config.stdin).lower(),
        "StdinOnce": str(config.stdin_once).lower(),
        "TTY": str(config.tty).lower(),
        "Volumes": json.dumps([to_json(mount) for mount in config.mounts]),
    }
    values |= {f"IP.{index}": ip for index, ip in enumerate(pod.ips)}
    return {f"io.kubernetes.cri-o.{name}": value for name, value in values.items()}
