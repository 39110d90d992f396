"""The daemon: start-up and shutdown, in the order that they happen.

The order at start matters.  The launchers come before anything that makes threads (gRPC, asyncio's executors, the
stores), because they are made by a process that must still be simple; so this module imports nothing heavy at the top.
Then the state directories are locked, records and kernel are reconciled, and only then does the socket appear.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from crio_native import assembly
from crio_native.assembly import Assembly
from crio_native.config import Config
from crio_native.errors import CrioError, FailedPrecondition, PermissionRefused, printable

if TYPE_CHECKING:
    import asyncio

    from crio_native.oci.builtin.launchers import Launchers

log = logging.getLogger(__name__)

# gRPC's fork handlers would run in every child of this process; we never fork beside gRPC, so they only cost.
_GRPC = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}
_LEVELS = {"trace": "DEBUG", "debug": "DEBUG", "info": "INFO", "warn": "WARNING", "error": "ERROR"}
_WORKERS = 16  # threads for calls and changes; each spends its time in system calls
_POD_WORKERS = 32  # threads for changes of pods, which may wait for the network's plugins
_PULLS = 32  # threads for pulls, which may wait for registries
_STOP_SECONDS = 10.0


def main(config: Config, ready: Callable[[], None] | None = None, read: Callable[[], Config] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; containers go on.  Returns the exit code.

    ready: called when the socket serves.  read: reads the configuration again, for SIGHUP.  A start that fails is one
    line on stderr and exit code 1; then the directories that it made are gone again.
    """
    _set_up_logging(config)
    _answer_support()
    try:
        _run(config, ready, read or (lambda: config))
    except CrioError as error:
        print(f"crio-native: {error}", file=sys.stderr)
        return 1
    return 0


def _answer_support() -> None:
    """As CRI-O does: SIGUSR1 tells the stacks, SIGUSR2 collects garbage.

    The threads' stacks are written to stderr by the signal handler itself, whatever the threads are doing.
    """
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGUSR2, lambda *_: gc.collect())


def _run(config: Config, ready: Callable[[], None] | None, read: Callable[[], Config]) -> None:
    prepare(config)
    with assembly.held(config) as keep, assembly.launched() as launchers:

        def serving() -> None:
            keep()
            if ready is not None:
                ready()

        _serve(config, launchers, serving, read)


def prepare(config: Config) -> None:
    """What the process needs before anything else of it is made.  Raises PermissionRefused, FailedPrecondition."""
    if os.geteuid() != 0:
        raise PermissionRefused("the daemon must run as root: it makes namespaces, mounts and cgroups")
    if config.runtime.cgroup_manager == "systemd":
        _require_systemd()
    os.umask(0o022)
    os.environ |= _GRPC
    from crio_native.linux.allocation import return_large_blocks

    return_large_blocks(1 << 20)


def _require_systemd() -> None:
    from crio_native.linux.cgroup import systemd

    try:
        systemd.check()
    except CrioError as error:
        raise FailedPrecondition(
            f'crio.runtime.cgroup_manager is "systemd", but {error}; set it to "cgroupfs", and the kubelet\'s '
            "cgroupDriver to the same"
        ) from error


def _serve(config: Config, launchers: Launchers, serving: Callable[[], None], read: Callable[[], Config]) -> None:
    import asyncio

    from crio_native import history
    from crio_native.cri.front_door import claim_socket
    from crio_native.images import upkeep
    from crio_native.pods.recovery import recover, wipe_images, wipe_pods
    from crio_native.pods.store import images_in_use

    claim_socket(config.api.listen, "crio.api.listen")  # who cannot serve must not clean up either
    past = history.read(config.crio)
    with assembly.opened(config, launchers) as parts:
        history.begin(config.crio)
        recover(parts.node, parts.sandboxes, parts.containers, booted=past.booted)
        if config.crio.internal_wipe:
            if past.booted and (pods := wipe_pods(parts.node, parts.sandboxes, stopped_only=True)):
                log.info("removed %d pods with their containers: the node was rebooted", pods)
            if past.upgraded and (images := wipe_images(parts.node)):
                log.info("removed %d images that no container stands on: the last run was of an older version", images)
        if config.crio.internal_repair and past.unclean and past.booted:  # a daemon's own end damages no file
            upkeep.repair(parts.images, in_use=images_in_use(parts.node.store))
        asyncio.run(_loop(config, parts, serving, read))
    history.end(config.crio)


async def _loop(config: Config, parts: Assembly, serving: Callable[[], None], read: Callable[[], Config]) -> None:
    import asyncio
    import contextlib
    from concurrent.futures import ThreadPoolExecutor

    from crio_native.api.runtime.v1 import api_pb2
    from crio_native.cri.checkpoint_service import CheckpointService
    from crio_native.cri.counting import Counts
    from crio_native.cri.exporter import Exporter
    from crio_native.cri.front_door import FrontDoor
    from crio_native.cri.image_service import ImageService
    from crio_native.cri.inspection import Inspection
    from crio_native.cri.jobs import Jobs
    from crio_native.cri.node_service import NodeService
    from crio_native.cri.runtime_service import RuntimeService
    from crio_native.cri.server import Server
    from crio_native.cri.stats_service import StatsService
    from crio_native.cri.streaming import StreamingService, settings
    from crio_native.pods.events import Events
    from crio_native.reload import Reloader
    from crio_native.streaming.server import StreamServer

    node, sandboxes, containers = parts.node, parts.sandboxes, parts.containers
    with (
        ThreadPoolExecutor(_WORKERS, "call") as calls,
        ThreadPoolExecutor(_POD_WORKERS, "pod") as pod_changes,
        ThreadPoolExecutor(_PULLS, "pull") as pulls,
        contextlib.closing(StreamServer(settings(config.api))) as streams,
    ):
        behind = str(node.layout.runroot / "grpc.sock")
        door = FrontDoor(config.api.listen, behind, Inspection(node, calls).route)
        door.claim()  # before there is a gRPC server: one that never starts complains when it goes
        counts = Counts(node.store)
        counts.forbidden_calls = node.notifiers.counts
        jobs = Jobs(counts.stall)
        server = Server(
            behind,
            calls,
            receive_max=config.api.grpc_max_recv_msg_size,
            send_max=config.api.grpc_max_send_msg_size,
            observe=counts.operation,
        )
        services = api_pb2.DESCRIPTOR.services_by_name
        events = Events(node.store)
        server.add(
            services["RuntimeService"],
            RuntimeService(node, sandboxes, containers, jobs, calls, pod_changes),
            StatsService(config, node),
            NodeService(node, events, parts.network.status),
            CheckpointService(node, sandboxes, containers, jobs),
            StreamingService(node, containers, streams),
        )
        server.add(services["ImageService"], ImageService(parts.images, node.store, jobs, pulls, counts))
        reloader = Reloader(node, read, _set_up_logging)
        stopping = _stop_on_signals()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: calls.submit(reloader.reload))
        _tell_tasks()
        exporter = Exporter(config, counts, events)
        await exporter.open()
        await server.start()
        door.open()
        gc.collect()
        gc.freeze()  # what lives now lives for ever: later collections need not look at it
        log.info("serving the CRI on %s", config.api.listen)
        _notify("READY=1")
        serving()
        await stopping.wait()
        log.info("stopping; containers go on")
        _notify("STOPPING=1")
        door.close()
        exporter.close()
        events.close()
        parts.images.interrupt()
        await server.stop(_STOP_SECONDS / 2)
        door.hang_up()
        await jobs.drain(_STOP_SECONDS)
        parts.network.interrupt()


def _stop_on_signals() -> asyncio.Event:
    import asyncio

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return stopping


class LineFormatter(logging.Formatter):
    """A record is one line, whatever a registry, an image or a tenant has put into its words; a traceback follows
    indented, as no record is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


def _tell_tasks() -> None:
    """SIGUSR1 also writes what each task of the event loop awaits; whatever is logged, as it was asked for."""
    import asyncio
    import traceback

    loop = asyncio.get_running_loop()

    def tell() -> None:
        for task in asyncio.all_tasks(loop):
            stack = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in _awaited(task.get_coro()))
            print(f"{task.get_name()} (most recent call last):", "".join(stack.format()), sep="\n", file=sys.stderr)

    faulthandler.unregister(signal.SIGUSR1)
    loop.add_signal_handler(signal.SIGUSR1, tell)
    faulthandler.register(signal.SIGUSR1, chain=True)


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of those that it awaits, one in another."""
    while frame := getattr(coroutine, "cr_frame", None):
        yield frame
        coroutine = coroutine.cr_await


def _set_up_logging(config: Config) -> None:
    class Context(logging.Filter):
        """Adds the request that a line belongs to, and applies `log_filter`."""

        pattern = re.compile(config.runtime.log_filter) if config.runtime.log_filter else None

        def filter(self, record: logging.LogRecord) -> bool:
            # Any thread may log while another one has only begun to import that module.
            request_id = getattr(sys.modules.get("crio_native.cri.server"), "request_id", None)
            record.request = request_id.get() if request_id else "-"
            return self.pattern is None or self.pattern.search(record.getMessage()) is not None

    handler = logging.StreamHandler()
    handler.addFilter(Context())
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s [%(request)s] %(name)s: %(message)s"))
    logging.basicConfig(level=_LEVELS.get(config.runtime.log_level, "CRITICAL"), handlers=[handler], force=True)


def _notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)), if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log.warning("the service manager did not take %s: %s", state, error.strerror)
