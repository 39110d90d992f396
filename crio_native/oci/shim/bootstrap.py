"""Starting a shim, and cleaning up after one that died: its program's verbs `start` and `delete`.

`start` answers where the shim listens.  Shims have learnt to do so in three ages: by an address alone, by JSON with the
version of the task service and the protocol, and by a message.  The youngest take what they must know as a message too,
on their standard input; the others by flags and environment.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from crio_native.api.shim.v1 import bootstrap_pb2, task_pb2
from crio_native.errors import FailedPrecondition, NotFound, StepFailed, Unavailable, Unimplemented
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.shim import program
from crio_native.oci.shim.task import SERVICES

NAMESPACE = "default"  # of containerd's; as CRI-O, we have one for all
DELETE_SECONDS = 30.0
CONNECT_SECONDS = 5.0  # for a shim that has just been started to listen
NO_PUBLISHER = "/bin/true"  # the program that old shims run for each event
_ADDRESS_MAX = 107  # bytes of a socket's path


@dataclass(frozen=True, slots=True)
class Address:
    """Where a shim listens, and which version of the task service it has."""

    address: str
    version: int = 2

    def connect(self, seconds: float = CONNECT_SECONDS) -> socket.socket:
        """Raises Unavailable when nobody listens there."""
        path = self.address.removeprefix("unix://")
        name = path if self.address.startswith("unix://") or path.startswith("/") else "\0" + path
        deadline = time.monotonic() + seconds
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(seconds)
                sock.connect(name)
                return sock
            except OSError as error:
                sock.close()
                if time.monotonic() >= deadline:
                    raise Unavailable(f"no shim listens on {self.address}: {error.strerror or error}") from None
            time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Shim:
    """A shim's program and how to run it.  events: path of the socket that serves shims' events."""

    launchers: Launchers
    path: str
    events: str = ""
    debug: bool = False

    def start(self, container_id: str, bundle: Path, seconds: float) -> Address:
        """Start a shim for the bundle; its config.json is there.

        Raises StepFailed with the shim's own words, DeadlineExceeded, Unimplemented for a protocol that this program
        does not speak.
        """
        ended = self._run("start", container_id, bundle, seconds)
        if ended.code and "bootstrap" in ended.words.lower():
            # One that knows flags no more.  Older ones must not get the message: they take it for something else.
            ended = self._run("start", container_id, bundle, seconds, self._parameters(container_id))
        if ended.code:
            raise StepFailed("shim start", 0, self.path, ended.words)
        return parse_answer(ended.stdout, self.path)

    def delete(self, container_id: str, bundle: Path) -> task_pb2.DeleteResponse:
        """Have the program clean up what a dead shim left of a container; how the container ended, as far as it knows.

        Raises StepFailed, DeadlineExceeded.
        """
        ended = self._run("delete", container_id, bundle, DELETE_SECONDS)
        if ended.code:
            raise StepFailed("shim delete", 0, self.path, ended.words)
        try:
            answer: task_pb2.DeleteResponse = task_pb2.DeleteResponse.FromString(ended.stdout)
            return answer
        except DecodeError:
            raise StepFailed("shim delete", 0, self.path, f"its answer is nonsense: {ended.stdout[:60]!r}") from None

    def _parameters(self, container_id: str) -> bytes:
        params = bootstrap_pb2.BootstrapParams(
            instance_id=container_id,
            namespace=NAMESPACE,
            containerd_ttrpc_address=self.events,
            containerd_binary=NO_PUBLISHER,
            log_level=bootstrap_pb2.LOG_LEVEL_DEBUG if self.debug else bootstrap_pb2.LOG_LEVEL_INFO,
        )
        message: bytes = params.SerializeToString()
        return message

    def _run(self, verb: str, container_id: str, bundle: Path, seconds: float, stdin: bytes = b"") -> program.Ended:
        flags = ["-namespace", NAMESPACE, "-address", "", "-publish-binary", NO_PUBLISHER, "-id", container_id]
        if verb == "delete":
            flags += ["-bundle", str(bundle)]
        if self.debug:
            flags.append("-debug")
        env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "GOMAXPROCS": "2",
            "MAX_SHIM_VERSION": str(max(SERVICES)),
            "TTRPC_ADDRESS": self.events,
            "GRPC_ADDRESS": "",
            "NAMESPACE": NAMESPACE,
        }
        line = [self.path, *flags, verb]
        return program.run(self.launchers, line, cwd=str(bundle), env=env, stdin=stdin, seconds=seconds)


def parse_answer(answer: bytes, path: str) -> Address:
    """What `start` wrote to its standard output: a BootstrapResult, as a message or as JSON, or an address alone.

    path: the program, for errors.  Raises Unimplemented, StepFailed.
    """
    text = answer.decode("utf-8", "replace").strip()
    version, address, protocol = 2, text, "ttrpc"
    try:
        if text.startswith("{"):
            told = json_format.Parse(text, bootstrap_pb2.BootstrapResult(), ignore_unknown_fields=True)
            version, address, protocol = told.version, told.address, told.protocol
        elif not text.isprintable() or "\ufffd" in text:
            told = bootstrap_pb2.BootstrapResult.FromString(answer)
            version, address, protocol = told.version, told.address, told.protocol
    except (json_format.ParseError, DecodeError, ValueError, RecursionError):
        raise StepFailed("shim start", 0, path, f"it answered with nonsense: {text[:200]!r}") from None
    if protocol != "ttrpc":
        raise Unimplemented(f"the shim {path} speaks {protocol!r}; this program speaks ttrpc with shims")
    if version not in SERVICES:
        known = ", ".join(map(str, SERVICES))
        raise Unimplemented(f"the shim {path} has version {version} of the task service; known are {known}")
    socket_path = address.removeprefix("unix://")
    plain = socket_path.isprintable() and not any(c.isspace() for c in socket_path)
    if not plain or not 0 < len(os.fsencode(socket_path)) <= _ADDRESS_MAX or "://" in socket_path:
        raise StepFailed("shim start", 0, path, f"it answered with no unix socket's address: {text[:200]!r}")
    return Address(address, version)


def find_program(name: str, given: str) -> str:
    """The shim's program: runtime_path, or containerd-shim-NAME-v2 in PATH.

    Raises NotFound and FailedPrecondition for what cannot be run.  The name `cc` is Clear Containers', whose successor
    is Kata.
    """
    wanted = given or f"containerd-shim-{'kata' if name == 'cc' else name}-v2"
    path = wanted if "/" in wanted else shutil.which(wanted)
    if path is None:
        note = "; Clear Containers has become Kata Containers, whose shim serves this handler" if name == "cc" else ""
        raise NotFound("shim program", wanted, f"not in PATH; install it, or set runtime_path{note}")
    if not os.path.exists(path):
        raise NotFound("shim program", path, "runtime_path names no file")
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise FailedPrecondition(f"shim program {path!r} is not an executable file")
    return path


def check_virtualisation(path: str) -> None:
    """Kata runs each pod in a virtual machine.  Raises FailedPrecondition on a host that cannot have any."""
    if "kata" not in os.path.basename(path):
        return
    if not any(os.path.exists(device) for device in ("/dev/kvm", "/dev/mshv")):
        raise FailedPrecondition(
            f"{path} needs hardware virtualisation: this host has no /dev/kvm; load the module kvm_intel or kvm_amd, "
            "switch virtualisation on in the firmware (or nested virtualisation in the hypervisor), or use a handler "
            "that needs none"
        )


def version_of(shim: Shim, cwd: str) -> str:
    """What the program says with `-v`, in one line.  Raises StepFailed for one that says nothing and so is no shim,
    DeadlineExceeded."""
    env = {"PATH": os.environ.get("PATH", "")}
    ended = program.run(shim.launchers, [shim.path, "-v"], cwd=cwd, env=env, seconds=10)
    version = " ".join(ended.stdout.decode(errors="replace").split())[:200]
    if ended.code != 0 or not version:
        raise StepFailed("shim -v", 0, shim.path, f"it is no shim: it ended with status {ended.code} and no version")
    return version


def left_address(bundle: Path) -> Address | None:
    """The address that a shim left in its bundle, for whoever did not get its answer; None when there is none."""
    try:
        with open(bundle / "address", "rb") as file:
            return parse_answer(file.read(4096), str(bundle))
    except (OSError, StepFailed, Unimplemented):
        return None
