"""The life of a pod sandbox: its namespaces, its network, its files; made, stopped, removed.

The order of making is: intent recorded, files, namespaces, network, shared memory, pause process (only where the pod
shares its PID namespace), `ready` recorded.  Whatever fails, `dismantle` undoes: it needs nothing but the record, and
each of its acts does nothing when there is nothing to undo.  So it also serves Stop, Remove and a start after a crash.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import AlreadyExists, CrioError, FailedPrecondition, InvalidArgument, NotFound
from crio_native.images.roots import UPPER
from crio_native.linux import mounts, syscalls
from crio_native.monitor import client as monitor
from crio_native.oci.builtin import pinning
from crio_native.oci.runtime import ContainerSpec, ExitStatus, Runtime
from crio_native.pods import (
    infra_cpus,
    linked_logs,
    names,
    networking,
    pod_annotations,
    pod_files,
    pod_group,
    preparation,
    refusals,
    selinux,
    spec,
    spec_resources,
    spec_security,
    trees,
    userns,
)
from crio_native.pods.containers import Containers
from crio_native.pods.handlers import Handler
from crio_native.pods.node import Node, Stage
from crio_native.pods.records import HandlerRecord, Pod, PodState, ProcessRecord
from crio_native.pods.values import NamespaceMode, PodConfig

log = logging.getLogger(__name__)

_SHM_SIZE = 64 << 20
_FILES_SIZE = 4 << 20  # of hosts, resolv.conf and hostname, which start with at most 1 MiB each
_TMPFS = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC


class Sandboxes:
    """All calls are synchronous and thread-safe; those that change a pod hold its lock."""

    def __init__(self, node: Node, containers: Containers) -> None:
        self._node = node
        self._levels = selinux.Levels(node.store)
        self._containers = containers

    def run(self, config: PodConfig, handler: str, stage: Stage) -> str:
        """Make a pod; returns its id.

        The retry of a call whose answer never reached its caller gets the pod that this made.  Raises InvalidArgument,
        AlreadyExists, and what namespaces, network and executor raise; then nothing is left.
        """
        node = self._node
        stage("checking the configuration")
        name = names.pod_name(config.metadata)
        _check(config)
        userns_options = userns.of_pod(config, node.settings, node.host)
        sysctls = spec_resources.pod_sysctls(config.linux.sysctls, node.settings.default_sysctls, config.namespaces)
        chosen = self._handler(config, handler)
        if userns_options is not None and not chosen.abilities.user_namespaces:
            raise FailedPrecondition(
                "config.linux.security_context.namespace_options.userns_options: "
                f"the handler {chosen.name!r} does not tell that it can show files to a user namespace by its owners "
                "(features: linux.mountExtensions.idmap); use one of runtime_type builtin"
            )
        pod = Pod(
            id=names.new_id(),
            name=name,
            config=config,
            handler=chosen.name,
            executor=HandlerRecord.of(chosen.settings),
            created_at=time.time_ns(),
            cgroup=node.cgroup_parent(config.linux.cgroup_parent),
            userns=userns_options,
        )
        _shm_size(pod, chosen.settings, node.settings)  # refuse a bad one before anything is made
        level = selinux.level_of_pod(config, node.settings, node.host, self._levels, pod.id)
        pod = dataclasses.replace(pod, hostname=self._hostname(pod), selinux_level=level)
        with node.locks.hold(pod.id):
            stage("recording the pod")
            try:
                node.store.insert(pod)
            except BaseException as error:
                self._levels.release(pod.id)
                if isinstance(error, AlreadyExists):
                    return self._retried(pod)
                raise
            try:
                self._make(pod, sysctls, stage)
            except BaseException:
                self._undo(pod)
                raise
        return pod.id

    def _handler(self, config: PodConfig, name: str) -> Handler:
        """The pod's handler, with the program of the platform that an allowed annotation names.

        Raises InvalidArgument, FailedPrecondition.
        """
        handlers, workloads = self._node.handlers, self._node.settings.workloads
        chosen = handlers.usable(name)
        _, platform = pod_annotations.Allowed(config.annotations, chosen.settings, workloads).get("platform")
        return handlers.usable(name, platform) if platform else chosen

    def claim(self, pod_id: str) -> None:
        """The caller has the id: from now on its name is taken for everybody."""
        try:
            self._node.store.update(Pod, pod_id, wait=False, claimed=True)
        except NotFound:
            pass

    def stop(self, pod_id: str, stage: Stage = lambda _: None) -> None:
        """Kill the pod's containers and free its network and namespaces.  Nothing happens when that is done."""
        node = self._node
        pod = node.store.get(Pod, pod_id)
        with node.locks.hold(pod_id):
            if pod_id not in node.store.pods:
                return
            # Not waited for: on a full disk stopping is what frees space, and a start finds out by itself.
            node.store.update(Pod, pod_id, wait=False, state=PodState.NOT_READY)
            stage("stopping the containers")
            self._containers.kill_of_pod(pod_id)
            stage("taking the network down")
            self.dismantle(pod, files=False)
            node.store.update(Pod, pod_id, wait=False, infra=None)

    def remove(self, pod_id: str, stage: Stage = lambda _: None) -> None:
        """Remove the pod with all that it has; a pod that is not there is removed already.

        The containers go first, whatever else cannot be undone: on a full disk it is they who hold the space.
        """
        node = self._node
        if pod_id not in node.store.pods:
            return
        with node.locks.hold(pod_id):
            pod = node.store.pods.get(pod_id)
            if pod is None:
                return
            node.store.update(Pod, pod_id, wait=False, state=PodState.REMOVING)
            stage("stopping the containers")
            self._containers.kill_of_pod(pod_id)
            stage("removing the containers")
            for container in node.store.of_pod(pod_id):
                self._containers.remove(container.id)
            stage("removing the pod's files")
            self.dismantle(pod)
            self._forget(pod)

    def dismantle(self, pod: Pod, *, files: bool = True) -> None:
        """Undo all of a pod but its record and its containers; idempotent.  files=False leaves its directory."""
        acts = [lambda: self._delete_infra(pod), lambda: linked_logs.unmount(pod)]
        _try_all([*acts, lambda: self.release(pod.id, files=files)], pod.id)

    def release(self, pod_id: str, *, files: bool = True) -> None:
        """The part of `dismantle` that needs no more than an id."""
        node, layout = self._node, self._node.layout
        acts = [
            lambda: node.network.teardown(pod_id),
            lambda: node.namespaces.unpin_namespaces(layout.pins(pod_id).values()),
            lambda: _unmount(str(layout.shm(pod_id))),
            lambda: _unmount(str(layout.pod_dir(pod_id))),
            lambda: trees.remove_tree(layout.pod_run_dir(pod_id)),
        ]
        if files:
            acts.append(lambda: trees.remove_tree(layout.pod_dir(pod_id)))
            acts.append(lambda: preparation.release(layout, pod_id))
        _try_all(acts, pod_id)

    def watch_infra(self, pod: Pod) -> None:
        """Notice the end of the pod's pause process.  Raises NotFound when it has ended."""
        runtime = self._pause_runtime(pod)
        assert runtime is not None, "a pod with a pause process has who runs it"
        sock = runtime.watch(pod.id, self._node.layout.run_dir(pod.id))
        self._node.exits.watch(pod.id, sock, runtime.read_exit, self._infra_ended)

    def _retried(self, pod: Pod) -> str:
        """The unclaimed pod that an equal call made; its pending work is waited for."""
        store = self._node.store
        holder = store.by_name(Pod, pod.name)
        if holder is not None:
            with self._node.locks.hold(holder.id):
                holder = store.pods.get(holder.id)
        same = holder and (holder.config, holder.handler) == (pod.config, pod.handler)
        if holder is not None and same and holder.state == PodState.READY and not holder.claimed:
            return holder.id
        taken = f"by pod {holder.id} ({holder.state})" if holder else "and was set free just now; try again"
        raise AlreadyExists(
            f"the pod name {pod.name!r} is taken {taken}; use another attempt number, or remove that pod"
        )

    def _allowed(self, pod: Pod) -> pod_annotations.Allowed:
        settings = self._node.handlers.settings_of(pod.handler)
        return pod_annotations.Allowed(pod.config.annotations, settings, self._node.settings.workloads)

    def _hostname(self, pod: Pod) -> str:
        if pod.config.namespaces.network is NamespaceMode.NODE:
            return self._node.host.hostname
        return pod.config.hostname or pod.id[:12]

    def _make(self, pod: Pod, sysctls: dict[str, str], stage: Stage) -> None:
        node, layout = self._node, self._node.layout
        if node.settings.cgroup_manager == "cgroupfs":
            node.parents.make(pod.cgroup, pod.id)
        os.mkdir(layout.pod_dir(pod.id), 0o700)
        os.mkdir(layout.pod_run_dir(pod.id), 0o700)
        ips: tuple[str, ...] = ()
        own = own_namespaces(pod)
        pins = {kind: path for kind, path in layout.pins(pod.id).items() if kind in own}
        if pins:
            stage("making the namespaces")
            with refusals.of_sysctls(pod.config.linux.sysctls):
                netlink = self._pin(pod, pins, sysctls)
            if netlink is not None:
                with netlink:
                    stage("setting the network up")
                    ips = networking.connect(node, pod, netlink).ips
        stage("writing the pod's files")
        labels = selinux.of_container(pod, None, node.settings, node.host)
        selinux.check_policy(labels)
        _mount_files(str(layout.pod_dir(pod.id)))
        pod_files.write(
            layout.pod_dir(pod.id),
            hostname=pod.hostname,
            dns=pod.config.dns_config,
            host_network="net" not in own,
            ips=ips,
            owner=userns.root_of(pod.userns),
            label=labels.files,
        )
        if "ipc" in own:
            size = _shm_size(pod, node.handlers.usable(pod.handler).settings, node.settings)
            label = selinux.of_shared_memory(labels, node.host)
            _mount_shm(str(layout.shm(pod.id)), userns.root_of(pod.userns), size, label)
        linked_logs.mount(pod, self._allowed(pod), labels.files)
        infra = None
        pause = self._pause_runtime(pod)
        if pause is not None:
            stage("starting the pause process")
            infra = self._start_infra(pod, pause, labels)
        else:
            pod_group.make(node, pod)
        node.store.update(Pod, pod.id, state=PodState.READY, ips=ips, infra=infra)
        if infra is not None:
            self.watch_infra(pod)

    def _pin(self, pod: Pod, pins: dict[str, Path], sysctls: dict[str, str]) -> socket.socket | None:
        launchers = self._node.namespaces
        if pod.userns is None:
            return launchers.pin_namespaces(pins, hostname=pod.hostname, sysctls=sysctls)
        uid_map, gid_map = userns.map_lines(pod.userns)
        return pinning.pin_namespaces(
            launchers, pins, uid_map=uid_map, gid_map=gid_map, hostname=pod.hostname, sysctls=sysctls
        )

    def _pause_runtime(self, pod: Pod) -> Runtime | None:
        """Who runs the pod's pause process; None for a pod that needs none.  A shim's pod begins with its first
        container: for one that runs virtual machines it is the machine."""
        node = self._node
        if pod.executor is not None and pod.executor.runtime_type == "vm":
            return node.executor(pod)
        wanted = pod.config.namespaces.pid is NamespaceMode.POD or not node.settings.drop_infra_ctr
        has_one = wanted or node.layout.run_dir(pod.id).exists()  # made under another configuration
        return node.handlers.pause if has_one else None

    def _start_infra(self, pod: Pod, runtime: Runtime, labels: selinux.Labels) -> ProcessRecord:
        node, layout = self._node, self._node.layout
        bundle, run_dir = layout.bundle(pod.id), layout.run_dir(pod.id)
        os.mkdir(bundle, 0o700)
        os.mkdir(bundle / "rootfs", 0o755)  # the pause process is not root
        os.chown(bundle / "rootfs", *userns.root_of(pod.userns))
        os.mkdir(bundle / UPPER, 0o700)  # empty: cAdvisor fails for who has none
        os.mkdir(run_dir, 0o700)
        label = labels.process if runtime is node.handlers.pause else ""  # a machine's process has a domain of its own
        program = str(bundle / "pause") if label else ""
        if program:
            pod_files.copy_program(monitor.binary_path(), program, labels.files)
        config = spec.infra_spec(pod, spec.Node(node.settings, node.host, layout, node.profiles), label)
        process = runtime.create(ContainerSpec(pod.id, config, bundle, run_dir, pause=True, pause_program=program))
        infra_cpus.keep_monitor_on(node.settings.infra_ctr_cpuset, process)
        runtime.start(pod.id, run_dir)
        return ProcessRecord.of(process)

    def _delete_infra(self, pod: Pod) -> None:
        run_dir = self._node.layout.run_dir(pod.id)
        runtime = self._pause_runtime(pod)
        if runtime is None:
            pod_group.remove(self._node, pod)
            return
        runtime.delete(pod.id, run_dir, self._node.cgroup_path(pod.cgroup, pod.id))
        trees.remove_tree(run_dir)

    def _infra_ended(self, pod_id: str, status: ExitStatus | None) -> None:
        """Without its first process the PID namespace is dead, and every container in it: the pod is not ready."""

        def not_ready(pod: Pod) -> Pod:
            return dataclasses.replace(pod, state=PodState.NOT_READY) if pod.state == PodState.READY else pod

        try:
            self._node.store.change(Pod, pod_id, not_ready, wait=False)
        except NotFound:
            return
        log.info("the pause process of pod %s has ended: %s", pod_id, status)

    def _undo(self, pod: Pod) -> None:
        try:
            self.dismantle(pod)
            self._forget(pod)
        except (CrioError, OSError) as error:
            # The record stays, in `creating`: it is what a later Remove or start finds the rest by.
            log.error("pod %s could not be undone and is kept for removal: %s", pod.id, error)
            self._node.store.update(Pod, pod.id, state=PodState.NOT_READY)

    def _forget(self, pod: Pod) -> None:
        store = self._node.store
        store.delete(pod)
        self._node.parents.leave(lambda: [other.cgroup for other in store.pods.values()])


def own_namespaces(pod: Pod) -> set[str]:
    """The kinds of those that are not the host's, as `Layout.pins` has them."""
    modes = pod.config.namespaces
    own = {"net", "uts"} if modes.network is not NamespaceMode.NODE else set()
    if modes.ipc is not NamespaceMode.NODE:
        own.add("ipc")
    if pod.userns is not None:
        own.add("user")
    return own


def _try_all(acts: list[Callable[[], None]], pod_id: str) -> None:
    """Do every act, also when an earlier one fails; the first failure is raised at the end."""
    failures = []
    for act in acts:
        try:
            act()
        except (CrioError, OSError) as error:
            log.warning("pod %s: %s", pod_id, error)
            failures.append(error)
    if failures:
        raise failures[0]


def _check(config: PodConfig) -> None:
    pod_files.check_hostname(config.hostname)
    pod_files.check_dns(config.dns_config)
    networking.capabilities(config)
    for field in ("resources", "overhead"):
        if (asked := getattr(config.linux, field)) is not None:
            spec_resources.check_pod(asked, f"config.linux.{field}")
    spec_security.check_namespaces(config.namespaces, "config.linux.security_context.namespace_options")
    if config.namespaces.pid is NamespaceMode.TARGET:
        raise InvalidArgument(
            "config.linux.security_context.namespace_options.pid",
            "TARGET",
            "is for containers; use POD, CONTAINER or NODE",
        )
    _check_log_directory(config.log_directory)
    if config.namespaces.network is NamespaceMode.NODE and any(
        m.host_port and m.host_port != m.container_port for m in config.port_mappings
    ):
        raise InvalidArgument(
            "config.port_mappings", config.port_mappings, "a pod on the host's network cannot map one port to another"
        )


def _check_log_directory(path: str) -> None:
    """It need not be there yet: the pod's first container makes it."""
    if path and (not path.startswith("/") or ".." in path.split("/")):
        raise InvalidArgument("config.log_directory", path, "must be an absolute path without '..'")
    existing = path
    while existing and not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if existing and not os.path.isdir(existing):
        raise InvalidArgument("config.log_directory", path, f"{existing} is no directory")


def _shm_size(pod: Pod, handler: RuntimeHandler, settings: RuntimeTable) -> int:
    """Bytes of the pod's /dev/shm.  Raises InvalidArgument for an annotation that is no size."""
    return pod_annotations.Allowed(pod.config.annotations, handler, settings.workloads).shm_size() or _SHM_SIZE


def _mount_shm(path: str, owner: tuple[int, int], size: int, label: str) -> None:
    """A tmpfs of its own: a directory on the run directory's would let one pod fill it for all."""
    os.mkdir(path, 0o700)
    context = f',context="{label}"' if label else ""
    syscalls.mount("shm", path, "tmpfs", _TMPFS, f"mode=1777,size={size},uid={owner[0]},gid={owner[1]}{context}")


def _mount_files(path: str) -> None:
    """A tmpfs, too, as containers may write to the pod's files: on the disk these would count for nobody's limit."""
    syscalls.mount("files", path, "tmpfs", _TMPFS, f"mode=700,size={_FILES_SIZE}")


def _unmount(path: str) -> None:
    while os.path.ismount(path):
        syscalls.umount2(path, mounts.MNT_DETACH)
