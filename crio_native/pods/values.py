"""The pod's and the container's configuration as typed values, and how they are kept as JSON.

Here belongs what a caller asked for, in the CRI's own field names, so that an error can name the field as the caller
wrote it.  `cri/` makes these values from protobuf once, at the door; what the program itself adds to them (ids,
states, times) is in `records`.  A field that is not here is not understood: the door refuses a message that sets it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

T = TypeVar("T")


class NamespaceMode(IntEnum):
    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class MountPropagation(IntEnum):
    PROPAGATION_PRIVATE = 0
    PROPAGATION_HOST_TO_CONTAINER = 1
    PROPAGATION_BIDIRECTIONAL = 2


class ProfileType(IntEnum):
    RuntimeDefault = 0
    Unconfined = 1
    Localhost = 2


class GroupsPolicy(IntEnum):
    Merge = 0
    Strict = 1


class Protocol(IntEnum):
    TCP = 0
    UDP = 1
    SCTP = 2


@dataclass(frozen=True, slots=True)
class IDMapping:
    host_id: int = 0
    container_id: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class UserNamespace:
    mode: NamespaceMode = NamespaceMode.POD
    uids: tuple[IDMapping, ...] = ()
    gids: tuple[IDMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class NamespaceOption:
    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None


@dataclass(frozen=True, slots=True)
class SecurityProfile:
    profile_type: ProfileType = ProfileType.RuntimeDefault
    localhost_ref: str = ""


@dataclass(frozen=True, slots=True)
class SELinuxOption:
    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


@dataclass(frozen=True, slots=True)
class HugepageLimit:
    page_size: str = ""
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Resources:
    """LinuxContainerResources: cpu times in microseconds, memory in bytes; 0 and "" leave a limit unset."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit_in_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: Mapping[str, str] = field(default_factory=dict)
    memory_swap_limit_in_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DNSConfig:
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMapping:
    protocol: Protocol = Protocol.TCP
    container_port: int = 0
    host_port: int = 0
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class PodMetadata:
    name: str = ""
    uid: str = ""
    namespace: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class PodSecurity:
    namespace_options: NamespaceOption = field(default_factory=NamespaceOption)
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: GroupsPolicy = GroupsPolicy.Merge
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    seccomp_profile_path: str = ""


@dataclass(frozen=True, slots=True)
class LinuxPodConfig:
    cgroup_parent: str = ""
    security_context: PodSecurity = field(default_factory=PodSecurity)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    overhead: Resources | None = None
    resources: Resources | None = None


@dataclass(frozen=True, slots=True)
class PodConfig:
    """PodSandboxConfig."""

    metadata: PodMetadata = field(default_factory=PodMetadata)
    hostname: str = ""
    log_directory: str = ""
    dns_config: DNSConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    linux: LinuxPodConfig = field(default_factory=LinuxPodConfig)

    @property
    def namespaces(self) -> NamespaceOption:
        return self.linux.security_context.namespace_options


@dataclass(frozen=True, slots=True)
class ContainerMetadata:
    name: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ImageSpec:
    image: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    user_specified_image: str = ""
    runtime_handler: str = ""
    image_ref: str = ""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class Mount:
    """host_path or image is what is mounted; uidMappings and gidMappings are spelt as in the CRI."""

    container_path: str = ""
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: MountPropagation = MountPropagation.PROPAGATION_PRIVATE
    uidMappings: tuple[IDMapping, ...] = ()
    gidMappings: tuple[IDMapping, ...] = ()
    recursive_read_only: bool = False
    image: ImageSpec | None = None
    image_sub_path: str = ""
    mount_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


@dataclass(frozen=True, slots=True)
class CDIDevice:
    name: str = ""


@dataclass(frozen=True, slots=True)
class Capability:
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    add_ambient_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ContainerSecurity:
    capabilities: Capability = field(default_factory=Capability)
    privileged: bool = False
    namespace_options: NamespaceOption | None = None
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: GroupsPolicy = GroupsPolicy.Merge
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    apparmor_profile: str = ""
    seccomp_profile_path: str = ""


@dataclass(frozen=True, slots=True)
class LinuxContainerConfig:
    resources: Resources = field(default_factory=Resources)
    security_context: ContainerSecurity = field(default_factory=ContainerSecurity)


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """ContainerConfig of the CRI.  stop_signal: the CRI's enum name (``SIGNAL_SIGTERM``), "" for the default."""

    metadata: ContainerMetadata = field(default_factory=ContainerMetadata)
    image: ImageSpec = field(default_factory=ImageSpec)
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[KeyValue, ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    CDI_devices: tuple[CDIDevice, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    linux: LinuxContainerConfig = field(default_factory=LinuxContainerConfig)
    stop_signal: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a field holds.  kind: scalar, enum, value, optional, list or map.  inner: the class, or the item's shape."""

    kind: str
    inner: Any


_SHAPES: dict[type, dict[str, Shape]] = {}


def shapes(cls: type) -> Mapping[str, Shape]:
    """The shape of each field of a value class, worked out once."""
    if cls not in _SHAPES:
        hints = typing.get_type_hints(cls)
        _SHAPES[cls] = {f.name: _shape(hints[f.name]) for f in dataclasses.fields(cls)}
    return _SHAPES[cls]


def _shape(hint: Any) -> Shape:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [a for a in args if a is not type(None)]
        return Shape("optional", _shape(inner))
    if origin is tuple:
        return Shape("list", _shape(args[0]))
    if origin is Mapping or hint is dict:
        return Shape("map", None)
    if dataclasses.is_dataclass(hint):
        return Shape("value", hint)
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return Shape("enum", hint)
    return Shape("scalar", hint)


def to_json(value: Any) -> dict[str, Any]:
    """A value as plain JSON data; the inverse of `from_json`."""
    return dataclasses.asdict(value)


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """A value from its JSON; fields that are missing get their defaults, unknown ones are dropped (older versions)."""
    known = shapes(cls)
    return cls(**{name: _read(known[name], item) for name, item in data.items() if name in known})


def _read(shape: Shape, item: Any) -> Any:
    match shape.kind:
        case "optional":
            return None if item is None else _read(shape.inner, item)
        case "list":
            return tuple(_read(shape.inner, each) for each in item)
        case "value":
            return from_json(shape.inner, item)
        case "enum":
            return shape.inner(item)
        case _:
            return item
