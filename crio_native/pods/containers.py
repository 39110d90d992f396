"""The life of a container: created, started, stopped, removed.  Its end is `ends`' business.

A container's record says what state it is in; the truth about its process is with its monitor, which outlives the
daemon.  Create, start and remove hold the container's lock.  Stop and kill do not: a signal must get through whatever
else waits, so every change of state looks at the state that it changes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from concurrent.futures import Future
from pathlib import Path

from crio_native.errors import (
    AlreadyExists,
    CrioError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    StartFailed,
)
from crio_native.images.roots import UPPER
from crio_native.linux.cgroup import cgroup_of
from crio_native.oci.refusals import OF_VALUES
from crio_native.oci.runtime import ContainerSpec, ExecSession, ExecSpec, ExitStatus, Process, Runtime
from crio_native.pods import (
    checkpoint,
    exit_files,
    image_volumes,
    infra_cpus,
    linked_logs,
    names,
    pausing,
    pod_annotations,
    preparation,
    refusals,
    restoring,
    seccomp_notifier,
    spec,
    spec_security,
    trees,
    tuning,
)
from crio_native.pods.commands import Heritages
from crio_native.pods.ends import SIGKILL, Ends
from crio_native.pods.node import Node, Stage
from crio_native.pods.records import Container, ContainerState, Pod, PodState, ProcessRecord
from crio_native.pods.signals import stop_signal
from crio_native.pods.values import ContainerConfig, NamespaceMode

log = logging.getLogger(__name__)


class Containers:
    """All calls are synchronous and thread-safe."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._heritages = Heritages(node.layout)
        node.notifiers.stop = self._stop_forbidden
        settings = node.settings
        self.tuning = tuning.Tuning(
            node.layout.runroot / "tuning", settings.irqbalance_config_file, settings.irqbalance_config_restore_file
        )
        self.ends = Ends(node, self.tuning)

    def create(self, pod_id: str, config: ContainerConfig, stage: Stage) -> str:
        """Make a container up to, not including, its command; returns its id.

        The retry of a call whose answer never reached its caller gets the container that this made.  Raises
        InvalidArgument, NotFound (pod, image), FailedPrecondition, AlreadyExists, StepFailed; then nothing is left.
        """
        node = self._node
        stage("checking the configuration")
        pod = node.store.get(Pod, pod_id)
        if not restoring.is_file(config):
            return self._create(pod, config, stage)
        act = f"a container from {config.image.image}"
        checkpoint.check_allowed(node.config.checkpoint_restore.container_level_enabled, act, restore=True)
        checkpoint.check_criu(act)
        stage("unpacking the checkpoint")
        with restoring.unpacked(node, config.image.image) as saved:
            return self._create(pod, restoring.with_base_image(node, config, saved), stage, saved)

    def _create(self, pod: Pod, config: ContainerConfig, stage: Stage, saved: Path | None = None) -> str:
        """saved: the content of a checkpoint that it is made from."""
        node = self._node
        asked = config.linux.security_context.namespace_options
        if asked is not None:
            spec_security.check_container_namespaces(asked, pod)
        name = names.container_name(config.metadata, pod.config.metadata)
        if not config.image.image:
            raise InvalidArgument("config.image.image", "", "names no image")
        image = node.images.get(config.image.image)
        stage("judging the image by the trust policy")
        name_of_image = config.image.user_specified_image or config.image.image
        node.images.authorize(image, name_of_image, pod.config.metadata.namespace)
        image_config = image.config.get("config") or {}
        container_id = names.new_id()
        container = Container(
            id=container_id,
            name=name,
            pod_id=pod.id,
            config=config,
            handler=pod.handler,
            created_at=time.time_ns(),
            image_id=image.id,
            image_ref=image.digests[0] if image.digests else image.id,
            image_volumes=image_volumes.resolve(config.mounts, node.images, pod.config.metadata.namespace),
            log_path=self._log_path(pod, container_id, config),
            cgroup=node.cgroup_path(pod.cgroup, container_id),
            stop_signal=stop_signal(config.stop_signal, str(image_config.get("StopSignal") or "")),
            resources=preparation.resources(node, pod, config, node.handlers.usable(pod.handler).settings),
        )
        with node.locks.hold(container_id):
            stage("recording the container")
            try:
                node.store.insert(container)
            except AlreadyExists:
                return self._retried(container)
            try:
                self._make(container, image_config, stage, saved)
            except BaseException:
                self._undo(container)
                raise
        return container_id

    def claim(self, container_id: str) -> None:
        """The caller has the id: from now on its name is taken for everybody."""
        try:
            self._node.store.update(Container, container_id, wait=False, claimed=True)
        except NotFound:
            pass

    def start(self, container_id: str) -> None:
        """Let the command run.  Raises FailedPrecondition when it has run before, StartFailed when execve refuses."""
        node = self._node
        with node.locks.hold(container_id):
            container = node.store.get(Container, container_id)
            if container.state != ContainerState.CREATED:
                raise FailedPrecondition(
                    f"container {container_id} is {container.state}; only a created container can be started"
                )
            self._tune(self._ready_pod(container.pod_id), container)
            runtime = self._runtime(container)
            with self.ends.before(container_id):
                self._start(container_id, runtime)

    def signal_stop(self, container_id: str) -> Future[None]:
        """Send the stop signal; the future is done when the container has ended.  Raises NotFound for no container."""
        container = self._node.store.get(Container, container_id)
        if container.state == ContainerState.RUNNING:
            self._signal(container, container.stop_signal)
        elif container.state == ContainerState.CREATED:
            self._signal(container, SIGKILL)  # our own init, which heeds nothing else
        return self.ends.of(container_id)

    def kill(self, container_id: str) -> None:
        """SIGKILL to the container's first process; its others follow when it has ended."""
        container = self._node.store.containers.get(container_id)
        if container is not None and container.live:
            self._signal(container, SIGKILL)

    def kill_of_pod(self, pod_id: str) -> None:
        """Kill all containers of a pod and wait for their ends.  Raises DeadlineExceeded naming one that stays."""
        mine = self._node.store.of_pod(pod_id)
        for container in mine:
            if container.state == ContainerState.CREATING:
                with self._node.locks.hold(container.id):
                    pass  # it sees the pod's state when it is done, and undoes itself
            self.kill(container.id)
        for container in mine:
            self.ends.wait(container.id)

    def remove(self, container_id: str) -> None:
        """Remove a container with all that it has, killing it first if it lives; nothing happens if it is gone."""
        node, layout = self._node, self._node.layout
        with node.locks.hold(container_id):
            container = node.store.containers.get(container_id)
            if container is None:
                return
            self.kill(container_id)
            self.ends.wait(container_id)
            node.store.update(Container, container_id, wait=False, state=ContainerState.REMOVING)
            self._free(container)
            trees.remove_tree(layout.logs / container_id)  # only where the pod named no directory for its logs
            self._forget(container)
            self.ends.forget(container_id)

    def exec(
        self,
        container_id: str,
        args: tuple[str, ...],
        stdout: int = -1,
        stderr: int = -1,
        *,
        stdin: int = -1,
        terminal: bool = False,
        waits: bool = True,
    ) -> ExecSession:
        """Start a command inside a running container, on the given descriptors or on a terminal of its own.

        waits: see `oci.runtime.ExecSpec`.  Raises FailedPrecondition when the container does not run, StartFailed when
        execve refuses.
        """
        node = self._node
        container = node.store.get(Container, container_id)
        process, runtime = container.process, self._runtime(container)
        if container.state != ContainerState.RUNNING or process is None:
            raise FailedPrecondition(f"container {container_id} is {container.state}; exec needs a running one")
        heritage = self._heritages.of(container_id)
        request = ExecSpec(
            process=spec.exec_process(heritage.process, args, process.user, terminal=terminal),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            seccomp=heritage.seccomp,
            linux=heritage.linux,
            shared_pids=self._shares_pids(container),
            waits=waits,
        )
        return runtime.exec(container_id, process.process(), container.cgroup, request)

    def _shares_pids(self, container: Container) -> bool:
        """Whether processes of other containers are in its PID namespace, or may be: of the pod, or a debugger's."""
        store = self._node.store
        pod = store.get(Pod, container.pod_id)
        asked = (each.config.linux.security_context.namespace_options for each in store.of_pod(pod.id))
        return pod.config.namespaces.pid is NamespaceMode.POD or any(
            options is not None and options.pid is NamespaceMode.TARGET for options in asked
        )

    def reopen_log(self, container_id: str) -> None:
        """Raises FailedPrecondition when the container does not run."""
        container = self._node.store.get(Container, container_id)
        if container.state != ContainerState.RUNNING:
            raise FailedPrecondition(
                f"container {container_id} is {container.state}; only a running one has an open log"
            )
        self._runtime(container).reopen_log(container_id, self._node.layout.run_dir(container_id))

    def discard(self, container: Container) -> None:
        """Undo a container that was never finished, with its record."""
        self._free(container)
        self._forget(container)

    def _stop_forbidden(self, container_id: str, calls: str) -> None:
        log.warning("container %s is stopped: it %s", container_id, calls)
        self.ends.forbid(container_id, calls)
        self.kill(container_id)

    def listen_again(self, container: Container) -> None:
        """To what seccomp forbids the commands that are run in it: an exec needs somebody who takes its notifications,
        if it inherits such a filter."""
        node = self._node
        pod = node.store.get(Pod, container.pod_id)
        allowed = pod_annotations.Allowed(
            pod.config.annotations,
            node.handlers.settings_of(pod.handler),
            node.settings.workloads,
            container.config.metadata.name,
        )
        action = seccomp_notifier.action(allowed)
        if action:
            node.notifiers.listen_again(container.id, container.name, stop=action == "stop")

    def _tune(self, pod: Pod, container: Container) -> None:
        """What a latency-sensitive container changes around itself, before its command runs."""
        node = self._node
        wishes = preparation.wishes(node, pod, container.config, node.handlers.settings_of(pod.handler))
        if wishes.no_quota or wishes.no_balancing:
            group = cgroup_of(container.cgroup, node.settings.cgroup_manager)
            tuning.unbind(group, quota=wishes.no_quota, balancing=wishes.no_balancing)
        self.tuning.apply(container.id, wishes)

    def _start(self, container_id: str, runtime: Runtime) -> None:
        try:
            runtime.start(container_id, self._node.layout.run_dir(container_id))
        except StartFailed as error:
            self.ends.record(container_id, ExitStatus(128), reason="StartError", message=str(error))
            raise
        except NotFound:
            raise FailedPrecondition(f"container {container_id} ended before it was started") from None
        except FailedPrecondition:
            pass  # a daemon that was killed had started it, but did not live to record that
        self._node.store.change(Container, container_id, _started)

    def _make(self, container: Container, image_config: dict[str, object], stage: Stage, saved: Path | None) -> None:
        node, layout = self._node, self._node.layout
        pod = self._ready_pod(container.pod_id)
        settings, runtime = node.handlers.usable(pod.handler).settings, node.executor(pod)
        bundle, run_dir = layout.bundle(container.id), layout.run_dir(container.id)
        pid_path = self._pid_path(pod, container, runtime)
        built = preparation.prepare(node, pod, container, image_config, settings, pid_path, stage)
        if container.log_path:
            _make_log_directory(os.path.dirname(container.log_path), container.config.log_path)
            workloads = node.settings.workloads
            linked_logs.link(pod, container, pod_annotations.Allowed(pod.config.annotations, settings, workloads))
        made = [path for source in built.absent_sources for path in _make_directories(source)]
        try:
            preparation.label_volumes(node, pod, container, settings, stage)
            wanted = ContainerSpec(
                id=container.id,
                spec=built.spec,
                bundle=bundle,
                run_dir=run_dir,
                overlay=built.overlay,
                log_path=container.log_path,
                log_size_max=node.settings.log_size_max,
                journal=container.name if node.settings.log_to_journald else "",
                stdin=container.config.stdin,
                stdin_once=container.config.stdin_once,
                user=built.user,
            )
            process = self._process(runtime, container, image_config, wanted, stage, saved)
            infra_cpus.keep_monitor_on(node.settings.infra_ctr_cpuset, process)
            self._watch_new(container)
            # What was looked at before may have changed meanwhile: a pod that was stopped; or a pid that became
            # another process's, and with it the namespace that was joined.
            self._ready_pod(container.pod_id)
            self._pid_path(pod, container, runtime)
        except BaseException:
            _remove_directories(made)
            raise
        node.store.change(
            Container,
            container.id,
            lambda c: dataclasses.replace(c, process=ProcessRecord.of(process), state=_after_create(c.state)),
        )

    def _process(
        self,
        runtime: Runtime,
        container: Container,
        image_config: dict[str, object],
        wanted: ContainerSpec,
        stage: Stage,
        saved: Path | None,
    ) -> Process:
        """New, or made again from a checkpoint."""
        if saved is None:
            stage("making the container")
            with refusals.of_container(container.config, self._node.settings.bind_mount_prefix, image_config):
                return runtime.create(wanted)
        stage("applying the checkpoint's changes")
        restoring.apply_changes(saved, wanted.bundle / UPPER)
        stage("restoring the container")
        return runtime.restore(wanted, saved / restoring.IMAGES)

    def _watch_new(self, container: Container) -> None:
        try:
            self.ends.watch(container)
        except NotFound:
            raise Internal(f"container {container.id} ended before it was started") from None

    def _ready_pod(self, pod_id: str) -> Pod:
        pod = self._node.store.get(Pod, pod_id)
        if pod.state != PodState.READY:
            raise FailedPrecondition(f"pod {pod_id} is {pod.state}; containers need a ready pod")
        return pod

    def _pid_path(self, pod: Pod, container: Container, runtime: Runtime) -> str:
        """The PID namespace that the container's mode names, by a process that lives in it; "" for a new one."""
        options = container.config.linux.security_context.namespace_options or pod.config.namespaces
        field = "config.linux.security_context.namespace_options"
        if options.pid is NamespaceMode.TARGET:
            target = self._node.store.get(Container, options.target_id)
            if target.pod_id != pod.id or target.state != ContainerState.RUNNING:
                raise InvalidArgument(f"{field}.target_id", options.target_id, "must be a running container of the pod")
            holder = target.process
        elif options.pid is NamespaceMode.POD:
            if pod.infra is None:
                raise InvalidArgument(f"{field}.pid", "POD", "the pod was made without a PID namespace of its own")
            holder = pod.infra
        else:
            return ""
        if holder is None or not runtime.is_alive(holder.process()):
            raise FailedPrecondition(f"the process whose PID namespace container {container.name!r} wants has ended")
        return f"/proc/{holder.pid}/ns/pid"

    def _log_path(self, pod: Pod, container_id: str, config: ContainerConfig) -> str:
        path, directory = config.log_path, pod.config.log_directory
        if not path:
            return ""
        if path.startswith("/") or ".." in path.split("/"):
            raise InvalidArgument("config.log_path", path, "must be relative to the pod's log_directory, without '..'")
        if directory:
            return f"{directory}/{path}"
        return str(self._node.layout.logs / container_id / os.path.basename(path))

    def _retried(self, container: Container) -> str:
        """The unclaimed container that an equal call made; its pending work is waited for."""
        store = self._node.store
        holder = store.by_name(Container, container.name)
        if holder is not None:
            with self._node.locks.hold(holder.id):
                holder = store.containers.get(holder.id)
        same = holder and (holder.config, holder.pod_id) == (container.config, container.pod_id)
        if holder is not None and same and holder.state == ContainerState.CREATED and not holder.claimed:
            return holder.id
        taken = f"by container {holder.id} ({holder.state})" if holder else "and was set free just now; try again"
        raise AlreadyExists(
            f"the container name {container.name!r} is taken {taken}; "
            "use another attempt number, or remove that container"
        )

    def _runtime(self, container: Container) -> Runtime:
        return self._node.executor_of(container)

    def _signal(self, container: Container, number: int) -> None:
        try:
            self._runtime(container).kill(container.id, self._node.layout.run_dir(container.id), number)
            pausing.thaw(self._node, container)
        except NotFound:
            pass  # it has ended by itself: what was wanted

    def _free(self, container: Container) -> None:
        """Let go of all that a container has, except its record; idempotent."""
        pod = self._node.store.pods.get(container.pod_id)
        if pod is not None:
            linked_logs.unlink(pod, container.id)
        layout = self._node.layout
        run_dir = layout.run_dir(container.id)
        self._runtime(container).delete(container.id, run_dir, container.cgroup)
        self.tuning.release(container.id)
        self._node.notifiers.close(container.id)
        trees.remove_tree(run_dir)
        preparation.release(layout, container.id)

    def _forget(self, container: Container) -> None:
        """With the record goes the exit file: before it, for nobody looks for that without a record, and after it, for
        an end may have been noticed in between."""
        exits = self._node.settings.container_exits_dir
        exit_files.remove(exits, container.id)
        self._node.store.delete(container)
        exit_files.remove(exits, container.id)

    def _undo(self, container: Container) -> None:
        try:
            self.discard(container)
        except (CrioError, OSError) as error:
            # The record stays: it is what a later Remove or start finds the rest by.
            log.error("container %s could not be undone and is kept for removal: %s", container.id, error)
            self.ends.record(container.id, ExitStatus(128), reason="CreateError", message=str(error))
        self.ends.forget(container.id)


def _make_log_directory(path: str, log_path: str) -> None:
    """log_path: as the request has it."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError as error:
        if error.errno not in OF_VALUES:
            raise
        why = f"its directory cannot be made: {error.filename}: {os.strerror(error.errno).lower()}"
        raise InvalidArgument("config.log_path", log_path, why) from None


def _started(container: Container) -> Container:
    state = ContainerState.RUNNING if container.state == ContainerState.CREATED else container.state
    return dataclasses.replace(container, state=state, started_at=time.time_ns())


def _after_create(state: str) -> str:
    """A container whose end was noticed before its creation was recorded has ended."""
    return ContainerState.CREATED if state == ContainerState.CREATING else state


def _make_directories(path: str) -> list[str]:
    """Make a directory with its parents; those that were made, deepest last."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    made: list[str] = []
    try:
        for each in reversed(missing):
            os.mkdir(each, 0o755)
            made.append(each)
    except OSError as error:
        _remove_directories(made)
        raise Internal(
            f"the mount source {missing[0]} does not exist and cannot be made: {os.strerror(error.errno or 0).lower()}"
        ) from None
    return made


def _remove_directories(made: list[str]) -> None:
    for path in reversed(made):
        try:
            os.rmdir(path)
        except OSError:
            return  # somebody uses it already
