"""The `process` part of a container's config.json: command, environment, directory, user, capabilities.

Pure functions over the CRI's configuration and the image's; they raise InvalidArgument with the CRI field's path.
What surrounds the process (mounts, namespaces, resources) is in the other `spec` modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from crio_native.config.values import Ulimit
from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities
from crio_native.oci.runtime import UserRequest
from crio_native.pods.values import Capability, ContainerConfig, ContainerSecurity, GroupsPolicy

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_ID = 2**32 - 2  # 2**32 - 1 is the kernel's "no id"
_STRING_MAX = 131072  # MAX_ARG_STRLEN
_TOTAL_MAX = 2 << 20  # a quarter of the usual 8 MiB stack: execve's own bound


def arguments(config: ContainerConfig, image: Mapping[str, Any]) -> list[str]:
    """The command line: `command` replaces the image's Entrypoint and Cmd, `args` alone only its Cmd."""
    if config.command:
        args = [*config.command, *config.args]
    else:
        args = [*(image.get("Entrypoint") or ()), *(config.args or image.get("Cmd") or ())]
    if not args or not args[0]:
        raise InvalidArgument("config.command", args, "neither the configuration nor the image names a command")
    for name in ("command", "args"):
        for index, text in enumerate(getattr(config, name)):
            _check_size(f"config.{name}[{index}]", text, text)
    _check_total("config.args", args)
    return args


def environment(
    config: ContainerConfig,
    image: Mapping[str, Any],
    defaults: Iterable[str],
    hostname: str,
    injected: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The environment, later sources overriding: the image's, the daemon's defaults, the configuration's, and what
    devices inject."""
    variables = dict(_split(text) for text in (DEFAULT_PATH, f"HOSTNAME={hostname}"))
    if config.tty:
        variables["TERM"] = "xterm"
    for index, text in enumerate(image.get("Env") or ()):
        if not text.partition("=")[0] or "=" not in text:
            raise InvalidArgument("config.image.image", text, f"the image's Env[{index}] must be NAME=VALUE")
        _check_size("config.image.image", f"the image's Env[{index}]", text)
    for text in (*(image.get("Env") or ()), *defaults):
        name, value = _split(text)
        variables[name] = value
    for index, pair in enumerate(config.envs):
        if not pair.key or "=" in pair.key:
            raise InvalidArgument(f"config.envs[{index}].key", pair.key, "must be a name without '='")
        _check_size(f"config.envs[{index}]", pair.key, f"{pair.key}={pair.value}")
        variables[pair.key] = pair.value
    variables |= injected
    result = [f"{name}={value}" for name, value in variables.items()]
    _check_total("config.envs", result)
    return result


def working_directory(config: ContainerConfig, image: Mapping[str, Any]) -> str:
    path = config.working_dir or image.get("WorkingDir") or "/"
    if path.startswith("/"):
        return str(path)
    if config.working_dir:
        raise InvalidArgument("config.working_dir", path, "must be an absolute path")
    raise InvalidArgument("config.image.image", path, "the image's WorkingDir must be an absolute path")


def user(security: ContainerSecurity, image: Mapping[str, Any]) -> UserRequest:
    """Who the command runs as; names are resolved later, inside the root file system."""
    where = "config.linux.security_context"
    if security.run_as_user is not None and security.run_as_username:
        raise InvalidArgument(f"{where}.run_as_username", security.run_as_username, "excludes run_as_user")
    check_id(f"{where}.run_as_user", security.run_as_user)
    check_id(f"{where}.run_as_group", security.run_as_group)
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidArgument(f"{where}.run_as_group", security.run_as_group, "needs run_as_user or run_as_username")
    for index, number in enumerate(security.supplemental_groups):
        check_id(f"{where}.supplemental_groups[{index}]", number)
    name = security.run_as_username or str(image.get("User") or "")
    if security.run_as_user is not None:
        name = str(security.run_as_user)
    group = ""
    if security.run_as_group is not None:
        group = str(security.run_as_group)
        name = name.partition(":")[0]
    merge = security.supplemental_groups_policy is GroupsPolicy.Merge
    return UserRequest(name, group, security.supplemental_groups, merge)


def check_id(field: str, number: int | None) -> None:
    if number is not None and not 0 <= number <= MAX_ID:
        raise InvalidArgument(field, number, f"must be 0 to {MAX_ID}")


def capability_sets(
    request: Capability, privileged: bool, defaults: Sequence[str], bounding: frozenset[str], *, inherit: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The five sets and warnings about what this host cannot give.

    The inheritable set stays empty unless asked for (a file capability would add to it: CVE-2022-27652), and the
    ambient set holds only what the caller names.
    """
    where = "config.linux.security_context.capabilities"
    wanted = set(capabilities.NAMES) if privileged else set(defaults)
    add = _capability_list(f"{where}.add_capabilities", request.add_capabilities)
    drop = _capability_list(f"{where}.drop_capabilities", request.drop_capabilities)
    ambient = _capability_list(f"{where}.add_ambient_capabilities", request.add_ambient_capabilities)
    if "ALL" in add:
        wanted = set(capabilities.NAMES)
    if "ALL" in drop:
        wanted = set()
    wanted |= (add | ambient) - {"ALL"}
    wanted -= drop
    named = (add | ambient) - {"ALL"}
    missing = sorted(named & wanted - bounding)
    warnings = [f"{name} is outside the host's bounding set and was left out" for name in missing]
    held = _ordered(wanted & bounding)
    ambient_held = _ordered(ambient & wanted & bounding)
    sets = {
        "bounding": held,
        "effective": held,
        "permitted": held,
        "inheritable": held if inherit else ambient_held,
        "ambient": ambient_held,
    }
    return sets, warnings


def _capability_list(field: str, names: Iterable[str]) -> set[str]:
    return {"ALL" if name.upper() == "ALL" else _capability(f"{field}[{i}]", name) for i, name in enumerate(names)}


def _capability(field: str, name: str) -> str:
    full = name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}"
    if full not in capabilities.NUMBER:
        raise InvalidArgument(field, name, "is no Linux capability; write it as NET_ADMIN or CAP_NET_ADMIN, or ALL")
    return full


def _ordered(names: set[str]) -> list[str]:
    return [name for name in capabilities.NAMES if name in names]


def rlimits(defaults: Iterable[Ulimit]) -> list[dict[str, Any]]:
    """`default_ulimits` as OCI rlimits."""
    return [{"type": f"RLIMIT_{u.name.upper()}", "soft": _limit(u.soft), "hard": _limit(u.hard)} for u in defaults]


def _limit(number: int) -> int:
    return 2**64 - 1 if number < 0 else number  # RLIM_INFINITY


def _split(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _check_size(field: str, shown: str, text: str) -> None:
    size = len(text.encode(errors="surrogateescape"))
    if size >= _STRING_MAX:
        raise InvalidArgument(field, shown, f"has {size} bytes; execve takes at most {_STRING_MAX - 1} a string")


def _check_total(field: str, strings: Sequence[str]) -> None:
    if sum(len(text) + 9 for text in strings) > _TOTAL_MAX:
        raise InvalidArgument(field, f"{len(strings)} strings", f"execve takes at most {_TOTAL_MAX} bytes in all")
