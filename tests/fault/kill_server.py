"""A server that forks daemons which die at a named act on disk or kernel.

`python -m tests.fault.kill_server`: a line of JSON in, a line out.  It has imported all that a daemon imports, so that
a daemon starts in a fraction of the time; it makes no thread, so that the fork is a clean one.

What is an act?  Nobody lists them: an audit hook of the interpreter sees every file that is opened for writing, made,
renamed, removed, every program started, every packet with descriptors or an address, every connection; SQLite's trace
sees every statement that changes something; the calls of `linux.syscalls` are wrapped.  New code is seen without being
named here.  The name of an act is the chain of our functions that led to it, so what one does in a loop is one act.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import pkgutil
import re
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import crio_native

HOUSE = os.path.dirname(crio_native.__file__)
ROOMS = tuple(f"{HOUSE}/{room}/" for room in ("pods", "images", "network", "monitor", "oci", "linux"))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FILES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
)
OTHERS = ("os.kill", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.sendmsg", "socket.sendto")
TELLING_OTHERS = OTHERS[1:]  # somebody else works while we die: killed a moment later, too
MOMENT = 0.001
CHANGING = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|COMMIT)\b", re.I)
CALLS = ("mount", "umount2", "move_mount", "mount_setattr", "setns", "unshare", "fsmount", "open_tree")


class Acts:
    """Writes each new name to `record`, or dies at the first act that is called `deadly`; all while `switch` is on.

    switch: one shared byte, which the test turns on for the calls that are to be hit.
    """

    def __init__(self, record: int, deadly: str, switch: mmap.mmap) -> None:
        self._record = record
        self._switch = switch
        self._deadly, _, later = deadly.partition(" | ")
        self._later = bool(later)
        self._seen: set[str] = set()
        self._busy = threading.local()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[0], (str, bytes)) and args[2] & WRITING and os.fsdecode(args[0]) != os.devnull:
                self.act("open")
        elif event in FILES or event in OTHERS:
            self.act(event)

    def call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.act(f"syscalls.{name}")
            return function(*args, **kwargs)

        return wrapped

    def connect(self, function: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        def wrapped(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = function(*args, **kwargs)
            connection.set_trace_callback(self._statement)
            return connection

        return wrapped

    def _statement(self, sql: str) -> None:
        if match := CHANGING.match(sql):
            self.act(match[1].upper())

    def act(self, event: str) -> None:
        if not self._switch[0] or getattr(self._busy, "now", False):
            return
        self._busy.now = True
        try:
            name = _name(event)
            if name and name not in self._seen:
                self._seen.add(name)
                self._reached(name)
        finally:
            self._busy.now = False

    def _reached(self, name: str) -> None:
        if self._record >= 0:
            os.write(self._record, f"{name}\n".encode())
        elif name == self._deadly:
            if self._later:
                threading.Thread(target=_die_later, daemon=True).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def _die_later() -> None:
    time.sleep(MOMENT)
    os.kill(os.getpid(), signal.SIGKILL)


def _name(event: str) -> str:
    """The chain of functions in our rooms that led here, outermost first, and the act; "" for what none of them did."""
    chain: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOMS):
            link = f"{Path(code.co_filename).stem}.{code.co_qualname.replace('.<locals>', '')}"
            if not chain or chain[-1] != link:
                chain.append(link)
        frame = frame.f_back
    if not chain:
        return ""
    return f"{' > '.join(reversed(chain))}: {event}"


def _install(acts: Acts) -> None:
    from crio_native.linux import syscalls

    for name in CALLS:
        if hasattr(syscalls, name):
            setattr(syscalls, name, acts.call(name, getattr(syscalls, name)))
    sqlite3.connect = acts.connect(sqlite3.connect)  # type: ignore[assignment]
    sys.addaudithook(acts.hook)


def _import_everything() -> None:
    """What a daemon imports on its way, and more."""
    for package in ("pods", "images", "network", "monitor", "oci", "cri", "streaming", "api.runtime.v1"):
        module = importlib.import_module(f"crio_native.{package}")
        for found in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"crio_native.{package}.{found.name}")
    for name in ("asyncio", "pyroute2", "grpc.aio", "crio_native.reload", "crio_native.history"):
        importlib.import_module(name)


def _child(order: dict[str, Any]) -> int:
    from crio_native import daemon
    from crio_native.config import load

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for fd, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, fd)
    record = os.open(order["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if order["record"] else -1
    with open(order["switch"], "rb") as file:
        _install(Acts(record, order["deadly"], mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)))
    return daemon.main(load(Path(order["config"]), Path(order["directory"])).config)


def serve() -> None:
    os.environ |= {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}
    _import_everything()
    assert threading.active_count() == 1, "forking beside threads"
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    code = _child(order)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            answer: Any = pid
        else:
            pid, status = os.waitpid(order["pid"], os.WNOHANG if order["do"] == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
