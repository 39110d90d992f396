"""`crioctl run`: a pod with one container, made, followed and removed as one thing.

`pod_config` and `container_config` translate options into CRI messages and touch nothing; the rest is the order of
calls, and undoing them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import interactive, isolation, logs, parse, show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import RUN_NAMESPACE, Node, Pod
from crio_native.cli.ctl.images import pull_image
from crio_native.cli.ctl.streams import Command, Streams
from crio_native.errors import (
    AlreadyExists,
    CrioError,
    DeadlineExceeded,
    NotFound,
    PermissionRefused,
    Unavailable,
    Unimplemented,
)

LOG_NAME = "container.log"
CREATE_GRANT = 240  # seconds that making a pod or a container may take; the kubelet's own patience
STOP_GRACE = 10  # seconds between the stop signal and the kill


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `run`, named as click names them."""

    image: str
    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    name: str = ""
    remove: bool = False
    detach: bool = False
    pull: str = "missing"
    handler: str = ""
    env: tuple[api.KeyValue, ...] = ()
    volumes: tuple[api.Mount, ...] = ()
    ports: tuple[api.PortMapping, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    memory: int | None = None
    cpus: int | None = None
    pids: int | None = None
    user: api.LinuxContainerSecurityContext | None = None
    workdir: str = ""
    hostname: str = ""
    host_network: bool = False
    host_pid: bool = False
    host_ipc: bool = False
    share_pid: bool = False
    read_only: bool = False
    no_new_privs: bool = False
    seccomp: api.SecurityProfile | None = None
    tty: bool = False
    interactive: bool = False

    @property
    def talks(self) -> bool:
        """Whether our standard streams are the container's."""
        return self.interactive and not self.detach

    def check(self) -> None:
        """Refuse combinations that cannot work.  Raises click.UsageError."""
        for wrong, why in (
            (self.remove and self.detach, "--rm needs the foreground: after --detach nobody is here to remove it"),
            (self.host_pid and self.share_pid, "--host-pid and --share-pid exclude each other"),
            (self.host_network and self.ports, "--publish has no meaning with --host-network"),
            (self.host_network and self.hostname, "--hostname cannot be set with --host-network"),
            (self.entrypoint == "" and not self.command, "an empty --entrypoint needs a COMMAND to run instead"),
            (self.workdir and not self.workdir.startswith("/"), "--workdir must be an absolute path"),
        ):
            if wrong:
                raise click.UsageError(why)
        interactive.streams_of(self.talks, self.tty)


def namespaces(options: RunOptions) -> api.NamespaceOption:
    pid = api.NODE if options.host_pid else api.POD if options.share_pid else api.CONTAINER
    return api.NamespaceOption(
        network=api.NODE if options.host_network else api.POD, pid=pid, ipc=api.NODE if options.host_ipc else api.POD
    )


def pod_config(options: RunOptions, uid: str, log_directory: str) -> api.PodSandboxConfig:
    """The pod: named like the container, in crioctl's own namespace."""
    return api.PodSandboxConfig(
        metadata=api.PodSandboxMetadata(name=options.name, uid=uid, namespace=RUN_NAMESPACE),
        hostname=options.hostname or ("" if options.host_network else re.sub(r"[_.]", "-", options.name)),
        log_directory=log_directory,
        port_mappings=options.ports,
        labels=dict(options.labels),
        annotations=dict(options.annotations),
        linux=api.LinuxPodSandboxConfig(
            sysctls=dict(options.sysctls),
            security_context=api.LinuxSandboxSecurityContext(
                namespace_options=namespaces(options),
                privileged=options.privileged,
                seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
            ),
        ),
    )


def resources(options: RunOptions) -> api.LinuxContainerResources:
    limits = api.LinuxContainerResources(memory_limit_in_bytes=options.memory or 0)
    if options.cpus:
        limits.cpu_period, limits.cpu_quota = parse.CPU_PERIOD, options.cpus
        limits.cpu_shares = max(2, options.cpus * 1024 // parse.CPU_PERIOD)
    if options.pids:
        limits.unified["pids.max"] = str(options.pids)
    return limits


def command_line(options: RunOptions) -> tuple[Sequence[str], Sequence[str]]:
    """The CRI's command, which replaces the image's entrypoint, and args.

    An empty --entrypoint sets the image's aside, which the CRI can say only by giving the whole COMMAND in its place.
    """
    if options.entrypoint == "":
        return options.command, ()
    return [options.entrypoint] if options.entrypoint else (), options.command


def container_config(options: RunOptions, image: str) -> api.ContainerConfig:
    """The container; `image` is the reference that the runtime gave."""
    security = api.LinuxContainerSecurityContext(
        capabilities=api.Capability(add_capabilities=options.cap_add, drop_capabilities=options.cap_drop),
        privileged=options.privileged,
        namespace_options=namespaces(options),
        readonly_rootfs=options.read_only,
        no_new_privs=options.no_new_privs,
        seccomp=options.seccomp or api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
    )
    if options.user:
        security.MergeFrom(options.user)
    program, arguments = command_line(options)
    return api.ContainerConfig(
        metadata=api.ContainerMetadata(name=options.name),
        image=api.ImageSpec(image=image, user_specified_image=options.image),
        command=program,
        args=arguments,
        working_dir=options.workdir,
        envs=options.env,
        mounts=options.volumes,
        labels=dict(options.labels),
        annotations=dict(options.annotations),
        log_path=LOG_NAME,
        stdin=options.interactive,
        stdin_once=options.talks,
        tty=options.tty,
        linux=api.LinuxContainerConfig(resources=resources(options), security_context=security),
    )


def default_name(image: str) -> str:
    """A name nobody else has, with the image's own in it: "busybox-1f3a9c"."""
    last = re.split(r"[@:]", image.rsplit("/", 1)[-1])[0]
    return (re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-") or "run")[:40] + "-" + uuid.uuid4().hex[:6]


def log_directory(uid: str) -> Path:
    """Where the logs of the pod with this uid are: below a directory that only this user can write to.

    Raises PermissionRefused when somebody else made that directory first.
    """
    root = Path(tempfile.gettempdir()) / f"crioctl-{os.geteuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionRefused(f"{root} is not a directory of ours alone: remove it, or set TMPDIR")
    return root / uid


def remove_logs(pod: Pod) -> None:
    """Remove the logs of a pod that `run` made.  The uid is checked: it becomes a path."""
    if pod.made_by_run and re.fullmatch(r"[0-9a-f-]{36}", pod.message.metadata.uid):
        shutil.rmtree(log_directory(pod.message.metadata.uid), ignore_errors=True)


def stop_pod(client: Client, pod_id: str) -> None:
    client.call(api.StopPodSandboxRequest(pod_sandbox_id=pod_id), grant=CREATE_GRANT)


def remove_pod(client: Client, pod_id: str) -> None:
    """Stop, as the CRI wants it, and remove."""
    stop_pod(client, pod_id)
    client.call(api.RemovePodSandboxRequest(pod_sandbox_id=pod_id), grant=CREATE_GRANT)


def check_sources(volumes: Sequence[api.Mount]) -> None:
    """Raises NotFound for what is not there: a runtime would make a directory of it, and nobody would remove that."""
    for volume in volumes:
        try:
            os.stat(volume.host_path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound("volume source", volume.host_path, "make it first") from None
        except OSError:
            continue  # the runtime may see more than we do


class Run:
    """One pod with one container.  `make` makes all of it or leaves nothing."""

    def __init__(self, client: Client, options: RunOptions) -> None:
        self.client, self.options = client, options
        self.uid = str(uuid.uuid4())
        self.logs = log_directory(self.uid)
        self.pod_id = self.container_id = ""

    def make(self) -> None:
        check_sources(self.options.volumes)
        image = self._image()
        self.logs.mkdir(mode=0o700)
        try:
            self._create(image)
        except BaseException:
            self._undo()
            raise

    def talk(self) -> int:
        """Start the container with our standard streams attached; its exit code when it has ended."""
        streams = interactive.streams_of(True, self.options.tty)
        session = self._early_session(streams)
        self._start()
        try:
            (session or interactive.session(self.client, self.container_id, streams)).run()
        except KeyboardInterrupt:
            self._stop()
        deadline = time.monotonic() + STOP_GRACE
        while not has_ended(self._status()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._exit_code()

    def _early_session(self, streams: Streams) -> Command | None:
        """Attached before the start, nothing is missed; None from a runtime that attaches to running containers only,
        where what comes at once is in the log."""
        try:
            session = interactive.session(self.client, self.container_id, streams)
        except CrioError:
            return None
        session.await_start()
        return session

    def follow(self) -> int:
        """Print the output until the container has ended; its exit code."""
        with logs.LogFile(str(self.logs / LOG_NAME)) as log:
            printer = logs.terminal()
            try:
                logs.follow(log, printer, lambda: has_ended(self._status()))
            except KeyboardInterrupt:
                self._stop()
                printer.write(log.records())
        return self._exit_code()

    def _exit_code(self) -> int:
        status = self._status()
        if status.state != api.CONTAINER_EXITED:
            raise Unavailable("the runtime lost track of the container: its exit code is not known")
        if status.reason == "OOMKilled":
            show.note("the container was killed because it ran out of memory; raise --memory")
        return int(status.exit_code)

    def finish(self) -> None:
        """After the end: remove everything with --rm; else keep container and logs, and give the address back."""
        if self.options.remove:
            self.remove()
        else:
            stop_pod(self.client, self.pod_id)

    def remove(self) -> None:
        try:
            if self.pod_id:
                remove_pod(self.client, self.pod_id)
        finally:
            shutil.rmtree(self.logs, ignore_errors=True)

    def _undo(self) -> None:
        """Remove what there is; a failure of that is told, but does not hide why it was needed."""
        try:
            self.remove()
        except CrioError as error:
            show.note(f"pod {self.options.name} may be left: {error}")

    def _image(self) -> str:
        """The reference to create the container from, pulled as --pull says.  Raises NotFound."""
        wanted = self.options.image
        if self.options.pull != "always":
            found = self.client.call(api.ImageStatusRequest(image=api.ImageSpec(image=wanted)))
            if found.HasField("image") and found.image.id:
                return str(found.image.id)
        if self.options.pull == "never":
            raise NotFound("image", wanted, "pull it first with `crioctl pull`, or leave out --pull never")
        return pull_image(self.client, wanted)

    def _create(self, image: str) -> None:
        pod = pod_config(self.options, self.uid, str(self.logs))
        request = api.RunPodSandboxRequest(config=pod, runtime_handler=self.options.handler)
        try:
            self.pod_id = self.client.call(request, grant=CREATE_GRANT).pod_sandbox_id
        except (KeyboardInterrupt, DeadlineExceeded):
            self.pod_id = self._lost_pod()
            raise
        container = container_config(self.options, image)
        create = api.CreateContainerRequest(pod_sandbox_id=self.pod_id, config=container, sandbox_config=pod)
        self.container_id = self.client.call(create, grant=CREATE_GRANT).container_id
        self._tell_lacking_capabilities()
        if not self.options.talks:
            self._start()

    def _tell_lacking_capabilities(self) -> None:
        """A runtime leaves out what the node's own processes lack, and the CRI has no word for that."""
        wanted = {f"CAP_{name.removeprefix('CAP_')}" for name in self.options.cap_add} - {"CAP_ALL"}
        if not wanted:
            return
        request = api.ContainerStatusRequest(container_id=self.container_id, verbose=True)
        try:
            _, spec = isolation.told(self.client.call(request).info)
        except Unimplemented:
            return
        held = spec.get("process", {}).get("capabilities", {}).get("bounding", [])
        if lacking := sorted(wanted - set(held)):
            show.note(f"the node cannot give {', '.join(lacking)}: the container has to do without")

    def _start(self) -> None:
        self.client.call(api.StartContainerRequest(container_id=self.container_id), grant=CREATE_GRANT)

    def _lost_pod(self) -> str:
        """The id of the pod that the runtime may go on making after we gave up; "" when it does not appear soon."""
        for _ in range(20):
            for pod in self.client.call(api.ListPodSandboxRequest()).items:
                if pod.metadata.uid == self.uid:
                    return str(pod.id)
            time.sleep(0.1)
        return ""

    def _status(self) -> api.ContainerStatus:
        request = api.ContainerStatusRequest(container_id=self.container_id)
        status: api.ContainerStatus = self.client.call(request, patient=True).status
        return status

    def _stop(self) -> None:
        request = api.StopContainerRequest(container_id=self.container_id, timeout=STOP_GRACE)
        self.client.call(request, grant=STOP_GRACE)


def has_ended(status: api.ContainerStatus) -> bool:
    """Whether the container will do no more; also one whose state the runtime does not know."""
    return status.state not in (api.CONTAINER_CREATED, api.CONTAINER_RUNNING)


def refuse_taken_name(client: Client, name: str) -> None:
    """Each pod has a uid of its own, so the runtime takes the same name twice; people should not have to."""
    for pod in Node.read(client).pods:
        if pod.made_by_run and pod.names[0] == name:
            raise AlreadyExists(f"{pod} has that name: remove it with `crioctl rm {name}`, or choose another --name")


def _many(parse_one: Callable[[str], Any], metavar: str) -> Any:
    return {"type": parse.Parsed(metavar, parse_one), "multiple": True, "metavar": metavar}


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", type=parse.Parsed("NAME", parse.name), help="Name of the pod and its container.")
@click.option("--rm", "remove", is_flag=True, help="Remove pod, container and logs when the command ends.")
@click.option("-d", "--detach", is_flag=True, help="Print the container's id and leave it running.")
@click.option("--pull", type=click.Choice(["always", "missing", "never"]), default="missing", show_default=True)
@click.option("--handler", default="", metavar="NAME", help="Runtime handler, as in a RuntimeClass.")
@click.option("--entrypoint", metavar="PROGRAM", help="Instead of the image's entrypoint; '' for COMMAND alone.")
@click.option(
    "-e", "--env", help="Environment variable; KEY alone passes yours on.", **_many(parse.variable, "KEY[=VALUE]")
)
@click.option(
    "-v",
    "--volume",
    "volumes",
    help="Mount; options: ro, rro, rslave, rshared, z.",
    **_many(parse.volume, "HOST:CTR[:OPTIONS]"),
)
@click.option(
    "-p",
    "--publish",
    "ports",
    help="Lead a port of the node to the pod.",
    **_many(parse.publish, "[IP:]HOST:CTR[/PROTO]"),
)
@click.option("--label", "labels", help="Label for pod and container.", **_many(parse.pair, "KEY=VALUE"))
@click.option("--annotation", "annotations", help="Annotation for both.", **_many(parse.pair, "KEY=VALUE"))
@click.option("--sysctl", "sysctls", help="Kernel setting of the pod's namespaces.", **_many(parse.pair, "KEY=VALUE"))
@click.option("--cap-add", help="Add a capability, or ALL.", **_many(parse.capability, "NAME"))
@click.option("--cap-drop", help="Drop a capability, or ALL.", **_many(parse.capability, "NAME"))
@click.option("--privileged", is_flag=True, help="All capabilities and devices, no seccomp: no isolation to speak of.")
@click.option("--memory", type=parse.Parsed("SIZE", parse.size), help="Memory limit, such as 64m.")
@click.option("--cpus", type=parse.Parsed("NUMBER", parse.cpus), help="CPU limit, such as 0.5.")
@click.option(
    "--pids",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="Most processes; only on nodes with cgroup v2, because the CRI has no field for it but `unified`.",
)
@click.option("--user", type=parse.Parsed("USER[:GID]", parse.user), help="Number, or name in the image.")
@click.option("--workdir", default="", metavar="PATH")
@click.option("--hostname", default="", metavar="NAME", help="Instead of the pod's name.")
@click.option("--host-network", is_flag=True, help="Share the node's network.")
@click.option("--host-pid", is_flag=True, help="See the node's processes.")
@click.option("--host-ipc", is_flag=True, help="Share the node's IPC.")
@click.option("--share-pid", is_flag=True, help="One PID namespace for the pod instead of the container's own.")
@click.option("--read-only", is_flag=True, help="Read-only root file system.")
@click.option("--no-new-privs", is_flag=True, help="Programs cannot gain privileges (setuid has no effect).")
@click.option(
    "--seccomp", type=parse.Parsed("PROFILE", parse.seccomp), help="runtime-default, unconfined or localhost/PATH."
)
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-i", "--interactive", is_flag=True, help="Send our stdin; with --detach keep it open for attach.")
@click.pass_obj
def run(client: Client, /, **words: object) -> None:
    """Run COMMAND in a new pod made from IMAGE.

    Prints the command's output and exits with its exit code; Ctrl-C stops it.  Without COMMAND the image's own runs.
    """
    options = RunOptions(**words)  # type: ignore[arg-type]
    options.check()
    if options.name:
        refuse_taken_name(client, options.name)
    else:
        options = replace(options, name=default_name(options.image))
    run = Run(client, options)
    run.make()
    if options.detach:
        click.echo(run.container_id)
        return
    try:
        code = run.talk() if options.talks else run.follow()
    finally:
        run.finish()
    sys.exit(code)
