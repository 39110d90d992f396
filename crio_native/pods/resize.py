"""Changing the limits of what runs: a container's in place, a pod's in its record.

A container's limits are checked as a whole (the old ones with the new), written to its live cgroup, and recorded; what
the kernel refuses is taken back, so that record and kernel agree.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from crio_native.errors import CrioError, FailedPrecondition
from crio_native.pods import preparation, refusals, spec_resources
from crio_native.pods.node import Node
from crio_native.pods.records import Container, Pod
from crio_native.pods.values import Resources

log = logging.getLogger(__name__)

_FIELD = "linux"
_NO_LIMIT = -1
_DEFAULTS: dict[str, int] = {"memory_limit_in_bytes": -1, "memory_swap_limit_in_bytes": -1, "cpu_quota": -1}
_DEFAULT_SHARES = 1024
_DEFAULT_PERIOD = 100_000  # microseconds


def resize(node: Node, container_id: str, wanted: Resources) -> None:
    """Put `wanted` in force in a created or running container; fields at zero or empty stay as they are.

    -1 takes a memory limit or a CPU quota away.  A memory limit below what is in use is refused, because the kernel
    would kill for it (v2).  The OOM score is its processes' and not its cgroup's: it is checked, and stays, as in
    CRI-O.
    Raises NotFound, FailedPrecondition, InvalidArgument, StepFailed; then all is as it was.
    """
    with node.locks.hold(container_id):
        container = node.store.get(Container, container_id)
        if not container.live:
            raise FailedPrecondition(
                f"container {container_id} is {container.state}; only a created or running one has limits to change"
            )
        runtime = node.executor_of(container)
        settings = node.handlers.settings_of(container.handler)
        pod = node.store.get(Pod, container.pod_id)
        spec_resources.check_cpusets(wanted, _FIELD)
        wanted = preparation.wishes(node, pod, container.config, settings).limits(wanted)
        old = container.resources
        new = _merged(old, wanted)
        _limits(new, settings.container_min_memory)
        change = _limits(wanted, settings.container_min_memory)
        if not change:
            return
        if change.get("memory"):
            change["memory"]["checkBeforeUpdate"] = True
        try:
            with refusals.of_update(wanted, _FIELD):
                runtime.update(container_id, container.cgroup, change)
        except CrioError:
            _restore(runtime, container, wanted, settings.container_min_memory)
            raise
        node.store.update(Container, container_id, resources=new)


def resize_pod(node: Node, pod_id: str, overhead: Resources | None, resources: Resources | None) -> None:
    """Record what the pod as a whole may use.  Its cgroup is the kubelet's, who has set the limits there already."""
    for asked, field in ((overhead, "overhead"), (resources, "resources")):
        if asked is not None:
            spec_resources.check_pod(asked, field)

    def changed(pod: Pod) -> Pod:
        linux = dataclasses.replace(
            pod.config.linux,
            overhead=overhead or pod.config.linux.overhead,
            resources=resources or pod.config.linux.resources,
        )
        return dataclasses.replace(pod, config=dataclasses.replace(pod.config, linux=linux))

    node.store.change(Pod, pod_id, changed)


def _merged(old: Resources, wanted: Resources) -> Resources:
    given = {name: value for name in _names() if (value := getattr(wanted, name)) and name != "oom_score_adj"}
    if "unified" in given:
        given["unified"] = {**old.unified, **wanted.unified}
    if "hugepage_limits" in given:
        sizes = {limit.page_size: limit for limit in (*old.hugepage_limits, *wanted.hugepage_limits)}
        given["hugepage_limits"] = tuple(sizes.values())
    if wanted.memory_limit_in_bytes == _NO_LIMIT:
        given |= {"memory_limit_in_bytes": 0, "memory_swap_limit_in_bytes": 0}
    return dataclasses.replace(old, **given)


def _names() -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(Resources))


def _limits(asked: Resources, min_memory: int) -> dict[str, Any]:
    """An OCI `linux.resources` object, with -1 where a memory limit goes."""
    limits = spec_resources.linux_resources(
        spec_resources.without_signs(asked, _FIELD), min_memory=min_memory, field=_FIELD
    )
    if asked.memory_limit_in_bytes == _NO_LIMIT:
        # Without a limit on memory there can be none on memory and swap together.
        limits["memory"] = {**limits.get("memory", {}), "limit": _NO_LIMIT, "swap": _NO_LIMIT}
    return limits


def _restore(runtime: Any, container: Container, wanted: Resources, min_memory: int) -> None:
    """Write the old values of what `wanted` names; where there was none, the kernel's default."""
    old = container.resources
    back: dict[str, Any] = {
        name: getattr(old, name) or default for name, default in _DEFAULTS.items() if getattr(wanted, name)
    }
    if wanted.cpu_shares:
        back["cpu_shares"] = old.cpu_shares or _DEFAULT_SHARES
    if wanted.cpu_period:
        back["cpu_period"] = old.cpu_period or _DEFAULT_PERIOD
    kept: dict[str, Any] = {
        name: getattr(old, name) for name in ("cpuset_cpus", "cpuset_mems", "hugepage_limits", "unified")
    }
    try:
        runtime.update(container.id, container.cgroup, _limits(Resources(**back, **kept), min_memory))
    except CrioError as error:
        log.error("container %s: its old limits could not be put back: %s", container.id, error)
