"""Credentials for registries: auth.json, docker's config.json, and credential helpers (containers-auth.json(5)).

From a reference to who we are there.  What the caller of a pull gives itself comes before all this and is `sources`'s;
what is sent of it is `logins`'s.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.errors import DeadlineExceeded, InvalidArgument, Unavailable
from crio_native.images.model import Credentials
from crio_native.images.references import DEFAULT_REGISTRY, Reference

MAX_FILE = 4 << 20  # bytes
HELPER_TIMEOUT = 20.0  # seconds; one that asks a cloud for a token takes a few
END_TIMEOUT = 2.0  # seconds from its answer to its end
MAX_HELPER_ANSWER = 1 << 20
FILES = "containers-auth.json"  # in the list of helpers: the files, here
TOKEN_USER = "<token>"  # what a helper calls an identity token's user

_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NOT_FOUND = "credentials not found"  # how docker-credential-helpers say so, on standard output

log = logging.getLogger(__name__)


def default_files(environment: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where credentials are kept, the first to look at first."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    home = Path(environment.get("HOME") or "/root")
    return (
        *((Path(runtime) / "containers/auth.json",) if runtime else ()),
        Path(f"/run/containers/{os.geteuid()}/auth.json"),
        Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json",
        Path(environment.get("DOCKER_CONFIG") or home / ".docker") / "config.json",
    )


@dataclass(frozen=True, slots=True)
class Keychain:
    """Who we are at which registry.  Files are read at each use: others rewrite them.

    global_file: instead of the default files.  namespaced: directory of files for one image of one namespace.
    helpers: FILES and names of docker-credential-NAME programs, in order.
    """

    global_file: Path | None = None
    namespaced: Path | None = None
    files: tuple[Path, ...] = field(default_factory=default_files)
    helper_timeout: float = HELPER_TIMEOUT

    def find(
        self, reference: Reference, helpers: tuple[str, ...] = (), *, namespace: str = "", image: str = ""
    ) -> Credentials | None:
        """The credentials for a reference, of the longest name that something knows; None for anonymous.

        namespace, image: of the pod, and the image's name as it was asked for.  Raises InvalidArgument for a damaged
        file, DeadlineExceeded for a helper that hangs, Unavailable for one that fails.
        """
        own = self._namespaced_file(namespace, image)
        if own and (found := self._in_file(own, reference)):
            return found
        for helper in helpers or (FILES,):
            found = self._in_files(reference) if helper == FILES else self._from_helper(helper, reference.registry)
            if found:
                return found
        return None

    def _namespaced_file(self, namespace: str, image: str) -> Path | None:
        # The name comes from the kubelet, but a path is made of it.
        if not self.namespaced or not _NAMESPACE.fullmatch(namespace):
            return None
        return self.namespaced / f"{namespace}-{hashlib.sha256(image.encode()).hexdigest()}.json"

    def _in_files(self, reference: Reference) -> Credentials | None:
        for path in (self.global_file,) if self.global_file else self.files:
            if found := self._in_file(path, reference):
                return found
        return None

    def _in_file(self, path: Path, reference: Reference) -> Credentials | None:
        document = _read(path)
        helper = _table(document, "credHelpers", path).get(reference.registry)
        if isinstance(helper, str) and (found := self._from_helper(helper, reference.registry)):
            return found
        auths = _table(document, "auths", path)
        by_name = {_normal(key): (key, entry) for key, entry in reversed(auths.items())}
        for name in _names(reference):
            if name in by_name and (found := _entry(*by_name[name], path)):
                return found
        store = document.get("credsStore")
        return self._from_helper(store, reference.registry) if isinstance(store, str) and store else None

    def _from_helper(self, helper: str, registry: str) -> Credentials | None:
        if not _HELPER_NAME.fullmatch(helper):
            raise InvalidArgument("credential helper", helper, "not the NAME of a program docker-credential-NAME")
        server = "https://index.docker.io/v1/" if registry == DEFAULT_REGISTRY else registry
        answer = _run_helper(f"docker-credential-{helper}", server, self.helper_timeout)
        if answer is None:
            return None
        try:
            document = json.loads(answer)
            user, secret = document["Username"], document["Secret"]
        except (ValueError, KeyError, TypeError, RecursionError):
            user = secret = None
        if not isinstance(user, str) or not isinstance(secret, str):
            raise Unavailable(f"credential helper docker-credential-{helper} did not answer Username and Secret")
        return Credentials(identity_token=secret) if user == TOKEN_USER else Credentials(user, secret)


def _names(reference: Reference) -> Iterator[str]:
    """What credentials may be filed under: the repository, each path above it, the registry."""
    name = reference.name
    while True:
        yield name
        above = name.rpartition("/")[0]
        if not above:
            return
        name = above


def _normal(key: str) -> str:
    """A key of `auths` without what older programs added: a scheme, and the version in a path."""
    name = key.partition("://")[2] or key
    host, _, path = name.rstrip("/").partition("/")
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DEFAULT_REGISTRY
    return host if path in ("", "v1", "v2") else f"{host}/{path}"


def _entry(key: str, entry: object, path: Path) -> Credentials | None:
    """The credentials of one entry; an empty one says nothing (docker leaves those for its helpers)."""
    where = f"{path}: auths.{key}"
    if not isinstance(entry, dict):
        raise InvalidArgument(where, type(entry).__name__, "not an object")
    if token := entry.get("identitytoken"):
        if not isinstance(token, str):
            raise InvalidArgument(f"{where}.identitytoken", "(hidden)", "not a string")
        return Credentials(identity_token=token)
    encoded = entry.get("auth")
    if not encoded:
        return None
    return decode(encoded, f"{where}.auth")


def decode(encoded: object, where: str) -> Credentials:
    """Credentials from base64 of `name:password`.  Raises InvalidArgument, without the value."""
    try:
        name, colon, password = base64.b64decode(str(encoded), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        name, colon, password = "", "", ""
    if not colon or not name:
        raise InvalidArgument(where, "(hidden)", "must be base64 of NAME:PASSWORD")
    return Credentials(name, password.rstrip("\0"))


def _read(path: Path) -> dict[str, Any]:
    """A file that is not there is as good as an empty one."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InvalidArgument(str(path), error.strerror, "credentials cannot be read") from None
    if len(raw) > MAX_FILE:
        raise InvalidArgument(str(path), f"{len(raw)} bytes", f"larger than {MAX_FILE} bytes")
    try:
        document = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):  # what it says instead may be secret
        raise InvalidArgument(str(path), "(hidden)", "not a JSON object")
    return document


def _table(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path}: {key}", type(value).__name__, "not an object")
    return value


def _run_helper(program: str, server: str, timeout: float) -> bytes | None:
    """Ask a helper (the `get` of docker-credential-helpers).  None if it knows nothing; DeadlineExceeded, Unavailable.

    The child is made by vfork and execs at once (subprocess does so without a preexec_fn), so the daemon's threads are
    not copied.  It gets a session of its own, so that all it started can be killed with it.
    """
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "XDG_RUNTIME_DIR") if key in os.environ}
    try:
        child = subprocess.Popen(
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"credential helper {program} cannot be run: {error.strerror}") from None
    try:
        answer = _ask(child, server.encode(), timeout)
        if len(answer) > MAX_HELPER_ANSWER:
            raise Unavailable(f"credential helper {program} answered more than {MAX_HELPER_ANSWER} bytes")
        child.wait(END_TIMEOUT)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise DeadlineExceeded(
            f"credential helper {program} did not answer for {server} within {timeout:g} s and was killed"
        ) from None
    finally:
        _end(child)
    if child.returncode == 0:
        return answer
    if answer[:1024].decode(errors="replace").lower().startswith(_NOT_FOUND):
        return None
    raise Unavailable(f"credential helper {program} failed for {server} with status {child.returncode}")


def _ask(child: subprocess.Popen[bytes], question: bytes, timeout: float) -> bytes:
    """All that it answers, up to one byte more than it may.  Raises TimeoutError."""
    assert child.stdin and child.stdout
    end = time.monotonic() + timeout
    try:
        with child.stdin as pipe:
            pipe.write(question)  # shorter than a pipe: this does not wait
    except BrokenPipeError:
        pass  # it did not need to read it
    answer = bytearray()
    while len(answer) <= MAX_HELPER_ANSWER:
        if not select.select([child.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            raise TimeoutError
        piece = os.read(child.stdout.fileno(), MAX_HELPER_ANSWER + 1 - len(answer))
        if not piece:
            break
        answer += piece
    return bytes(answer)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nothing of it is left when we return.  Its number, and its group's, are its own until it is waited for."""
    assert child.stdout
    child.stdout.close()
    if child.returncode is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
