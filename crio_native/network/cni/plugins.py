"""The verbs of the CNI specification, each through all programs of a network: ADD, DEL, CHECK, STATUS, GC, VERSION."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crio_native.errors import CrioError, FailedPrecondition, NotFound
from crio_native.linux.process import open_namespace
from crio_native.network import process
from crio_native.network.cni.attachment import CniAttachment, Subject
from crio_native.network.cni.protocol import PluginFailed, Result, emit, failure, parse_result
from crio_native.network.conflist import VERSIONS, NetworkList, PluginProgram
from crio_native.network.directory import find_program

log = logging.getLogger(__name__)

_UNKNOWN_CONTAINER = 3
_NOBODY = Subject("", "", "")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that all programs of a network together may take.

    An ADD that hung and the DEL after it end before a kubelet gives up on its RunPodSandbox (4 minutes), so that the
    call tells which program hung.
    """

    add: float = 150.0
    delete: float = 60.0
    check: float = 30.0
    gc: float = 30.0
    status: float = 10.0
    version: float = 10.0


class Plugins:
    """Runs the programs of `directories`.  Thread-safe; the calls for one container are the caller's to put in order.

    All verbs raise PluginFailed with what the program said, DeadlineExceeded naming the program that hung, NotFound for
    a program that is not installed, StepFailed for one that cannot be executed.
    """

    def __init__(self, directories: Sequence[str], limits: Limits | None = None) -> None:
        self._directories = tuple(directories)
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._stop)  # not sooner: a thread may wait for it still
        self._supported: dict[str, tuple[object, frozenset[str]]] = {}  # by path: its identity, its versions

    def stop(self) -> None:
        """Give up what runs, and run nothing more: each call raises Unavailable."""
        os.eventfd_write(self._stop, 1)

    def negotiate(self, network: NetworkList) -> str:
        """The newest version of the specification that the list permits and all its programs know.

        Raises FailedPrecondition when there is none.
        """
        deadline = time.monotonic() + self.limits.version
        supported = {program.kind: self._versions(program.kind, deadline) for program in network.programs}
        for version in network.versions:
            if all(version in known for known in supported.values()):
                return version
        told = "; ".join(f"{kind!r} knows {', '.join(sorted(known))}" for kind, known in supported.items())
        raise FailedPrecondition(f"{network.source}: cniVersion {' or '.join(network.versions)} does not serve: {told}")

    def add(self, attachment: CniAttachment, previous: Result | None, lock: int) -> Result:
        """ADD each program in order; the result of the last.

        previous: what is attached already.  lock: a descriptor that the programs hold open as long as they run.
        """
        deadline = time.monotonic() + self.limits.add
        result = previous
        for program in attachment.programs:
            output = self._run("ADD", program, attachment, result, deadline, inherited=(lock,))
            result = parse_result(_step("ADD", program), program.kind, output)
        assert result is not None, "a network without programs is not ours"
        return result

    def delete(self, attachment: CniAttachment) -> list[CrioError]:
        """DEL each program, the last first, also after one has failed; what failed.

        It gets the namespace's path only while there is a namespace: "" tells a program that it is gone.
        """
        deadline = time.monotonic() + self.limits.delete
        subject = dataclasses.replace(attachment.subject, netns=_living(attachment.subject.netns))
        attachment = dataclasses.replace(attachment, subject=subject)
        failures: list[CrioError] = []
        for left, program in enumerate(reversed(attachment.programs)):
            share = time.monotonic() + max(deadline - time.monotonic(), 0) / (len(attachment.programs) - left)
            try:
                self._run("DEL", program, attachment, attachment.result, share)
            except CrioError as error:
                if not (isinstance(error, PluginFailed) and error.code == _UNKNOWN_CONTAINER):
                    failures.append(error)
        return failures

    def check(self, attachment: CniAttachment) -> None:
        """CHECK each program in order, where version and list permit it; raises what the first that fails says."""
        if _before(attachment.version, "0.4.0") or attachment.disable_check or attachment.result is None:
            return
        deadline = time.monotonic() + self.limits.check
        for program in attachment.programs:
            self._run("CHECK", program, attachment, attachment.result, deadline)

    def status(self, network: NetworkList, version: str) -> None:
        """STATUS of each program (since 1.1.0); raises what the first that is not ready says."""
        if not _before(version, "1.1.0"):
            deadline = time.monotonic() + self.limits.status
            for program in network.programs:
                self._run("STATUS", program, CniAttachment.begin(network, version, _NOBODY), None, deadline)

    def collect(self, network: NetworkList, version: str, valid: Iterable[tuple[str, str]]) -> None:
        """GC of each program (since 1.1.0): what is not in `valid` (container, interface) is to be freed.

        Raises what the first that fails says, after all have been run.
        """
        if _before(version, "1.1.0") or network.disable_gc:
            return
        deadline = time.monotonic() + self.limits.gc
        extra = {"cni.dev/valid-attachments": [{"containerID": one, "ifname": name} for one, name in valid]}
        failures = []
        for program in network.programs:
            try:
                self._run("GC", program, CniAttachment.begin(network, version, _NOBODY), None, deadline, extra)
            except CrioError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _run(
        self,
        command: str,
        program: PluginProgram,
        attachment: CniAttachment,
        previous: Result | None,
        deadline: float,
        extra: Mapping[str, Any] | None = None,
        inherited: Sequence[int] = (),
    ) -> bytes:
        """One program, one verb; what it printed."""
        config = {**program.config, "cniVersion": attachment.version, "name": attachment.network, **(extra or {})}
        wanted = {key: value for key, value in attachment.subject.capabilities.items() if program.takes(key)}
        if wanted:
            config["runtimeConfig"] = wanted
        if previous is not None and not (command == "DEL" and _before(attachment.version, "0.4.0")):
            config["prevResult"] = emit(previous, attachment.version)
        step = _step(command, program)
        began = time.monotonic()
        ended = process.run(
            step,
            self._path(program.kind),
            json.dumps(config).encode(),
            self._environment(command, attachment.subject),
            deadline - began,
            inherited,
            self._stop,
        )
        log.debug("%s for %s took %.3f s", step, attachment.subject.container_id or "all", time.monotonic() - began)
        if ended.code:
            raise failure(step, program.kind, ended)
        return ended.output

    def _environment(self, command: str, subject: Subject) -> dict[str, str]:
        """Ours, and what the specification adds; a call that is about no container has no parameters of one."""
        parameters = {"CNI_COMMAND": command, "CNI_PATH": ":".join(self._directories)}
        if subject.container_id:
            parameters |= {
                "CNI_CONTAINERID": subject.container_id,
                "CNI_NETNS": subject.netns,
                "CNI_IFNAME": subject.interface,
                "CNI_ARGS": ";".join(f"{key}={value}" for key, value in subject.args),
            }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("CNI_", "NOTIFY_SOCKET"))}
        return {**inherited, **parameters}

    def _path(self, kind: str) -> str:
        path = find_program(self._directories, kind)
        if path is None:
            hint = f"it is in none of crio.network.plugin_dirs ({', '.join(self._directories) or 'there are none'})"
            raise NotFound("CNI plugin", kind, hint)
        return path

    def _versions(self, kind: str, deadline: float) -> frozenset[str]:
        """The versions that a program says it knows, asked once for each program file."""
        path = self._path(kind)
        found = os.stat(path)
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        with self._lock:
            known = self._supported.get(path)
        if known is None or known[0] != identity:
            known = (identity, self._ask_versions(kind, path, deadline))
            with self._lock:
                self._supported[path] = known
        return known[1]

    def _ask_versions(self, kind: str, path: str, deadline: float) -> frozenset[str]:
        step = f"cni VERSION {kind}"
        question = json.dumps({"cniVersion": VERSIONS[-1]}).encode()
        # Some libraries refuse any call without these, also this one.
        subject = Subject("dummy", "dummy", "dummy")
        ended = process.run(
            step, path, question, self._environment("VERSION", subject), deadline - time.monotonic(), (), self._stop
        )
        if ended.code:
            raise failure(step, kind, ended)
        try:
            versions = json.loads(ended.output)["supportedVersions"]
            return frozenset(version for version in versions if isinstance(version, str))
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise PluginFailed(
                step, kind, 0, f"it does not tell the versions that it knows ({error})", f"got {ended.output[:80]!r}"
            ) from None


def _step(command: str, program: PluginProgram) -> str:
    return f"cni {command} plugins[{program.index}]"


def _before(version: str, other: str) -> bool:
    return VERSIONS.index(version) < VERSIONS.index(other)


def _living(netns: str) -> str:
    """The path, if it leads to a namespace still: an unmounted pin is an empty file."""
    try:
        os.close(open_namespace(netns))
    except OSError:
        return ""
    return netns
