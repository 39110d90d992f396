"""The annotations of latency-sensitive pods: what a container with whole CPUs of its own wants of them.

CRI-O's names and conditions: they count for a container of a guaranteed pod that asks for whole CPUs, and are passed
over for others.  Here they are read and checked, and what follows for the container's limits and environment is said;
what they change on the node for as long as it runs is `tuning`'s.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.linux import scheduling
from crio_native.pods.pod_annotations import Allowed
from crio_native.pods.values import Resources

_SHARES_OF_A_CPU = 1024
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_OFF = ("disable", "true")


@dataclass(frozen=True, slots=True)
class Wishes:
    """cpus: the container's own.  shared: the node's (`shared_cpuset`), where it wants them too.  housekeeping: those
    of its own that keep their interrupts all the same.  latency: the most microseconds in which a CPU may wake up,
    "n/a" for at once, "" for no wish.  governor: of the frequency, "" for none.
    """

    cpus: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    no_quota: bool = False
    no_balancing: bool = False
    no_interrupts: bool = False
    housekeeping: tuple[int, ...] = ()
    latency: str = ""
    governor: str = ""

    @property
    def interrupt_free(self) -> tuple[int, ...]:
        """The CPUs that interrupts are to be kept from."""
        return tuple(cpu for cpu in self.cpus if cpu not in self.housekeeping) if self.no_interrupts else ()

    def limits(self, asked: Resources) -> Resources:
        """A container's limits, when it is made or later, with what the wishes make of them."""
        if self.no_quota and asked.cpu_quota:
            asked = replace(asked, cpu_quota=-1)
        if not self.shared or not asked.cpuset_cpus:
            return asked
        own = scheduling.parse_list(asked.cpuset_cpus, scheduling.MAX_CPU)
        return replace(asked, cpuset_cpus=_text((*own, *self.shared)))

    def environment(self) -> list[str]:
        """By which a program knows its CPUs apart; the names are CRI-O's."""
        found = {}
        if self.shared:
            found = {"ISOLATED": self.cpus, "SHARED": self.shared}
        if self.housekeeping:
            found["HOUSEKEEPING"] = self.housekeeping
        return [f"OPENSHIFT_{name}_CPUS={_text(cpus)}" for name, cpus in found.items()]


def wishes(allowed: Allowed, asked: Resources, cgroup_parent: str, shared_cpuset: str) -> Wishes:
    """asked: the limits before these wishes.  Raises InvalidArgument, FailedPrecondition for CPUs that the node does
    not share."""
    guaranteed = "burstable" not in cgroup_parent and "besteffort" not in cgroup_parent
    if not guaranteed or not asked.cpu_shares or asked.cpu_shares % _SHARES_OF_A_CPU:
        return Wishes()
    cpus = tuple(scheduling.parse_list(asked.cpuset_cpus, scheduling.MAX_CPU))
    housekeeping = allowed.get("irq_load_balancing")[1] == "housekeeping"
    found = Wishes(
        cpus=cpus,
        shared=_shared(allowed, shared_cpuset),
        no_quota=_is_off(allowed, "cpu_quota"),
        no_balancing=_is_off(allowed, "cpu_load_balancing"),
        no_interrupts=housekeeping or _is_off(allowed, "irq_load_balancing"),
        housekeeping=_siblings(cpus) if housekeeping else (),
        latency=_latency(allowed),
        governor=_governor(allowed),
    )
    if not found.cpus and replace(found, no_quota=False) != Wishes():
        raise InvalidArgument(
            "config.linux.resources.cpuset_cpus", "", "must name the CPUs that the annotations of the pod are about"
        )
    return found


def _is_off(allowed: Allowed, what: str) -> bool:
    field, value = allowed.get(what)
    if value not in ("", "enable", "false", *_OFF):
        raise InvalidArgument(field, value, 'must be "disable" or "enable"')
    return value in _OFF


def _siblings(cpus: tuple[int, ...]) -> tuple[int, ...]:
    """The first of the CPUs, and those that share a core with it."""
    core = set(cpus[:1])
    for cpu in cpus[:1]:
        with contextlib.suppress(OSError):  # no such CPU: whoever starts the container is told so by the kernel
            core |= set(scheduling.parse_list(Path(_SIBLINGS.format(cpu)).read_text().strip(), scheduling.MAX_CPU))
    return tuple(cpu for cpu in cpus if cpu in core)


def _shared(allowed: Allowed, configured: str) -> tuple[int, ...]:
    field, value = allowed.get("cpu_shared")
    if value in ("", "disable"):
        return ()
    if value != "enable":
        raise InvalidArgument(field, value, 'must be "enable" or "disable"')
    if not configured:
        raise FailedPrecondition(f"{field}: the node shares no CPUs; set crio.runtime.shared_cpuset")
    return tuple(scheduling.parse_list(configured, scheduling.MAX_CPU))


def _latency(allowed: Allowed) -> str:
    field, value = allowed.get("cpu_c_states")
    number = value.removeprefix("max_latency:")
    if value == number:
        known = {"": "", "enable": "0", "disable": "n/a"}
        if value in known:
            return known[value]
    elif re.fullmatch(r"[1-9]\d{0,8}", number, re.ASCII):
        return number
    raise InvalidArgument(field, value, 'must be "enable", "disable" or "max_latency:MICROSECONDS"')


def _governor(allowed: Allowed) -> str:
    field, value = allowed.get("cpu_freq_governor")
    if value and not re.fullmatch(r"[a-z_]{1,15}", value, re.ASCII):
        raise InvalidArgument(field, value, "is no name of a governor such as performance")
    return value


def _text(cpus: tuple[int, ...]) -> str:
    return ",".join(map(str, sorted(set(cpus))))
