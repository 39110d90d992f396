"""The security part of a container's config.json: seccomp, AppArmor, masked and read-only paths.

The CRI has two generations of fields for seccomp and AppArmor; both are read here, the structured one first.  Who says
nothing of seccomp runs unconfined by it, as the CRI has it (the kubelet always says something), and under AppArmor's
default profile.  What the host does not have is refused when a caller asks for it by name, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.oci.spec import normalise
from crio_native.pods.host import Host
from crio_native.pods.profiles import SeccompProfiles
from crio_native.pods.records import Pod
from crio_native.pods.values import (
    ContainerSecurity,
    IDMapping,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
    SecurityProfile,
    UserNamespace,
)

MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_WHERE = "config.linux.security_context"


def profile(asked: SecurityProfile | None, path: str, field: str, unset: ProfileType) -> SecurityProfile:
    """The profile that the structured field or the deprecated path names; unset: what it is when neither does.  Raises
    InvalidArgument."""
    if asked is not None:
        return asked
    match path:
        case "":
            return SecurityProfile(unset)
        case "runtime/default" | "docker/default":
            return SecurityProfile(ProfileType.RuntimeDefault)
        case "unconfined":
            return SecurityProfile(ProfileType.Unconfined)
        case _ if path.startswith("localhost/"):
            return SecurityProfile(ProfileType.Localhost, path.removeprefix("localhost/"))
    raise InvalidArgument(field, path, "must be runtime/default, unconfined or localhost/PROFILE")


def seccomp(
    security: ContainerSecurity,
    profiles: SeccompProfiles,
    capabilities: Sequence[str],
    *,
    default: str,
    privileged: str,
) -> dict[str, Any] | None:
    """The `linux.seccomp` object, None for unconfined.

    default, privileged: paths of the configured profiles, "" for the built-in one and for none.  Raises
    InvalidArgument.
    """
    wanted = profile(
        security.seccomp, security.seccomp_profile_path, f"{_WHERE}.seccomp_profile_path", ProfileType.Unconfined
    )
    if security.privileged:
        return profiles.localhost(privileged, capabilities) if privileged else None
    match wanted.profile_type:
        case ProfileType.Unconfined:
            return None
        case ProfileType.RuntimeDefault:
            return profiles.default(default, capabilities)
    if not wanted.localhost_ref.startswith("/"):
        raise InvalidArgument(f"{_WHERE}.seccomp.localhost_ref", wanted.localhost_ref, "must be an absolute path")
    try:
        return profiles.localhost(wanted.localhost_ref, capabilities)
    except InvalidArgument as error:
        raise InvalidArgument(f"{_WHERE}.seccomp.localhost_ref", wanted.localhost_ref, error.reason) from None


def apparmor(security: ContainerSecurity, host: Host, default: str) -> str:
    """The AppArmor profile's name, "" for none.  Raises InvalidArgument, FailedPrecondition."""
    wanted = profile(
        security.apparmor, security.apparmor_profile, f"{_WHERE}.apparmor_profile", ProfileType.RuntimeDefault
    )
    if security.privileged or wanted.profile_type is ProfileType.Unconfined:
        return "unconfined" if host.apparmor else ""
    if wanted.profile_type is ProfileType.Localhost:
        # A kubelet names the profile; other clients write here, too, what the deprecated field takes.
        name = wanted.localhost_ref.removeprefix("localhost/")
        if not name or len(name) > 1024 or not name.isprintable():
            raise InvalidArgument(f"{_WHERE}.apparmor.localhost_ref", name, "must be the name of a loaded profile")
        if not host.apparmor:
            raise FailedPrecondition(
                f"{_WHERE}.apparmor: the profile {name!r} is asked for, but this host's kernel has no AppArmor"
            )
        return name
    return default if host.apparmor else ""


def hidden_paths(security: ContainerSecurity, *, own_user_namespace: bool) -> tuple[list[str], list[str]]:
    """The masked and the read-only paths.

    An empty list on the wire may mean "none" or "not said".  In a user namespace of the pod's own it is "none", which
    is how the kubelet says `procMount: Unmasked`; elsewhere, where the kubelet never says it, the defaults are the safe
    reading.  A privileged container gets neither.  Raises InvalidArgument.
    """
    if security.privileged:
        return [], []
    masked, readonly = security.masked_paths, security.readonly_paths
    if not own_user_namespace:
        masked, readonly = masked or MASKED_PATHS, readonly or READONLY_PATHS
    for name, paths in (("masked_paths", masked), ("readonly_paths", readonly)):
        for index, path in enumerate(paths):
            if not path.startswith("/"):
                raise InvalidArgument(f"{_WHERE}.{name}[{index}]", path, "must be an absolute path")
            if name == "masked_paths" and normalise(path) == "/":
                raise InvalidArgument(f"{_WHERE}.{name}[{index}]", path, "must be below /: nothing would be left")
    return list(masked), list(readonly)


def check_namespaces(options: NamespaceOption, field: str) -> None:
    """Refuse modes that a field does not have; user namespaces have a module of their own, `userns`."""
    for name, allowed in (
        ("network", (NamespaceMode.POD, NamespaceMode.NODE)),
        ("ipc", (NamespaceMode.POD, NamespaceMode.NODE)),
        ("pid", tuple(NamespaceMode)),
    ):
        mode = getattr(options, name)
        if mode not in allowed:
            raise InvalidArgument(f"{field}.{name}", mode.name, f"must be {' or '.join(m.name for m in allowed)}")
    if (options.pid is NamespaceMode.TARGET) != bool(options.target_id):
        raise InvalidArgument(f"{field}.target_id", options.target_id, "belongs to, and only to, pid mode TARGET")


def check_container_namespaces(asked: NamespaceOption, pod: Pod) -> None:
    """Refuse what a container asks for against its pod, in whose namespaces it lives.

    The kubelet repeats the pod's options for each container.  The PID namespace alone is the container's choice, but
    the host's is none where a user namespace shall keep the pod from the host's processes.  A container that says
    nothing of user namespaces is in the pod's.  Raises InvalidArgument.
    """
    field = f"{_WHERE}.namespace_options"
    check_namespaces(asked, field)
    for name in ("network", "ipc"):
        _check_same(f"{field}.{name}", getattr(asked, name), getattr(pod.config.namespaces, name))
    own = pod.userns or UserNamespace(NamespaceMode.NODE)
    if asked.userns_options is not None:
        for name in ("mode", "uids", "gids"):
            _check_same(f"{field}.userns_options.{name}", getattr(asked.userns_options, name), getattr(own, name))
    if asked.pid is NamespaceMode.NODE and own.mode is NamespaceMode.POD:
        raise InvalidArgument(
            f"{field}.pid", "NODE", "the pod's user namespace excludes the host's pid namespace; use POD or CONTAINER"
        )


def _check_same(field: str, asked: Any, own: Any) -> None:
    if asked != own:
        raise InvalidArgument(field, _shown(asked), f"must be as in the pod, {_shown(own)!r}")


def _shown(value: NamespaceMode | tuple[IDMapping, ...]) -> str:
    """Mappings in the order of /proc/PID/uid_map."""
    if isinstance(value, NamespaceMode):
        return value.name
    return ", ".join(f"{m.container_id} {m.host_id} {m.length}" for m in value)
