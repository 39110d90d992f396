"""The part of a plan that makes the process what its command runs as, for a container's init and for an exec."""

from __future__ import annotations

import resource

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities, scheduling, syscalls
from crio_native.oci.builtin.plan_types import RULE, Host, Steps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crio_native.oci.runtime import UserRequest

_LIMITS_OF_LINUX = {"RLIMIT_LOCKS": 10, "RLIMIT_SIGPENDING": 11, "RLIMIT_MSGQUEUE": 12}  # not in every Python
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_SYS_ADMIN = capabilities.mask(["CAP_SYS_ADMIN"])


def oom_step(out: Steps, process: Mapping[str, Any], host: Host) -> None:
    if process.get("oomScoreAdj") is not None:
        out.add("oom_score", "process.oomScoreAdj", value=max(process["oomScoreAdj"], host.oom_score_adj))


def label_step(out: Steps, process: Mapping[str, Any]) -> None:
    if labels(process):
        out.add("open_labels", RULE + "labels are written through the host's procfs")


def labels(process: Mapping[str, Any]) -> dict[str, str]:
    found = {"selinux": process.get("selinuxLabel", ""), "apparmor": process.get("apparmorProfile", "")}
    return {module: label for module, label in found.items() if label}


def raise_limits_step(out: Steps, process: Mapping[str, Any]) -> None:
    limits = [[_resource(limit["type"]), _signed(limit["hard"])] for limit in process.get("rlimits") or ()]
    if limits:
        out.add("raise_limits", RULE + "a user namespace cannot raise a hard limit", limits=limits)


def notice_of(
    spec: Mapping[str, Any], seccomp: tuple[bytes, int] | None, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The container process state for the filter's listener; None for a filter that notifies nobody.

    spec: a `linux.seccomp` object.  state: the container's, but for its pid.
    """
    if not seccomp or not seccomp[1] & syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER:
        return None
    notice = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "state": dict(state)}
    if spec.get("listenerMetadata"):
        notice["metadata"] = spec["listenerMetadata"]
    return notice


def user_step(out: Steps, process: Mapping[str, Any], user: UserRequest | None) -> None:
    out.add("environment", "process.env", entries=list(process.get("env") or ()))
    if user is not None:
        out.add(
            "find_user",
            RULE + "names are those of the image",
            user=user.user,
            group=user.group,
            supplementary=list(user.supplementary),
            merge=user.merge,
        )
        return
    asked = process.get("user") or {}
    out.add(
        "take_user",
        "process.user",
        uid=asked.get("uid", 0),
        gid=asked.get("gid", 0),
        groups=list(asked.get("additionalGids") or ()),
    )
    if not any(entry.startswith("HOME=") and entry != "HOME=" for entry in process.get("env") or ()):
        out.add("find_home", RULE + "HOME is what the container's passwd file says")


class Command:
    """The steps from an init that stands in its root, to the one before its exec.

    seccomp: compiled filter and load flags.  notice: see `notice_of`.  all_capabilities: the process is in a user
    namespace, which has every capability to give.  keep_groups: see `oci.spec.keeps_groups`.
    """

    def __init__(
        self,
        process: Mapping[str, Any],
        host: Host,
        seccomp: tuple[bytes, int] | None,
        notice: dict[str, Any] | None,
        all_capabilities: bool,
        keep_groups: bool = False,
    ) -> None:
        self.keep_groups = {"keep_groups": True} if keep_groups else {}
        self.process, self.host, self.seccomp, self.notice = process, host, seccomp, notice
        self.sets = {kind: capabilities.mask((process.get("capabilities") or {}).get(kind) or ()) for kind in _SETS}
        permitted = (1 << host.last_capability + 1) - 1 if all_capabilities else host.permitted
        missing = (self.sets["bounding"] | self.sets["permitted"]) & ~permitted
        if missing:
            raise InvalidArgument(
                "process.capabilities",
                capabilities.names(missing),
                "this process does not have them itself, so it cannot give them",
            )
        self.no_new_privileges = bool(process.get("noNewPrivileges"))
        # Without no_new_privs loading a filter takes CAP_SYS_ADMIN, which is kept until then and no longer; a hook does
        # not get it, for what is not ambient is lost with an exec.
        self.kept = _SYS_ADMIN if seccomp and not self.no_new_privileges else 0

    def steps(self, out: Steps) -> None:
        """Up to where a container waits for its start."""
        self._kernel_steps(out)
        if self.no_new_privileges:
            out.add("no_new_privileges", "process.noNewPrivileges")
        umask = (self.process.get("user") or {}).get("umask")
        out.add(
            "limit_bounding_set",
            "process.capabilities.bounding",
            keep=self.sets["bounding"],
            last=self.host.last_capability,
        )
        out.add("change_user", "process.user", umask=0o022 if umask is None else umask, **self.keep_groups)
        self._capabilities_step(out, self.kept, ambient=self.sets["ambient"])
        out.add("change_directory", "process.cwd", path=self.process.get("cwd", "/"))
        wanted = labels(self.process)
        if wanted:
            out.add("write_labels", "process.selinuxLabel, process.apparmorProfile", labels=wanted)

    def find_step(self, out: Steps) -> None:
        out.add("find_command", "process.args", name=self.process["args"][0])

    def _capabilities_step(self, out: Steps, kept: int = 0, ambient: int | None = None) -> None:
        """kept: what is there beside what is asked for."""
        out.add(
            "set_capabilities",
            "process.capabilities",
            effective=self.sets["effective"] | kept,
            permitted=self.sets["permitted"] | kept,
            inheritable=self.sets["inheritable"],
            ambient=ambient,
        )

    def last_steps(self, out: Steps) -> None:
        """Those before the exec, and after the start and all else: what comes before the filter need not be allowed
        by it."""
        out.add("default_signals", RULE + "what the runtime ignores and holds back is not the command's")
        if self.seccomp:
            notice = {"notice": self.notice} if self.notice else {}
            out.add("seccomp", "linux.seccomp", program=self.seccomp[0], flags=self.seccomp[1], **notice)
        if self.kept & ~self.sets["effective"]:
            self._capabilities_step(out)

    def _kernel_steps(self, out: Steps) -> None:
        """What the scheduler and the resource limits are told, while the capabilities for it are there."""
        asked = self.process.get("ioPriority")
        if asked:
            level = scheduling.IO_CLASSES[asked["class"]] << 13 | asked.get("priority", 0)
            out.add("io_priority", "process.ioPriority", priority=level)
        asked = self.process.get("scheduler")
        if asked:
            out.add(
                "scheduling",
                "process.scheduler",
                policy=scheduling.POLICIES[asked["policy"]],
                flags=sum(scheduling.SCHED_FLAGS[flag] for flag in set(asked.get("flags") or ())),
                nice=asked.get("nice") or 0,
                priority=asked.get("priority") or 0,
                runtime=asked.get("runtime") or 0,
                deadline=asked.get("deadline") or 0,
                period=asked.get("period") or 0,
            )
        for limit in self.process.get("rlimits") or ():
            out.add(
                "limit_resource",
                "process.rlimits",
                resource=_resource(limit["type"]),
                name=limit["type"],
                soft=_signed(limit["soft"]),
                hard=_signed(limit["hard"]),
            )


def machine_steps(out: Steps, linux: Mapping[str, Any]) -> None:
    """What `linux` says of memory and personality."""
    policy = linux.get("memoryPolicy")
    if policy:
        mode = scheduling.MEMORY_MODES[policy["mode"]]
        mode |= sum(scheduling.MEMORY_FLAGS[flag] for flag in set(policy.get("flags") or ()))
        nodes = sum(1 << node for node in scheduling.parse_list(policy.get("nodes", ""), scheduling.MAX_NODE))
        out.add("memory_policy", "linux.memoryPolicy", mode=mode, nodes=nodes)
    if linux.get("personality"):
        domain = scheduling.PERSONALITIES[linux["personality"]["domain"]]
        out.add("personality", "linux.personality", domain=domain)


def affinity_step(out: Steps, process: Mapping[str, Any], when: str) -> None:
    cpus = (process.get("execCPUAffinity") or {}).get(when)
    if cpus:
        numbers = scheduling.parse_list(cpus, scheduling.MAX_CPU)
        out.add("set_affinity", f"process.execCPUAffinity.{when}", cpus=numbers)


def _resource(name: str) -> int:
    number: int = getattr(resource, name, -1)
    return number if number >= 0 else _LIMITS_OF_LINUX[name]


def _signed(limit: int) -> int:
    """RLIM_INFINITY and its neighbours as Python's resource module wants them."""
    return limit if limit < 2**63 else limit - 2**64
