"""`make run`: the whole program once, before your eyes.

It starts a daemon in a scratch directory, runs one pod through the CRI, shows what came of it, serves until Ctrl-C
(with ``--once``: ends at once), and removes all that it made.  Here belong the stages and their display; the daemon's
care is `scratch`, the image is `busybox`, and the summary is `isolation`.
"""

from __future__ import annotations

import signal

# Until there is something to remove, a Ctrl-C ends us without a word: what is imported here takes a second.  The
# Makefile starts the interpreter with the signal blocked, so that one that came meanwhile takes effect now.
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli import busybox, isolation
from crio_native.cli.scratch import ScratchDaemon, abandoned, wait_for
from crio_native.errors import CrioError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a shell's background job would ignore the first
PORT = 8080
SCRIPT = f"""\
echo "hello from $(hostname): I am pid $$, uid $(id -u), on $(uname -s) $(uname -r)"
echo "my address is $(ip -4 -o addr show dev eth0 | awk '{{print $4}}')"
echo "I see the processes $(cd /proc && echo [0-9]*)"
echo "a page from the pod" > /www/index.html
echo "serving on port {PORT}"
exec httpd -f -p {PORT} -h /www
"""
LAST_LINE = f"serving on port {PORT}"
# What a kubelet sends for a pod that asks for nothing special.
MASKED = "/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats"
MASKED += " /proc/sched_debug /proc/scsi /sys/firmware"
READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"
NAMESPACES = cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER)
MEMORY_LIMIT = 64 << 20

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@click.command()
@click.option("--once", is_flag=True, help="Clean up and exit after the demonstration instead of serving.")
@click.option(
    "--scratch",
    default="/var/tmp",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    show_default=True,
    help="Make the scratch directory here; its file system must carry an overlay.",
)
def main(once: bool, scratch: Path) -> None:
    """Start a daemon of its own, run a pod, show its isolation, serve until Ctrl-C; leave nothing behind."""
    if os.geteuid() != 0:
        raise SystemExit("the demonstration makes namespaces and mounts: run it as root")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # between its directory and the try that removes it
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        clean_up_after_the_dead(scratch)
        daemon = ScratchDaemon(scratch)
    except CrioError as error:
        raise SystemExit(str(error)) from None
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        demonstrate(daemon)
        if not once:
            serve(daemon)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except (CrioError, OSError) as error:
        console.print("[red]failed:[/]", escape("\n".join([str(error), *getattr(error, "__notes__", ())])))
    except grpc.RpcError as error:
        console.print(f"[red]the daemon answered {error.code().name}:[/]", escape(error.details()))
        console.print(daemon.log_tail(), markup=False)
    finally:
        status = clean_up(daemon) or status
    raise SystemExit(status)


def demonstrate(daemon: ScratchDaemon) -> None:
    """The stages, each with its time."""
    with stage("build an image of busybox-static"):
        reference = busybox.build_layout(daemon.directory / "busybox", "demo")
    with stage("start the daemon"):
        version = daemon.start()
    with stage("import the image"):
        image = daemon.images.PullImage(
            cri.PullImageRequest(image=cri.ImageSpec(image=reference)), timeout=60
        ).image_ref
    pod_config = _pod_config(daemon)
    with stage("run the pod"):
        request = cri.RunPodSandboxRequest(config=pod_config)
        pod = daemon.runtime.RunPodSandbox(request, timeout=60).pod_sandbox_id
    with stage("create the container"):
        container_config = _container_config(image)
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container_config, sandbox_config=pod_config)
        container = daemon.runtime.CreateContainer(request, timeout=60).container_id
    with stage("start the container"):
        daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=60)
    log = Path(pod_config.log_directory) / container_config.log_path
    with stage("wait for its output"):
        wait_for(lambda: LAST_LINE in _output(log), 10, "the container's last line")
    address = _address(daemon, pod)
    with stage("fetch a page from the pod"):
        page = _fetch(address)
    _show(daemon, version, container, address, _output(log), page)


def serve(daemon: ScratchDaemon) -> None:
    """Until a signal comes; raises Unavailable when the daemon ends by itself."""
    console.print("[bold]Try next[/], in another terminal:")
    console.print(f"  export CRIO_NATIVE_SOCKET=unix://{daemon.socket}", soft_wrap=True)
    for words in ("ps", "exec demo sh -c 'id; mount | head -5'", "run --rm localhost/busybox:demo echo hello"):
        console.print(f"  {_shown(Path(sys.executable).with_name('crioctl'))} {words}", soft_wrap=True)
    try:
        console.print("Serving; Ctrl-C removes everything that this made.")
        daemon.wait()
    except KeyboardInterrupt:
        return
    raise daemon.complaint("ended by itself")


def clean_up(daemon: ScratchDaemon) -> int:
    """Remove everything; a second Ctrl-C must not leave half.  Returns the exit status: 1 when something is left."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return _remove(daemon, "everything")


def clean_up_after_the_dead(scratch: Path) -> None:
    """A run that was killed could not; what cannot be removed does not keep this one from running."""
    for left in abandoned(scratch):
        _remove(left, f"what a killed run left, {left.directory}")


def _remove(daemon: ScratchDaemon, what: str) -> int:
    with stage(f"remove {what}"):
        problems = daemon.close()
    for problem in problems:
        console.print("[red]left behind:[/]", escape(problem))
    return 1 if problems else 0


@contextmanager
def stage(title: str) -> Iterator[None]:
    """One line: the title, and how long it took once it is done."""
    began = time.perf_counter()
    with console.status(f"{title} ..."):
        try:
            yield
        except BaseException:
            console.print(f"  [red]✗[/] {title}")
            raise
    console.print(f"  [green]✓[/] {title:<36}[dim]{(time.perf_counter() - began) * 1e3:8.1f} ms[/]")


def _pod_config(daemon: ScratchDaemon) -> cri.PodSandboxConfig:
    logs = daemon.directory / "logs/demo"
    logs.mkdir(parents=True)
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="demo", namespace="default", uid=daemon.directory.name, attempt=0),
        hostname="demo",
        log_directory=str(logs),
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent=daemon.cgroup_parent,
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=NAMESPACES),
        ),
    )


def _container_config(image: str) -> cri.ContainerConfig:
    resources = cri.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=MEMORY_LIMIT
    )
    security = cri.LinuxContainerSecurityContext(
        namespace_options=NAMESPACES,
        no_new_privs=True,
        masked_paths=MASKED.split(),
        readonly_paths=READ_ONLY.split(),
        seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault),
    )
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="demo", attempt=0),
        image=cri.ImageSpec(image=image),
        command=["sh", "-c", SCRIPT],
        log_path="demo/0.log",
        linux=cri.LinuxContainerConfig(resources=resources, security_context=security),
    )


def _output(log: Path) -> str:
    """The text of a CRI log: each record is ``TIME STREAM P|F TEXT``."""
    if not log.exists():
        return ""
    return "\n".join(line.split(" ", 3)[-1] for line in log.read_text().splitlines())


def _address(daemon: ScratchDaemon, pod: str) -> str:
    status = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=10).status
    return str(status.network.ip)


def _fetch(address: str) -> str:
    """The script becomes httpd after its last line, so nobody may listen at first."""
    deadline = time.monotonic() + 10
    while True:
        connection = http.client.HTTPConnection(address, PORT, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read(1000).decode().strip()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        finally:
            connection.close()


def _pid(daemon: ScratchDaemon, container: str) -> int:
    request = cri.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(daemon.runtime.ContainerStatus(request, timeout=10).info["info"])["pid"])


def _show(daemon: ScratchDaemon, version: str, container: str, address: str, output: str, page: str) -> None:
    console.print("\n[bold]The container's output[/]")
    console.print(output, markup=False, soft_wrap=True)
    console.print(f"\n[bold]The pod's address[/]\n{address}, where http://{address}:{PORT}/ answers: {page}\n")
    table = Table(title="Isolation, read back from the kernel", title_justify="left", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for subject, value in isolation.describe(_pid(daemon, container)).items():
        table.add_row(subject, value)
    console.print(table)
    console.print(f"\n{version}, socket unix://{daemon.socket}, log {daemon.log}\n", soft_wrap=True)


def _shown(path: Path) -> Path:
    """Relative to here when it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
