"""What an executor could not do, in the words of the request.

Executors know config.json and the steps that carry it out.  Where a failure is one that a field's value brings about,
the caller is told the field, as of any other bad value; what is left is a fault of ours or of the host's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.oci.refusals import OF_VALUES, as_step
from crio_native.oci.spec import normalise
from crio_native.pods import declared_volumes
from crio_native.pods.values import ContainerConfig, Resources

_OCI_RESOURCES = "linux.resources."
_RESOURCES = {
    "cpu.cpus": "cpuset_cpus",
    "cpu.mems": "cpuset_mems",
    "cpu.shares": "cpu_shares",
    "cpu.quota": "cpu_quota",
    "cpu.period": "cpu_period",
    "memory.limit": "memory_limit_in_bytes",
    "memory.swap": "memory_swap_limit_in_bytes",
    "hugepageLimits": "hugepage_limits",
    "unified": "unified",
}

Place = tuple[str, object]  # a field's path in the request, and its value


@contextmanager
def of_container(config: ContainerConfig, bind_mount_prefix: str, image_config: Mapping[str, Any]) -> Iterator[None]:
    """Around the making of a container.  Raises InvalidArgument where a field of its configuration is at fault, or its
    image's own."""
    try:
        yield
    except InvalidArgument as error:
        place = _mount(config, bind_mount_prefix, str(error.value)) if error.field.startswith("mounts[") else None
        place = place or _resource(error.field, config.linux.resources, "config.linux.resources")
        if place is None:
            raise
        raise InvalidArgument(*place, error.reason) from error
    except StepFailed as error:
        place = _of_step(as_step(error), config, bind_mount_prefix, image_config)
        if place is None:
            raise
        raise InvalidArgument(*place, str(error)) from error


@contextmanager
def of_update(asked: Resources, path: str) -> Iterator[None]:
    """Around a change of a container's limits.  path: of `asked` in the request."""
    try:
        yield
    except (InvalidArgument, StepFailed) as error:
        text = error.field if isinstance(error, InvalidArgument) else _value_of_cgroup(as_step(error))
        place = _resource(text, asked, path)
        if place is None:
            raise
        raise InvalidArgument(*place, error.reason if isinstance(error, InvalidArgument) else str(error)) from error


@contextmanager
def of_sysctls(asked: Mapping[str, str]) -> Iterator[None]:
    """Around the making of a pod's namespaces, where its sysctls are set."""
    try:
        yield
    except StepFailed as error:
        for name, value in asked.items():
            if error.path == "/proc/sys/" + name.replace(".", "/") and error.number in OF_VALUES:
                raise InvalidArgument(f"config.linux.sysctls[{name!r}]", value, str(error)) from error
        raise


def _of_step(
    error: StepFailed, config: ContainerConfig, bind_mount_prefix: str, image_config: Mapping[str, Any]
) -> Place | None:
    if error.step == "cgroup":
        return _resource(_value_of_cgroup(error), config.linux.resources, "config.linux.resources")
    if error.number and error.number not in OF_VALUES:
        return None
    if error.step == "monitor" and config.log_path and error.path.endswith(f"/{config.log_path}"):
        return "config.log_path", config.log_path
    if error.step in _MOUNTING:
        declared = declared_volumes.is_one(error.path, image_config)
        return _mount(config, bind_mount_prefix, error.path) or (_image(config) if declared else None)
    find = _PLACES.get(error.step)
    return find(config) if find else None


def _value_of_cgroup(error: StepFailed) -> str:
    return error.detail if error.step == "cgroup" and error.number in OF_VALUES else ""


def _resource(text: str, asked: Resources, path: str) -> Place | None:
    """text: begins with a field of config.json."""
    for oci, name in _RESOURCES.items():
        if text.startswith(_OCI_RESOURCES + oci) and (value := getattr(asked, name)):
            return f"{path}.{name}", value
    return None


def _mount(config: ContainerConfig, prefix: str, path: str) -> Place | None:
    for index, mount in enumerate(config.mounts):
        if path == normalise(mount.container_path):
            return f"config.mounts[{index}].container_path", mount.container_path
        if mount.host_path and path == os.path.realpath(prefix + mount.host_path):
            return f"config.mounts[{index}].host_path", mount.host_path
    return None


def _user(config: ContainerConfig) -> Place:
    security = config.linux.security_context
    if security.run_as_user is not None:
        return "config.linux.security_context.run_as_user", security.run_as_user
    if security.run_as_username:
        return "config.linux.security_context.run_as_username", security.run_as_username
    return _image(config)


def _paths(name: str) -> Callable[[ContainerConfig], Place | None]:
    def place(config: ContainerConfig) -> Place | None:
        asked = getattr(config.linux.security_context, name)
        return (f"config.linux.security_context.{name}", list(asked)) if asked else None

    return place


def _directory(config: ContainerConfig) -> Place:
    return ("config.working_dir", config.working_dir) if config.working_dir else _image(config)


def _image(config: ContainerConfig) -> Place:
    return "config.image.image", config.image.user_specified_image or config.image.image


_MOUNTING = frozenset({"bind", "open_bind", "attach_bind"})
_PLACES: Mapping[str, Callable[[ContainerConfig], Place | None]] = {
    "image_volume": _image,
    "find_user": _user,
    "change_user": _user,
    "make_working_directory": _directory,
    "change_directory": _directory,
    "mask_paths": _paths("masked_paths"),
    "read_only_paths": _paths("readonly_paths"),
}
