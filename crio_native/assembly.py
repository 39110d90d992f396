"""The parts of one node, opened in order and closed in reverse: for the daemon, and for verbs that run without it.

Nothing is imported here before `opened` runs: launchers must start in a process that is still simple.  What the parts
do is in their rooms; the CRI around them is the daemon's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crio_native.config import Config
from crio_native.errors import FailedPrecondition, StepFailed

if TYPE_CHECKING:
    from crio_native.images import ImageStore
    from crio_native.network import PodNetwork
    from crio_native.oci.builtin.launchers import Launchers
    from crio_native.pods.containers import Containers
    from crio_native.pods.node import Node
    from crio_native.pods.records import Layout
    from crio_native.pods.sandboxes import Sandboxes

_CLEANERS = 4  # threads; never shared with changes: a Remove waits for what a cleaner does
_LAUNCHERS = 2


@dataclass(frozen=True, slots=True)
class Assembly:
    node: Node
    sandboxes: Sandboxes
    containers: Containers
    images: ImageStore
    network: PodNetwork


@contextlib.contextmanager
def held(config: Config) -> Iterator[Callable[[], None]]:
    """Make and hold the state directories: two daemons on one would undo each other's pods.  The kernel frees them with
    us.

    Directories that were made go again when what runs inside fails, unless it has called what this gives: from then on
    they hold somebody's pods.  Raises FailedPrecondition.
    """
    made: list[Path] = []
    try:
        for path in (config.crio.root, config.crio.runroot):
            _make_private(Path(path), made)
        with _locked(Path(config.crio.root)), _locked(Path(config.crio.runroot)):
            yield made.clear
    except BaseException:
        _remove(made)
        raise


@contextlib.contextmanager
def launched() -> Iterator[Launchers]:
    """The launchers.  Raises NotFound without a monitor: no container can be made then."""
    from crio_native.monitor.client import binary_path
    from crio_native.oci.builtin.launchers import Launchers

    binary_path()
    launchers = Launchers(_LAUNCHERS)
    launchers.start()
    try:
        yield launchers
    finally:
        launchers.stop()


@contextlib.contextmanager
def opened(config: Config, launchers: Launchers) -> Iterator[Assembly]:
    """All stores, the network and the handlers.  Raises what each raises that cannot be opened, and FailedPrecondition
    while pods live in other directories than the configured ones."""
    from concurrent.futures import ThreadPoolExecutor

    from crio_native import places
    from crio_native.images import ImageStore, roots
    from crio_native.images.sources import from_config
    from crio_native.network import PodNetwork
    from crio_native.pods.containers import Containers
    from crio_native.pods.exits import ExitWatcher
    from crio_native.pods.handlers import Handlers, Parts
    from crio_native.pods.host import Host
    from crio_native.pods.node import Node
    from crio_native.pods.profiles import SeccompProfiles
    from crio_native.pods.records import Layout
    from crio_native.pods.sandboxes import Sandboxes
    from crio_native.pods.store import Store

    places.settle(config)
    crio, runtime = config.crio, config.runtime
    layout = Layout(Path(crio.root), Path(crio.runroot), Path(runtime.namespaces_dir), Path(crio.log_dir))
    _make_directories(layout)
    with contextlib.ExitStack() as stack:
        images = ImageStore(
            Path(crio.imagestore or layout.root / "images"),
            settings=from_config(config),
            pinned=roots.pinned(config),
            options=roots.parse(crio.storage_driver, crio.storage_option),
        )
        stack.callback(images.close)
        network = PodNetwork.from_directory(
            network_dir=config.network.network_dir,
            default_network=config.network.cni_default_network,
            plugin_dirs=tuple(filter(None, (*config.network.plugin_dirs, config.network.plugin_dir))),
            state_dir=layout.runroot / "network",
            cache_dir=layout.root / "cni",
            status_grace=config.network.cni_status_grace_period,
        )
        stack.callback(network.shutdown)
        store = Store(layout.root / "state.db")
        stack.callback(store.close)
        cleaners = ThreadPoolExecutor(_CLEANERS, "cleaner")
        exits = ExitWatcher()
        stack.callback(cleaners.shutdown, cancel_futures=True)
        stack.callback(exits.stop)
        node = Node(
            config=config,
            host=Host.read(selinux=runtime.selinux),
            layout=layout,
            store=store,
            images=images,
            network=network,
            namespaces=launchers,
            handlers=Handlers(Parts(launchers, layout, runtime)),
            profiles=SeccompProfiles(),
            exits=exits,
            workers=cleaners,
        )
        if runtime.blockio_config_file:
            node.block_io.classes(runtime.blockio_config_file)  # what is wrong with it is told now
        containers = Containers(node)
        yield Assembly(node, Sandboxes(node, containers), containers, images, network)


def _make_private(directory: Path, made: list[Path]) -> None:
    try:
        for parent in (directory, *directory.parents):
            if parent.exists():
                break
            made.insert(0, parent)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # others on the node must not reach layers or writable containers
    except OSError as error:
        raise FailedPrecondition(
            f"cannot make the directory {directory}: {os.strerror(error.errno or 0).lower()}"
        ) from None


def _make_directories(layout: Layout) -> None:
    for directory in layout.directories():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StepFailed("make a directory of the state", error.errno or 0, str(directory)) from None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise FailedPrecondition(
            f"another daemon uses the state directory {directory}; stop it, or set --root, --runroot and --listen to "
            "others than its"
        ) from None
    finally:
        os.close(fd)


def _remove(made: list[Path]) -> None:
    """Directories that a failed start has made, with what it wrote in them; never through a mount."""
    from crio_native.pods.trees import remove_tree

    for path in reversed(made):
        with contextlib.suppress(OSError):
            device = os.stat(path).st_dev
            if device == os.stat(path.parent).st_dev and not _holds_a_mount(path):
                remove_tree(path)


def _holds_a_mount(path: Path) -> bool:
    with open("/proc/self/mountinfo", "rb") as file:
        return any(line.split(b" ")[4].startswith(os.fsencode(path)) for line in file)
