"""A control group in a pod's name, with nobody in it: where no pause process runs, cAdvisor knows the pod by it.

The cAdvisor in a kubelet counts a pod's network for the group that the pod's pause process is in, by the pid that it is
told on CRI-O's socket; where none runs that is a container's (see `cri.inspection`).  CRI-O makes such groups too.
"""

from __future__ import annotations

from crio_native.linux.cgroup import Cgroup, files, hierarchy
from crio_native.linux.cgroup.systemd import slice_path
from crio_native.pods.node import Node
from crio_native.pods.records import Pod

CRIO_SOCKETS = ("/var/run/crio/crio.sock", "/run/crio/crio.sock")  # cAdvisor asks there, and nowhere else


def make(node: Node, pod: Pod) -> None:
    """If somebody could ask.  Raises StepFailed."""
    if node.config.api.listen not in CRIO_SOCKETS:
        return
    group = _group(node, pod)
    group.create()
    if cpuset := hierarchy().v1.get("cpuset"):
        # Else the processors of a container that wants no balancing would be balanced for the sake of this group.
        files.write(f"{cpuset}{group.path}/cpuset.sched_load_balance", "0")


def remove(node: Node, pod: Pod) -> None:
    """Nothing happens when there is none.  Raises StepFailed."""
    group = _group(node, pod)
    if group.exists():
        group.remove()


def remove_lost(pod_ids: list[str]) -> None:
    """Those of pods without a record, which nobody knows the parent of.  Raises StepFailed."""
    for path in hierarchy().find(frozenset(map(_name, pod_ids))) if pod_ids else ():
        Cgroup(path).remove()


def _group(node: Node, pod: Pod) -> Cgroup:
    """In systemd's tree, too, a plain group: a scope has processes, and a slice's name could not begin so."""
    parent = slice_path(pod.cgroup) if node.settings.cgroup_manager == "systemd" else pod.cgroup
    return Cgroup(f"{parent}/{_name(pod.id)}")


def _name(pod_id: str) -> str:
    return f"crio-{pod_id}"
