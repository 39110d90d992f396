"""Start-up: every record against what exists, until each object is either usable or gone.

The rule for each state of a record: an intent (`creating`, `removing`) is undone or finished; a container that should
live is watched again, or its end is taken from its exit file; a pod that lost a namespace (a reboot) is not ready.
Then whatever has no record at all is removed.  One object's failure is logged and does not stop the others.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from crio_native.errors import CrioError, NotFound
from crio_native.linux import process as kernel
from crio_native.linux.cgroup import Cgroup, hierarchy
from crio_native.oci.monitored import MONITOR_GROUP
from crio_native.pods import checkpoint, exit_files, names, pod_group, trees
from crio_native.pods.containers import Containers
from crio_native.pods.handlers import Handler
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.sandboxes import Sandboxes, own_namespaces

log = logging.getLogger(__name__)


def recover(node: Node, sandboxes: Sandboxes, containers: Containers, *, booted: bool) -> None:
    """Bring records and kernel together.  Nobody else may use the node meanwhile.

    booted: the machine was, since the last run; it is why what is gone has gone.
    """
    _attempt("irqbalance's configuration", containers.tuning.restore_irqbalance)
    for container in list(node.store.containers.values()):
        _attempt(f"container {container.id}", partial(_container, node, containers, container, booted))
    for pod in list(node.store.pods.values()):
        _attempt(f"pod {pod.id}", partial(_pod, node, sandboxes, pod, booted))
    _attempt("the pod network", lambda: node.network.collect(_networked(node)))
    _attempt("leftovers", lambda: _sweep(node, sandboxes))


def wipe_pods(node: Node, sandboxes: Sandboxes, *, stopped_only: bool = False) -> int:
    """Remove pods with all that they have; how many.  stopped_only: those that live, live in this boot, and stay."""
    gone = 0
    for pod in list(node.store.pods.values()):
        if not stopped_only or pod.state != PodState.READY:
            _attempt(f"pod {pod.id}", partial(sandboxes.remove, pod.id), "removed")
            gone += pod.id not in node.store.pods
    return gone


def wipe_images(node: Node) -> int:
    """Remove the images that no container stands on; how many."""
    used = {container.image_id for container in list(node.store.containers.values())}
    images = [image for image in node.images.own() if image.id not in used]
    for image in images:
        _attempt(f"image {image.id}", partial(node.images.remove, image.id, in_use=used), "removed")
    return len(images) - sum(image.id not in used for image in node.images.own())


def _attempt(what: str, act: Callable[[], object], done: str = "recovered") -> None:
    try:
        act()
    except (CrioError, OSError) as error:
        log.error("%s could not be %s: %s", what, done, error)


def _container(node: Node, containers: Containers, container: Container, booted: bool) -> None:
    match container.state:
        case ContainerState.CREATING:
            log.info("container %s was being made when the daemon stopped; undoing it", container.id)
            containers.discard(container)
        case ContainerState.REMOVING:
            containers.remove(container.id)
        case ContainerState.CREATED | ContainerState.RUNNING:
            checkpoint.forget(node, container)
            try:
                containers.ends.watch(container)
                containers.listen_again(container)
            except NotFound:
                containers.ends.settle(container, booted=booted)


def _pod(node: Node, sandboxes: Sandboxes, pod: Pod, booted: bool) -> None:
    match pod.state:
        case PodState.CREATING:
            log.info("pod %s was being made when the daemon stopped; undoing it", pod.id)
            sandboxes.dismantle(pod)
            node.store.delete(pod)
        case PodState.REMOVING:
            sandboxes.remove(pod.id)
        case PodState.READY if not _whole(node, sandboxes, pod):
            why = "the node was rebooted" if booted else "it has lost its namespaces"
            log.warning("pod %s is not ready any more: %s", pod.id, why)
            sandboxes.stop(pod.id)
        case PodState.NOT_READY if pod.infra is not None or node.layout.pod_run_dir(pod.id).exists():
            log.info("pod %s was being stopped when the daemon was; finishing it", pod.id)
            sandboxes.stop(pod.id)


def _whole(node: Node, sandboxes: Sandboxes, pod: Pod) -> bool:
    """Whether a pod's namespaces are still pinned and its pause process lives (which is then watched again)."""
    try:
        for kind in own_namespaces(pod):
            os.close(kernel.open_namespace(str(node.layout.pins(pod.id)[kind])))
        if pod.infra is not None:
            sandboxes.watch_infra(pod)
    except (OSError, NotFound):
        return False
    return True


def _networked(node: Node) -> list[str]:
    return [pod.id for pod in node.store.pods.values() if pod.state == PodState.READY]


def _sweep(node: Node, sandboxes: Sandboxes) -> None:
    """Remove what belongs to no record: the remains of a state database that was lost."""
    layout = node.layout
    known = set(node.store.pods) | set(node.store.containers)
    # What a shim runs, its monitor only watches: its own runtime must come before those that kill by the monitor.
    handlers = sorted(node.handlers.values(), key=lambda handler: handler.settings.runtime_type != "vm")
    strange = _strangers(layout.runroot / "containers", known)
    cgroups = _cgroups(node, [run_dir.name for run_dir in strange])
    for run_dir in strange:
        log.warning("removing %s, which belongs to no known container", run_dir)
        _attempt(str(run_dir), partial(_end, handlers, run_dir, cgroups[run_dir.name]), "removed")
    places = [layout.runroot / "sandboxes", layout.root / "sandboxes", layout.root / "containers"]
    lost = [directory for place in places for directory in _strangers(place, known)]
    _attempt("their groups", lambda: pod_group.remove_lost([directory.name for directory in lost]), "removed")
    ids = {directory.name for directory in (*strange, *lost)}
    _attempt("their monitors' groups", lambda: _remove_monitor_groups(ids), "removed")
    for directory in lost:
        log.warning("removing %s, which belongs to no known pod", directory)
        _attempt(str(directory), partial(sandboxes.release, directory.name), "removed")
        exit_files.remove(node.settings.container_exits_dir, directory.name)


def _end(handlers: Sequence[Handler], run_dir: Path, cgroups: Sequence[str]) -> None:
    for handler, cgroup in itertools.product(handlers, cgroups or [""]):
        handler.runtime.delete(run_dir.name, run_dir, cgroup)
    trees.remove_tree(run_dir)


def _remove_monitor_groups(ids: Collection[str]) -> None:
    """By their names: the containers' own groups, beside which they are, may have gone before, and so may the settings
    of the handler that had monitors put there."""
    names = frozenset(f"{MONITOR_GROUP}-{object_id}{suffix}" for object_id in ids for suffix in ("", ".scope"))
    for path in hierarchy().find(names) if ids else ():
        group = Cgroup(path)
        group.kill()
        group.remove()


def _cgroups(node: Node, ids: Sequence[str]) -> Mapping[str, list[str]]:
    """The control groups of containers and pause processes, in the words of the cgroup manager.

    They are found by their names: what has lost its record may have lost every file that tells of its parent, and a
    file that is damaged may tell of any other group.
    """
    found: dict[str, list[str]] = {object_id: [] for object_id in ids}
    systemd = node.settings.cgroup_manager == "systemd"
    ids_by_name = {f"crio-{object_id}{'.scope' if systemd else ''}": object_id for object_id in ids}
    for path in hierarchy().find(frozenset(ids_by_name)) if ids else ():
        parent, _, name = path.rpartition("/")
        if systemd:
            parent = os.path.basename(parent)
        # A container may make groups below its own, of any name: those go with it.
        if parent.isprintable() and (parent.endswith(".slice") or not systemd):
            found[ids_by_name[name]].append(node.cgroup_path(parent, ids_by_name[name]))
    return found


def _strangers(parent: Path, known: set[str]) -> list[Path]:
    return [path for path in parent.iterdir() if names.is_id(path.name) and path.name not in known]
