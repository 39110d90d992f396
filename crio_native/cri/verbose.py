"""The `info` of verbose statuses: what an operator or a tool wants to know beyond the CRI's messages.

One JSON document under the key ``info``, as in CRI-O and containerd, with their names for what they have too
(sandboxID, pid, runtimeSpec, privileged); beside them the executor's plan and the processes' own state.  It is put
together when asked for; what has gone meanwhile (a process, a file) is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crio_native.errors import CrioError
from crio_native.images.roots import UPPER
from crio_native.pods import spec as specs
from crio_native.pods import spec_resources
from crio_native.pods.node import Node
from crio_native.pods.records import Container, Pod, ProcessRecord
from crio_native.pods.values import Resources, to_json

_RESIZED = ("cpu", "memory", "hugepageLimits", "unified")  # of linux.resources, what a resize may change
_STATUS_FIELDS = frozenset("State Threads NSpid Uid Gid CapEff CapBnd NoNewPrivs Seccomp VmRSS".split())


def container_info(node: Node, container: Container) -> dict[str, str]:
    layout = node.layout
    bundle = layout.bundle(container.id)
    spec = _read_json(bundle / "config.json")
    details = {
        "sandboxID": container.pod_id,
        "pid": container.process.pid if container.process and container.live else 0,
        "monitorPid": container.process.monitor_pid if container.process and container.live else 0,
        "privileged": container.config.linux.security_context.privileged,
        "runtimeHandler": container.handler,
        "cgroup": container.cgroup,
        "resources": to_json(container.resources),
        "rootfs": {
            "path": str(bundle / "rootfs"),
            "upper": str(bundle / UPPER),
            "work": str(bundle / "work"),
            "imageID": container.image_id,
        },
        "config": to_json(container.config),
        "runtimeSpec": _by_now(spec, container.resources) if spec else None,
        "plan": _plan(spec, bundle, container.id) if spec else None,
        "state": _state(container.process if container.live else None, layout.run_dir(container.id)),
    }
    return {"info": json.dumps(details)}


def pod_info(node: Node, pod: Pod) -> dict[str, str]:
    layout = node.layout
    details = {
        "pid": pod.infra.pid if pod.infra else 0,
        "runtimeHandler": pod.handler,
        "cgroupParent": pod.cgroup,
        "hostname": pod.hostname,
        "namespaces": {kind: str(path) for kind, path in layout.pins(pod.id).items() if path.exists()},
        "containers": {c.config.metadata.name: c.id for c in node.store.of_pod(pod.id)},
        "resources": to_json(pod.config.linux.resources) if pod.config.linux.resources else None,
        "overhead": to_json(pod.config.linux.overhead) if pod.config.linux.overhead else None,
        "cniResult": node.network.result(pod.id),
        "config": to_json(pod.config),
        "runtimeSpec": _infra_spec(node, pod),
        "state": _state(pod.infra, layout.run_dir(pod.id)),
    }
    return {"info": json.dumps(details)}


def _by_now(spec: Mapping[str, Any], resources: Resources) -> Mapping[str, Any]:
    """config.json, with the limits that the kubelet has given the container since it was made of that."""
    linux = spec.get("linux") or {}
    kept = {name: limits for name, limits in (linux.get("resources") or {}).items() if name not in _RESIZED}
    limits = spec_resources.linux_resources(resources, min_memory=0, field="linux.resources")
    return {**spec, "linux": {**linux, "resources": {**kept, **limits}}}


def _infra_spec(node: Node, pod: Pod) -> Any:
    """The pause process's; None for a pod without one."""
    if pod.infra is None:
        return None
    return specs.infra_spec(pod, specs.Node(node.settings, node.host, node.layout, node.profiles))


def _plan(spec: Mapping[str, Any], bundle: Path, name: str) -> Any:
    """What `crio-oci explain` says: each step, and the field that asked for it."""
    from crio_native.oci.explain import explain  # only who inspects pays for it

    try:
        return explain(spec, bundle, name).to_dict()
    except CrioError as error:
        return {"error": str(error)}  # a handler of another kind may take what ours does not


def _state(process: ProcessRecord | None, run_dir: Path) -> dict[str, Any]:
    """What is true of the processes: the first one's by the kernel, and what the monitor wrote."""
    state: dict[str, Any] = {"runDir": str(run_dir), "exit": _read_json(run_dir / "exit")}
    if process is not None:
        state |= {"pid": process.pid, "startTime": process.start_time, "monitorPid": process.monitor_pid}
        state["process"] = _process(process.pid)
    return state


def _process(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            pairs = (line.partition(":") for line in file)
            found = {name: value.strip() for name, _, value in pairs if name in _STATUS_FIELDS}
        kinds = sorted(os.listdir(f"/proc/{pid}/ns"))
        return found | {f"ns/{kind}": os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds}
    except OSError:
        return {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
