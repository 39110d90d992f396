"""An OCI runtime's program: its command line, how it is run, and what its answers mean.

It is run by a clone of a launcher (`runner`), bounded in time and output.  What it says in words is kept in the errors,
because nobody else knows why it refused; what it says of itself is checked before it is believed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crio_native.errors import DeadlineExceeded, FailedPrecondition, NotFound, StepFailed, Unavailable, printable
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.runtime import Abilities

log = logging.getLogger(__name__)

OUTPUT_MAX = 256 << 10  # bytes of a program's stdout; the longest there is, a features document, has some 15 KiB
WORDS_MAX = 2000  # characters of its complaint that go into an error
ASK_SECONDS = 10.0  # for `features` and `--version`, which only print
ACT_SECONDS = 60.0  # for an act on a container that exists
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_CRIO = "/usr/libexec/crio"  # where CRI-O's packages keep a crun and a runc of their own

_LOGFMT = re.compile(r'level=(\w+) msg="((?:[^"\\]|\\.)*)"')
_ESCAPES = {"n": "; ", "t": " "}
_CRUN_TIME = re.compile(r"^\d{4}-\d\d-\d\dT[0-9:.]+Z?: ")


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of the program that came to its end."""

    code: int
    stdout: bytes
    words: str


class Program:
    """A runtime's program with what is the same in every call of it.

    path: "" to look `name` up in PATH.  root: where it keeps its containers' states.  env: NAME=VALUE beside PATH.
    """

    def __init__(
        self, launchers: Launchers, *, name: str, path: str, root: str, env: Sequence[str], systemd_cgroup: bool
    ) -> None:
        self._launchers = launchers
        self._given = path
        self._name = name
        self.root = root
        self.act_seconds = ACT_SECONDS
        self.env = {"PATH": DEFAULT_PATH, **dict(text.split("=", 1) for text in env)}
        self._global = ["--root", root, *(["--systemd-cgroup"] if systemd_cgroup else [])]

    @property
    def path(self) -> str:
        """Where the program is, or should be.  Looked up each time: it may be installed while we run."""
        return self._given or shutil.which(self._name, path=self._searched) or self._name

    @property
    def _searched(self) -> str:
        return f"{self.env['PATH']}:{OF_CRIO}"

    def find(self) -> str:
        """`path`, when a program is there.  Raises NotFound, FailedPrecondition."""
        path = self.path
        if not os.path.exists(path):
            lacking = f"not in {self._searched}; install {self._name}, or set runtime_path"
            where = "runtime_path names no file" if self._given else lacking
            raise NotFound("runtime program", path, where)
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise FailedPrecondition(f"runtime program {path!r} is not an executable file")
        return path

    def line(self, *words: str) -> list[str]:
        """The argument vector of a command."""
        return [self.path, *self._global, *words]

    def run(self, line: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None) -> Ended:
        """Run it to its end.  Raises DeadlineExceeded (it was killed then), StepFailed when it cannot be executed."""
        what = describe(line)
        request = {
            "op": "external",
            "act": "run",
            "line": list(line),
            "env": self.env,
            "stdin": stdin,
            "output_max": OUTPUT_MAX,
        }
        with self._launchers.conversation(request) as reply:
            answer = receive(reply, seconds or self.act_seconds, what)
        if answer["signal"]:
            raise StepFailed(what, 0, line[0], f"it was killed by signal {answer['signal']}")
        said = words(answer["stderr"] or answer["stdout"][-WORDS_MAX:])
        return Ended(answer["code"], answer["stdout"], said or f"nothing, it ended with code {answer['code']}")

    def act(self, *line: str, stdin: bytes = b"", seconds: float | None = None) -> bytes:
        """A command that must succeed; its stdout.  Raises StepFailed with the runtime's own words."""
        ended = self.run(self.line(*line), stdin=stdin, seconds=seconds)
        if ended.code != 0:
            raise self.failed(line[0], ended.words)
        return ended.stdout

    def failed(self, command: str, said: str) -> StepFailed:
        """The error of a command that the runtime refused in these words."""
        return StepFailed(command, number_of(said), "", f"{os.path.basename(self.path)} says: {said}")

    def status(self, container_id: str) -> str:
        """created, running, paused, stopped; "" when it knows no such container."""
        ended = self.run(self.line("state", container_id))
        if ended.code != 0:
            return ""
        return str(self._object("state", ended.stdout).get("status", ""))

    def abilities(self) -> Abilities:
        """Its version and features, as far as it tells them: older runtimes have no `features`.

        Raises NotFound, FailedPrecondition, StepFailed, DeadlineExceeded.
        """
        path = self.find()
        asked = self.run([path, "--version"], seconds=ASK_SECONDS)
        if asked.code != 0:
            raise self.failed("--version", asked.words)
        first = asked.stdout.decode(errors="replace").strip().split("\n")[0]
        asked = self.run([path, "features"], seconds=ASK_SECONDS)
        if asked.code != 0:
            log.info("%s has no features to tell: %s", path, asked.words)
            return Abilities(first[:200])
        return abilities_of(first[:200], self._object("features", asked.stdout), path)

    def _object(self, command: str, data: bytes) -> dict[str, Any]:
        if len(data) >= OUTPUT_MAX:
            raise StepFailed(command, 0, self.path, f"it printed {OUTPUT_MAX} bytes or more")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise StepFailed(command, 0, self.path, f"what it printed is not JSON: {data[:100]!r}") from None
        if not isinstance(value, dict):
            raise StepFailed(command, 0, self.path, f"it printed JSON that is not an object: {data[:100]!r}")
        return value


def abilities_of(version: str, features: Mapping[str, Any], path: str) -> Abilities:
    """What a features document promises (runtime-spec features.md).  Raises StepFailed for one that cannot be true."""

    def wrong(field: str, value: object, why: str) -> StepFailed:
        return StepFailed("features", 0, path, f"its features document is wrong: {field} {why} (got {value!r:.100})")

    for name in ("ociVersionMin", "ociVersionMax"):
        if not re.fullmatch(r"\d{1,4}\.\d{1,4}\.\d{1,4}.{0,40}", str(features.get(name)), re.ASCII):
            raise wrong(name, features.get(name), "must be a version")
    if _version(features["ociVersionMin"]) > (1, 3) or _version(features["ociVersionMax"]) < (1, 0):
        served = f"{features['ociVersionMin']} to {features['ociVersionMax']}"
        raise wrong("ociVersionMin", served, "must not exclude the specification's versions 1.0 to 1.3")
    options, linux = features.get("mountOptions"), features.get("linux")  # null is as good as none
    options, linux = [] if options is None else options, {} if linux is None else linux
    if not (isinstance(options, list) and all(isinstance(each, str) for each in options)):
        raise wrong("mountOptions", options, "must be a list of strings")
    if not isinstance(linux, dict):
        raise wrong("linux", linux, "must be an object")
    return Abilities(version, "rro" in options, _maps_ids(linux), features)


def _maps_ids(linux: Mapping[str, Any]) -> bool:
    """Whether it makes user namespaces, and mounts that show owners as these map them (KEP-127)."""
    kinds, extensions = linux.get("namespaces"), linux.get("mountExtensions")
    idmap = extensions.get("idmap") if isinstance(extensions, dict) else None
    return isinstance(kinds, list) and "user" in kinds and isinstance(idmap, dict) and idmap.get("enabled") is True


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def describe(line: Sequence[str]) -> str:
    """A command line in short: the program and the words that are no options."""
    return " ".join([os.path.basename(line[0]), *(word for word in line[1:] if "/" not in word and word != "--root")])


def receive(reply: socket.socket, seconds: float, what: str) -> dict[str, Any]:
    """The runner's answer.  Raises StepFailed with what it tells, DeadlineExceeded, Unavailable."""
    reply.settimeout(seconds)
    try:
        data, descriptors = wire.receive(reply)
    except TimeoutError:
        raise DeadlineExceeded(f"{what}: not done within {seconds:g} s, and killed") from None
    for descriptor in descriptors:
        os.close(descriptor)
    if not data:
        raise Unavailable(f"{what}: the process that ran it has died")
    answer = wire.unpack(data)
    if "error" in answer:
        raise StepFailed.from_dict(answer["error"])
    return answer


def number_of(said: str) -> int:
    """The errno that a runtime's words name, 0 for none."""
    said = said.lower()
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.EACCES, errno.ENOEXEC):
        if os.strerror(number).lower() in said:
            return number
    return errno.ENOENT if "not found in $path" in said else 0


def words(stderr: bytes) -> str:
    """What a runtime complains of, without its log's frame: runc's logfmt or JSON lines, crun's time stamps, or text.

    The lines of level error where there are some, else all that it said.
    """
    said: list[tuple[str, str]] = []
    for line in stderr.decode(errors="replace").splitlines():
        if line.strip():
            said.append(_record(line.strip()))
    errors = [text for level, text in said if level in ("error", "fatal")]
    text = printable("; ".join(dict.fromkeys(errors or [text for _, text in said])).strip())
    return text if len(text) <= WORDS_MAX else f"{text[:WORDS_MAX]}..."


def _record(line: str) -> tuple[str, str]:
    """(level, text) of a line of the runtime's log."""
    if found := _LOGFMT.search(line):
        return found[1], re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), found[2])
    if line.startswith("{"):
        try:
            record = json.loads(line)
            return str(record["level"]), str(record["msg"])
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
    return "", _CRUN_TIME.sub("", line)
