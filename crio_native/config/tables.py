# ruff: noqa: RUF009 - option, table and named are the schema's field()
"""Every option: its name and type as CRI-O has them, its default, and what it means here.

Each table of crio.conf is one immutable class; nothing else in the program repeats an option's name, default or text.
Values are already parsed: durations are seconds (float), sizes bytes (int), capabilities "CAP_NAME", lists tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from crio_native.config.kinds import (
    CAPABILITY,
    CPUSET,
    DEVICE,
    DEVICE_PATH,
    DURATION,
    ENVIRONMENT,
    FLAG,
    ID_MAPPINGS,
    IMAGE,
    OPTIONAL_PATH,
    PATH,
    PORT_TEXT,
    REGEX,
    SIZE,
    SOCKET,
    SYSCTL,
    TEXT,
    TIMEZONE,
    ULIMIT,
    choice,
    integer,
    many,
    mapping,
    or_default,
)
from crio_native.config.schema import named, no_entries, option, table
from crio_native.config.values import Device, IDMapping, Sysctl, Ulimit

MIB = 1 << 20

METRICS = (
    "containers_events_dropped_total",
    "containers_oom_count_total",
    "containers_oom_total",
    "containers_seccomp_notifier_count_total",
    "containers_stopped_monitor_count",
    "default_runtime",
    "image_layer_reuse_total",
    "image_pulls_bytes_total",
    "image_pulls_failure_total",
    "image_pulls_layer_size",
    "image_pulls_skipped_bytes_total",
    "image_pulls_success_total",
    "operations_errors_total",
    "operations_latency_seconds",
    "operations_latency_seconds_total",
    "operations_total",
    "processes_defunct",
    "resources_stalled_at_stage",
)
_PAUSE = "a pod's first process is a program of the daemon's own, and no image is pulled for it"
_NRI = "this version serves no NRI plugins"
_TRACES = "this version sends no traces"
POD_METRICS = "all cpu disk diskIO hugetlb memory network oom pressure process spec".split()


@dataclass(frozen=True, slots=True)
class RootTable:
    """[crio]: where state is kept."""

    root: str = option(
        "/var/lib/crio-native", PATH, "Directory of images, layers and all state that survives a reboot."
    )
    runroot: str = option("/run/crio-native", PATH, "Directory of state that is gone after a reboot; on a tmpfs.")
    storage_driver: str = option(
        "overlay",
        choice("overlay", "vfs", "btrfs"),
        'How layers become a root file system; "vfs" copies them for each container, "btrfs" makes snapshots.',
    )
    storage_option: tuple[str, ...] = option((), many(TEXT), "Options of the storage driver.", flag="storage-opt")
    imagestore: str = option("", OPTIONAL_PATH, "Directory of images, where it is not below root.")
    log_dir: str = option("/var/log/crio/pods", PATH, "Container logs, where the kubelet names no directory for them.")
    version_file: str = option(
        "/var/run/crio/version", PATH, "Marks a boot: where it is missing, containers of an earlier boot are removed."
    )
    version_file_persist: str = option(
        "", OPTIONAL_PATH, "Marks an upgrade: where it names an older version, images are removed."
    )
    clean_shutdown_file: str = option(
        "/var/lib/crio/clean.shutdown",
        OPTIONAL_PATH,
        "Marks an orderly stop: where it is missing, images are verified.",
    )
    internal_wipe: bool = option(
        True,
        FLAG,
        "Remove pods of an earlier boot, and unused images of an older version, at the start.",
        deprecated="leave it out; with false, `crio-native wipe` does it, before the first start after boot or upgrade",
    )
    internal_repair: bool = option(True, FLAG, "Verify and repair the image store after a stop that was not orderly.")


@dataclass(frozen=True, slots=True)
class ApiTable:
    """[crio.api]: the CRI socket and the streaming server."""

    listen: str = option("/var/run/crio/crio.sock", SOCKET, "Unix socket that serves the CRI.")
    stream_address: str = option("127.0.0.1", TEXT, "Address of the server for exec, attach and port-forward.")
    stream_port: int = option(0, PORT_TEXT, 'Its port; "0" for any free one.')
    stream_enable_tls: bool = option(False, FLAG, "Serve streams by TLS.")
    stream_tls_cert: str = option("", OPTIONAL_PATH, "Certificate of the streaming server (PEM).")
    stream_tls_key: str = option("", OPTIONAL_PATH, "Private key of the streaming server (PEM).")
    stream_tls_ca: str = option("", OPTIONAL_PATH, "Authority that clients' certificates must be signed by (PEM).")
    stream_idle_timeout: float = option(0.0, DURATION, "Close a stream that carried nothing for so long; 0 for never.")
    tls_min_version: str = option(
        "VersionTLS12",
        choice("VersionTLS10", "VersionTLS11", "VersionTLS12", "VersionTLS13"),
        "Oldest TLS version that the streaming and metrics servers speak.",
    )
    tls_cipher_suites: tuple[str, ...] = option(
        (), many(TEXT), "TLS cipher suites they offer; empty for all good ones."
    )
    grpc_max_send_msg_size: int = option(80 * MIB, integer(1, 2**31 - 1), "Largest CRI answer, in bytes.")
    grpc_max_recv_msg_size: int = option(80 * MIB, integer(1, 2**31 - 1), "Largest CRI request, in bytes.")


@dataclass(frozen=True, slots=True)
class RuntimeHandler:
    """[crio.runtime.runtimes.NAME]: one way to run containers, chosen by a pod's RuntimeClass."""

    runtime_type: str = option(
        "oci",
        choice("builtin", "oci", "vm", "pod", ""),
        'Who makes the containers: "builtin" this program itself, "oci" a runtime binary such as runc or crun, '
        '"vm" a shim v2 such as Kata\'s; empty is "oci". CRI-O\'s "pod" is refused: "builtin" serves its purpose.',
    )
    runtime_path: str = option(
        "", OPTIONAL_PATH, "The runtime's or shim's program; empty to look NAME up in PATH, and for builtin."
    )
    runtime_root: str = option("", OPTIONAL_PATH, "Where an oci runtime keeps its state; empty for /run/NAME.")
    runtime_config_path: str = option("", OPTIONAL_PATH, "The shim's own configuration file (vm only).")
    inherit_default_runtime: bool = option(
        False, FLAG, "Take runtime_type, runtime_path and runtime_root from the default handler."
    )
    privileged_without_host_devices: bool = option(False, FLAG, "Keep the host's devices out of privileged containers.")
    allowed_annotations: tuple[str, ...] = option(
        (), many(TEXT), "Pod annotations, by name or prefix, that may change how this handler runs a container."
    )
    default_annotations: Mapping[str, str] = option(
        no_entries, mapping(TEXT), "Annotations that every container of this handler gets."
    )
    monitor_path: str = option(
        "", OPTIONAL_PATH, "The monitor's program; empty for the one that belongs to this program."
    )
    monitor_cgroup: str = option(
        "",
        TEXT,
        "Where monitors run: \"pod\" in the pod's cgroup, a systemd slice, or empty for the daemon's own cgroup.",
    )
    monitor_env: tuple[str, ...] = option((), many(ENVIRONMENT), "Environment variables of the monitor.")
    monitor_exec_cgroup: str = option(
        "", choice("", "container"), "\"container\": an exec's monitor runs in the container's cgroup."
    )
    container_min_memory: int = option(
        12 * MIB, or_default(SIZE, 12 * MIB), "A container with a smaller memory limit is refused."
    )
    container_create_timeout: int = option(
        240, integer(0, 86400), "Seconds that making a container may take.", floor=30
    )
    no_sync_log: bool = option(False, FLAG, "Do not flush a container's log to the disk when it is rotated or ends.")
    stream_websockets: bool = option(
        False,
        FLAG,
        "Let the runtime serve streams by WebSocket.",
        inert="only conmon-rs can; the daemon serves WebSockets itself, for every handler",
    )
    exec_cpu_affinity: str = option(
        "", choice("", "first"), '"first": an exec starts on the first CPU of the container\'s set.'
    )
    seccomp_profile: str = option("", OPTIONAL_PATH, "Seccomp profile of this handler, instead of crio.runtime's.")
    platform_runtime_paths: Mapping[str, str] = option(
        no_entries, mapping(PATH), 'Runtime programs for other platforms, by "os/arch".'
    )
    runtime_pull_image: bool = option(
        False,
        FLAG,
        "The runtime pulls the image itself (confidential containers).",
        inert="the daemon pulls every image, and the runtime gets the files",
    )


@dataclass(frozen=True, slots=True)
class WorkloadResources:
    """[crio.runtime.workloads.NAME.resources]: what a workload's containers get; 0 and "" leave the pod's values."""

    cpushares: int = option(0, integer(0, 262144), "CPU shares.")
    cpuquota: int = option(0, integer(-1), "Microseconds of CPU time in each period.")
    cpuperiod: int = option(0, integer(0, 1_000_000), "The period, in microseconds.")
    cpuset: str = option("", CPUSET, "CPUs.")
    cpulimit: int = option(0, integer(0), "Limit in thousandths of a CPU; sets cpuquota.")


@dataclass(frozen=True, slots=True)
class Workload:
    """[crio.runtime.workloads.NAME]: resources for pods that carry an annotation."""

    activation_annotation: str = option("", TEXT, "The annotation by which a pod joins the workload.")
    annotation_prefix: str = option("", TEXT, "Prefix of the annotations by which a pod overrides the resources.")
    allowed_annotations: tuple[str, ...] = option(
        (), many(TEXT), "Annotations allowed to the workload's pods, beside the handler's."
    )
    resources: WorkloadResources = table(WorkloadResources)


def builtin_handler() -> Mapping[str, RuntimeHandler]:
    return MappingProxyType({"builtin": RuntimeHandler(runtime_type="builtin")})


@dataclass(frozen=True, slots=True)
class RuntimeTable:
    """[crio.runtime]: how containers are made and run."""

    default_runtime: str = option("builtin", TEXT, "The handler of pods that ask for none.", reload=True)
    runtimes: Mapping[str, RuntimeHandler] = named(
        RuntimeHandler,
        "The handlers. `builtin` exists without being written, and so does `crun` or `runc` as the default_runtime.",
        builtin_handler,
    )
    workloads: Mapping[str, Workload] = named(Workload, "The workloads.")
    cgroup_manager: str = option(
        "cgroupfs",
        choice("systemd", "cgroupfs"),
        "Who makes cgroups; the kubelet must be told the same.",
    )
    log_level: str = option(
        "info", choice("trace", "debug", "info", "warn", "error", "fatal", "panic"), "What is logged.", reload=True
    )
    log_filter: str = option("", REGEX, "Log only messages that match; empty for all.", reload=True)
    log_to_journald: bool = option(False, FLAG, "Send containers' output to the journal as well.", flag="log-journald")
    conmon: str = option(
        "", OPTIONAL_PATH, "Monitor of all oci handlers.", deprecated="use monitor_path of the handler"
    )
    conmon_cgroup: str = option("", TEXT, "Its cgroup.", deprecated="use monitor_cgroup of the handler")
    conmon_env: tuple[str, ...] = option(
        (), many(ENVIRONMENT), "Its environment.", deprecated="use monitor_env of the handler"
    )
    seccomp_profile: str = option(
        "",
        OPTIONAL_PATH,
        "RuntimeDefault's seccomp profile; empty for the one that comes with the program.",
        reload=True,
    )
    privileged_seccomp_profile: str = option(
        "", OPTIONAL_PATH, "Seccomp profile of privileged containers; empty for none.", reload=True
    )
    apparmor_profile: str = option("crio-default", TEXT, "RuntimeDefault's AppArmor profile.", reload=True)
    selinux: bool = option(
        True, FLAG, "Label containers where the host runs SELinux.", deprecated="it follows the host's state"
    )
    hostnetwork_disable_selinux: bool = option(True, FLAG, "Pods in the host's network run unconfined by SELinux.")
    default_capabilities: tuple[str, ...] = option(
        (
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_KILL",
        ),
        many(CAPABILITY),
        "Capabilities that a container has before its pod adds or drops any.",
    )
    add_inheritable_capabilities: bool = option(
        False, FLAG, "Fill the inheritable set too. Programs with file capabilities then regain them: leave it off."
    )
    default_sysctls: tuple[Sysctl, ...] = option((), many(SYSCTL), "Sysctls of every pod, without spaces around '='.")
    default_ulimits: tuple[Ulimit, ...] = option(
        (), many(ULIMIT), "Resource limits of every container; others are the daemon's."
    )
    default_env: tuple[str, ...] = option((), many(ENVIRONMENT), "Environment variables of every container.")
    min_injected_gomaxprocs: int = option(
        0, integer(0, 4096), "Least GOMAXPROCS to set by a container's CPU request; 0 to set none."
    )
    allowed_devices: tuple[str, ...] = option(
        ("/dev/fuse", "/dev/net/tun"), many(DEVICE_PATH), "Devices that a pod may ask for by annotation."
    )
    additional_devices: tuple[Device, ...] = option((), many(DEVICE), "Devices of every container.")
    device_ownership_from_security_context: bool = option(
        False, FLAG, "Give a container's devices to its user and group."
    )
    cdi_spec_dirs: tuple[str, ...] = option(
        ("/etc/cdi", "/var/run/cdi"), many(PATH), "Directories of CDI device specifications.", reload=True
    )
    hooks_dir: tuple[str, ...] = option(
        ("/usr/share/containers/oci/hooks.d",), many(PATH), "Directories of OCI hooks; later ones win."
    )
    default_mounts_file: str = option(
        "", OPTIONAL_PATH, "File of /SOURCE:/DESTINATION lines mounted in every container."
    )
    absent_mount_sources_to_reject: tuple[str, ...] = option(
        (), many(PATH), "Host paths that must exist to be mounted; others are made as directories."
    )
    bind_mount_prefix: str = option(
        "", OPTIONAL_PATH, "Put before the source of bind mounts (a daemon in a container)."
    )
    read_only: bool = option(False, FLAG, "Read-only root file systems, with tmpfs on /run, /tmp and /var/tmp.")
    no_pivot: bool = option(False, FLAG, "Move the root mount instead of pivot_root (a host on a ramdisk).")
    pids_limit: int = option(
        -1, integer(-1), "Most processes in a container; -1 for no limit.", deprecated="use the kubelet's podPidsLimit"
    )
    log_size_max: int = option(
        -1,
        integer(-1),
        "Largest log file, in bytes; -1 for no limit.",
        deprecated="use the kubelet's containerLogMaxSize",
    )
    container_exits_dir: str = option("/var/run/crio/exits", PATH, "Where exit codes are written for other programs.")
    container_attach_socket_dir: str = option("/var/run/crio", PATH, "Directory of attach sockets.")
    ctr_stop_timeout: int = option(
        30, integer(0, 3600), "Seconds that a killed container may take to end before its stop has failed.", floor=30
    )
    drop_infra_ctr: bool = option(True, FLAG, "No pause process, but for pods that share their PID namespace.")
    infra_ctr_cpuset: str = option("", CPUSET, "CPUs of pause processes and monitors.")
    shared_cpuset: str = option("", CPUSET, "CPUs that containers with pinned CPUs may share by annotation.")
    namespaces_dir: str = option("/var/run", PATH, "Where namespaces are pinned, in one directory for each kind.")
    pinns_path: str = option(
        "", OPTIONAL_PATH, "Program that pins namespaces.", deprecated="the daemon pins them itself"
    )
    uid_mappings: tuple[IDMapping, ...] = option(
        (), ID_MAPPINGS, "User ids of containers.", deprecated="use hostUsers: false in the pod"
    )
    gid_mappings: tuple[IDMapping, ...] = option(
        (), ID_MAPPINGS, "Group ids of containers.", deprecated="use hostUsers: false in the pod"
    )
    minimum_mappable_uid: int = option(
        -1,
        integer(-1, 2**32 - 2),
        "Least host user id to map; -1 for any.",
        deprecated="use hostUsers: false in the pod",
    )
    minimum_mappable_gid: int = option(
        -1,
        integer(-1, 2**32 - 2),
        "Least host group id to map; -1 for any.",
        deprecated="use hostUsers: false in the pod",
    )
    enable_criu_support: bool = option(
        True, FLAG, "Checkpoint and restore.", deprecated="use crio.checkpoint_restore.container_level_enabled"
    )
    enable_pod_events: bool = option(
        False,
        FLAG,
        "Tell a pod's status with those of its containers, for a kubelet that lives by events (Evented PLEG).",
    )
    disable_hostport_mapping: bool = option(False, FLAG, "Leave host ports to the network plugin.")
    timezone: str = option("", TIMEZONE, "Time zone of containers; empty leaves the image's.")
    blockio_config_file: str = option("", OPTIONAL_PATH, "Block I/O classes.", reload=True)
    blockio_reload: bool = option(False, FLAG, "Read that file again for each container.")
    rdt_config_file: str = option(
        "",
        OPTIONAL_PATH,
        "Cache and memory bandwidth classes (RDT).",
        reload=True,
        inert="no groups are made from it; a container joins a group of /sys/fs/resctrl that exists, by its annotation",
    )
    irqbalance_config_file: str = option(
        "/etc/sysconfig/irqbalance", OPTIONAL_PATH, "irqbalance's configuration, for containers with pinned CPUs."
    )
    irqbalance_config_restore_file: str = option(
        "/etc/sysconfig/orig_irq_banned_cpus",
        TEXT,
        'Where its first state is kept, to be restored at start; "disable" to leave it.',
    )
    decryption_keys_path: str = option(
        "/etc/crio/keys/", OPTIONAL_PATH, "Directory of keys of encrypted images.", reload=True
    )
    additional_artifact_stores: tuple[str, ...] = option(
        (),
        many(PATH),
        "Read-only stores of OCI artifacts.",
        inert="artifacts are kept as images are; name stores of both in crio.storage_option, as additionalimagestore",
    )
    separate_pull_cgroup: str = option(
        "",
        TEXT,
        'cgroup that images are pulled in: "pod", a name, or empty for the daemon\'s own.',
        inert="images are pulled by the daemon's own threads, which cannot leave its cgroup",
    )


@dataclass(frozen=True, slots=True)
class ImageTable:
    """[crio.image]: pulling and keeping images."""

    default_transport: str = option("docker://", choice("docker://"), "What a name without a transport means.")
    global_auth_file: str = option("", OPTIONAL_PATH, "Registry credentials, in the form of a docker config.json.")
    namespaced_auth_dir: str = option(
        "/etc/crio/auth",
        OPTIONAL_PATH,
        "Credentials by pod namespace: NAMESPACE-SHA256.json, the sum being the image's.",
    )
    pause_image: str = option(
        "registry.k8s.io/pause:3.10.1", IMAGE, "Image of pause containers, where a handler needs one.", reload=True
    )
    pause_image_auth_file: str = option("", OPTIONAL_PATH, "Credentials to pull it.", reload=True, inert=_PAUSE)
    pause_command: str = option("/pause", TEXT, "Its command; empty for the image's own.", reload=True, inert=_PAUSE)
    pinned_images: tuple[str, ...] = option(
        (), many(TEXT), "Images never garbage-collected: a name, `name*`, or `*part*`.", reload=True
    )
    signature_policy: str = option("", OPTIONAL_PATH, "Trust policy; empty for /etc/containers/policy.json.")
    signature_policy_dir: str = option(
        "/etc/crio/policies", OPTIONAL_PATH, "Trust policies by pod namespace: NAMESPACE.json."
    )
    image_volumes: str = option(
        "mkdir",
        choice("mkdir", "bind", "ignore"),
        "An image's VOLUMEs: make the directory in the container, mount one from outside it, or nothing.",
    )
    insecure_registries: tuple[str, ...] = option(
        (),
        many(TEXT),
        "Registries that may be spoken to without TLS.",
        flag="insecure-registry",
    )
    big_files_temporary_dir: str = option(
        "",
        OPTIONAL_PATH,
        "Where blobs are kept while they arrive.",
        inert="layers are unpacked while they arrive, and no blob rests on the disk",
    )
    auto_reload_registries: bool = option(False, FLAG, "Follow changes below registries.conf.d without SIGHUP.")
    pull_progress_timeout: float = option(
        0.0, DURATION, "Give up a pull that brought nothing for so long; 0 for never."
    )
    oci_artifact_mount_support: bool = option(True, FLAG, "OCI artifacts may be mounted as volumes.")
    short_name_mode: str = option(
        "enforcing",
        choice("enforcing", "disabled"),
        'A name without a registry that several registries may mean: "enforcing" refuses it, "disabled" tries them.',
    )


@dataclass(frozen=True, slots=True)
class NetworkTable:
    """[crio.network]: the pod network."""

    cni_default_network: str = option("", TEXT, "Name of the network to use; empty for that of the first file.")
    network_dir: str = option("/etc/cni/net.d/", PATH, "Directory of network configurations.", flag="cni-config-dir")
    plugin_dirs: tuple[str, ...] = option(
        ("/opt/cni/bin/",), many(PATH), "Directories of CNI plugins, where a network needs them.", flag="cni-plugin-dir"
    )
    plugin_dir: str = option("", OPTIONAL_PATH, "One more of them.", deprecated="use crio.network.plugin_dirs")
    cni_status_grace_period: float = option(
        0.0, DURATION, "How long a network that reports itself unready still counts as ready; 0 for not at all."
    )


@dataclass(frozen=True, slots=True)
class MetricsTable:
    """[crio.metrics]: the Prometheus endpoint."""

    enable_metrics: bool = option(False, FLAG, "Serve metrics.")
    metrics_collectors: tuple[str, ...] = option(
        METRICS, many(TEXT), "Which of them; with or without the prefix container_runtime_crio_ or crio_."
    )
    metrics_host: str = option("127.0.0.1", TEXT, "Address to serve on.")
    metrics_port: int = option(9090, integer(0, 65535), "Port to serve on.")
    metrics_socket: str = option("", OPTIONAL_PATH, "Unix socket to serve on as well.")
    metrics_cert: str = option("", OPTIONAL_PATH, "TLS certificate (PEM).")
    metrics_key: str = option("", OPTIONAL_PATH, "TLS private key (PEM).")


@dataclass(frozen=True, slots=True)
class TracingTable:
    """[crio.tracing]: OpenTelemetry."""

    enable_tracing: bool = option(False, FLAG, "Send traces.", inert=_TRACES)
    tracing_endpoint: str = option("127.0.0.1:4317", TEXT, "OTLP collector (gRPC) that takes them.", inert=_TRACES)
    tracing_sampling_rate_per_million: int = option(
        0, integer(0, 1_000_000), "How many calls of a million are traced.", inert=_TRACES
    )


@dataclass(frozen=True, slots=True)
class StatsTable:
    """[crio.stats]: statistics of pods and containers."""

    collection_period: int = option(0, integer(0, 86400), "Seconds between readings; 0 to read when asked.")
    stats_collection_period: int = option(
        0, integer(0, 86400), "The same.", deprecated="use crio.stats.collection_period"
    )
    included_pod_metrics: tuple[str, ...] = option(
        (), many(choice(*POD_METRICS)), "Groups of metrics in ListPodSandboxMetrics."
    )


@dataclass(frozen=True, slots=True)
class ValidatorTable:
    """[crio.nri.default_validator]: what plugins must not do."""

    nri_enable_default_validator: bool = option(False, FLAG, "Check plugins' adjustments.", inert=_NRI)
    nri_validator_reject_oci_hook_adjustment: bool = option(False, FLAG, "Refuse OCI hooks.", inert=_NRI)
    nri_validator_reject_runtime_default_seccomp_adjustment: bool = option(
        False, FLAG, "Refuse changes of the RuntimeDefault seccomp profile.", inert=_NRI
    )
    nri_validator_reject_unconfined_seccomp_adjustment: bool = option(
        False, FLAG, "Refuse changes of an unconfined seccomp profile.", inert=_NRI
    )
    nri_validator_reject_custom_seccomp_adjustment: bool = option(
        False, FLAG, "Refuse changes of a Localhost seccomp profile.", inert=_NRI
    )
    nri_validator_reject_namespace_adjustment: bool = option(False, FLAG, "Refuse changes of namespaces.", inert=_NRI)
    nri_validator_required_plugins: tuple[str, ...] = option(
        (), many(TEXT), "Plugins without which no container is made.", inert=_NRI
    )
    nri_validator_tolerate_missing_plugins_annotation: str = option(
        "", TEXT, "Annotation by which a pod does without them.", inert=_NRI
    )


@dataclass(frozen=True, slots=True)
class NriTable:
    """[crio.nri]: node resource interface plugins."""

    enable_nri: bool = option(False, FLAG, "Serve NRI plugins.", inert=_NRI)
    nri_listen: str = option(
        "/var/run/nri/nri.sock", SOCKET, "Unix socket for plugins that connect by themselves.", inert=_NRI
    )
    nri_plugin_dir: str = option("/opt/nri/plugins", PATH, "Directory of plugins that the daemon starts.", inert=_NRI)
    nri_plugin_config_dir: str = option("/etc/nri/conf.d", PATH, "Directory of their configurations.", inert=_NRI)
    nri_plugin_registration_timeout: float = option(
        5.0, DURATION, "How long a plugin may take to register.", inert=_NRI
    )
    nri_plugin_request_timeout: float = option(2.0, DURATION, "How long a plugin may take to answer.", inert=_NRI)
    nri_disable_connections: bool = option(False, FLAG, "Admit only plugins that the daemon started.", inert=_NRI)
    default_validator: ValidatorTable = table(ValidatorTable)


@dataclass(frozen=True, slots=True)
class CheckpointRestoreTable:
    """[crio.checkpoint_restore]: checkpoints of containers."""

    container_level_enabled: str = option(
        "checkpoint_restore",
        choice("none", "checkpoint_only", "checkpoint_restore"),
        "What is allowed; nothing is where the program criu is missing.",
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; `crio` is the table [crio] itself, the others are tables inside it."""

    crio: RootTable = table(RootTable)
    api: ApiTable = table(ApiTable)
    runtime: RuntimeTable = table(RuntimeTable)
    image: ImageTable = table(ImageTable)
    network: NetworkTable = table(NetworkTable)
    metrics: MetricsTable = table(MetricsTable)
    tracing: TracingTable = table(TracingTable)
    stats: StatsTable = table(StatsTable)
    nri: NriTable = table(NriTable)
    checkpoint_restore: CheckpointRestoreTable = table(CheckpointRestoreTable)
