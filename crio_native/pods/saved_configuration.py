"""What the saved configuration of a pod, or of its containers, may not give.

A checkpoint's directory may come from anywhere, and what was asked for when it was made was asked by somebody else:
privilege, the host's namespaces and the host's files are for the request to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from crio_native.errors import PermissionRefused
from crio_native.pods import cdi
from crio_native.pods.spec_security import MASKED_PATHS, READONLY_PATHS
from crio_native.pods.values import (
    ContainerConfig,
    NamespaceMode,
    NamespaceOption,
    PodConfig,
    ProfileType,
    SecurityProfile,
)

Given = Iterator[tuple[str, object]]  # a field, and what is given there; nothing is as if it were not there


def check_pod(config: PodConfig, where: str) -> None:
    """where: names the configuration in the error.  Raises PermissionRefused."""
    _refuse(_of_pod(config), where)


def check_container(config: ContainerConfig, where: str) -> None:
    """As `check_pod`."""
    _refuse(_of_container(config), where)


def _refuse(given: Given, where: str) -> None:
    for field, value in given:
        if value:
            raise PermissionRefused(
                f"{where}: {field} is not given by a checkpoint; the request may, with a configuration"
            )


def _of_pod(config: PodConfig) -> Given:
    security = config.linux.security_context
    yield "log_directory", config.log_directory
    yield "linux.cgroup_parent", config.linux.cgroup_parent
    yield "linux.sysctls", config.linux.sysctls
    yield from _of_annotations(config.annotations)
    yield "linux.security_context.privileged", security.privileged
    yield "linux.security_context.selinux_options", security.selinux_options
    yield from _of_profiles(security.seccomp, security.apparmor)
    yield from _of_namespaces(security.namespace_options)


def _of_container(config: ContainerConfig) -> Given:
    security = config.linux.security_context
    yield "mounts: host_path", any(mount.host_path for mount in config.mounts)
    yield "devices", config.devices
    yield "CDI_devices", config.CDI_devices
    yield from _of_annotations(config.annotations)
    yield "linux.security_context.privileged", security.privileged
    yield "linux.security_context.selinux_options", security.selinux_options
    yield (
        "linux.security_context.capabilities",
        (security.capabilities.add_capabilities or security.capabilities.add_ambient_capabilities),
    )
    yield from _of_profiles(security.seccomp, security.apparmor)
    yield from _of_namespaces(security.namespace_options or NamespaceOption())
    for name, given, defaults in (
        ("masked_paths", security.masked_paths, MASKED_PATHS),
        ("readonly_paths", security.readonly_paths, READONLY_PATHS),
    ):
        yield f"linux.security_context.{name}", given and not {*defaults}.issubset(given)


def _of_annotations(annotations: Mapping[str, str]) -> Given:
    """Those by which the runtime is asked for something."""
    for key in annotations:
        yield f"annotations[{key!r}]", key.startswith((cdi.ANNOTATION, "io.kubernetes.cri-o.")) or ".crio.io" in key


def _of_profiles(seccomp: SecurityProfile | None, apparmor: SecurityProfile | None) -> Given:
    for name, profile in (("seccomp", seccomp), ("apparmor", apparmor)):
        other = profile is not None and profile.profile_type != ProfileType.RuntimeDefault
        yield f"linux.security_context.{name}", other


def _of_namespaces(options: NamespaceOption) -> Given:
    for name in ("network", "pid", "ipc"):
        outside = getattr(options, name) in (NamespaceMode.NODE, NamespaceMode.TARGET)
        yield f"linux.security_context.namespace_options.{name}", outside
    mapped = options.userns_options is not None and options.userns_options.mode != NamespaceMode.NODE
    yield "linux.security_context.namespace_options.userns_options", mapped
