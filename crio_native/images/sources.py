"""Where the image of a name comes from: which names it may mean, which hosts have them, and who we are there.

Brings together registries.conf, credentials and certificates for the store, and tries what they allow in turn.  What
is done with a registry that answers is the store's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crio_native.errors import CrioError, NotFound, PermissionRefused, Unavailable
from crio_native.images import certificates, registries_conf, short_names
from crio_native.images.credentials import Keychain
from crio_native.images.model import Credentials
from crio_native.images.references import Reference
from crio_native.images.registries_conf import Endpoint, Paths, Registries
from crio_native.images.registry import Repository
from crio_native.images.trust.judging import Trust
from crio_native.images.work import Connections, Stop

if TYPE_CHECKING:
    from crio_native.config import Config

# What another host may do better; a wrong image is wrong everywhere, and a stop is a stop.
_NEXT = (NotFound, PermissionRefused, Unavailable)

Result = TypeVar("Result")
Use = Callable[[Reference], Callable[[Repository, str], Result]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the daemon's configuration says about registries.

    paths: of registries.conf; None for no such files, and Docker Hub for short names.  insecure: hosts whose
    certificates are not checked.  short_names: "enforcing", or "disabled" to try all; registries.conf may say more
    exactly what enforcing is.  follow: read files anew when they have changed.  patience: seconds that a pull may
    stand still, None for ever.  keys: directory of private keys for encrypted images.
    artifacts: whether OCI artifacts are taken.  trust: None to accept every image.
    """

    paths: Paths | None = None
    insecure: frozenset[str] = frozenset()
    short_names: str = "enforcing"
    follow: bool = False
    keychain: Keychain = field(default_factory=lambda: Keychain(files=()))
    certificate_directories: tuple[Path, ...] = certificates.DIRECTORIES
    patience: float | None = None
    keys: Path | None = None
    artifacts: bool = True
    trust: Trust | None = None


def from_config(config: Config) -> Settings:
    """What [crio.image] says, and what belongs to it."""
    image, keys = config.image, config.runtime.decryption_keys_path
    keychain = Keychain(
        Path(image.global_auth_file) if image.global_auth_file else None,
        Path(image.namespaced_auth_dir) if image.namespaced_auth_dir else None,
    )
    return Settings(
        Paths.from_environment(),
        frozenset(image.insecure_registries),
        image.short_name_mode,
        image.auto_reload_registries,
        keychain,
        patience=image.pull_progress_timeout or None,
        keys=Path(keys) if keys else None,
        artifacts=image.oci_artifact_mount_support,
        trust=Trust(image.signature_policy, image.signature_policy_dir),
    )


class Sources:
    """The sources of images of one node.  Raises InvalidArgument for a registries.conf that is wrong.

    connections: the open ones of all pulls.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections = Connections()
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()
        self._registries = Registries(search=("docker.io",))
        self.reload()

    def reload(self) -> None:
        """Read the files anew.  Raises InvalidArgument; then what was read before still counts."""
        if self.settings.paths:
            with self._lock:
                seen = _signature(self.settings.paths)
                self._registries = registries_conf.load(self.settings.paths)
                self._seen = seen

    def registries(self) -> Registries:
        """What counts now.  Raises InvalidArgument when it follows a file that has become wrong."""
        paths = self.settings.paths
        if paths and self.settings.follow and _signature(paths) != self._seen:
            self.reload()
        return self._registries

    def names(self, text: str) -> tuple[Reference, ...]:
        """The complete names under which an image of the store may be meant.  Raises InvalidArgument."""
        return short_names.to_look_up(text, self._registries)

    def pull(
        self, text: str, stop: Stop, use: Use[Result], *, credentials: Credentials | None = None, namespace: str = ""
    ) -> Result:
        """Try what a name may mean, each at every host that may have it, until `use` succeeds.

        credentials: the caller's own, for the registry itself and not for its mirrors.  namespace: of the pod.
        use: is given the complete name before anybody is asked for anything, credentials included; what it returns is
        given an open repository and the host in words.  Raises InvalidArgument for a name that is wrong or ambiguous;
        else what was raised last, with what was tried before.
        """
        registries = self.registries()
        mode = "disabled" if self.settings.short_names == "disabled" else registries.mode or "enforcing"
        tried: list[tuple[str, CrioError]] = []
        for reference in short_names.to_pull(text, registries, mode):
            use_it = use(reference)
            for endpoint in registries.endpoints(reference):
                try:
                    with contextlib.closing(self._open(endpoint, text, stop, credentials, namespace)) as repository:
                        return use_it(repository, f"registry {endpoint.reference.registry}")
                except _NEXT as error:
                    log.info("%s from %s: %s", reference, endpoint.reference.name, error)
                    tried.append((endpoint.reference.name, error))
        raise _summary(text, tried)

    def _open(
        self, endpoint: Endpoint, text: str, stop: Stop, credentials: Credentials | None, namespace: str
    ) -> Repository:
        reference, settings = endpoint.reference, self.settings
        own = None if endpoint.mirror or not _is_for(credentials, reference) else credentials
        return Repository(
            reference,
            stop,
            insecure=endpoint.insecure or reference.registry in settings.insecure,
            credentials=own
            or settings.keychain.find(reference, self._registries.helpers, namespace=namespace, image=text),
            certificate_directories=settings.certificate_directories,
            connections=self.connections,
        )


def _is_for(credentials: Credentials | None, reference: Reference) -> bool:
    """Whether the caller's credentials are for a registry: where it says for which, for that one only."""
    if credentials is None or not credentials.server:
        return True
    server = credentials.server.partition("://")[2] or credentials.server
    host = server.partition("/")[0]
    return ("docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host) == reference.registry


def _summary(text: str, tried: list[tuple[str, CrioError]]) -> CrioError:
    """The last failure, whose class is the answer's; those before it are told with it."""
    error = tried[-1][1]
    if len(tried) == 1:
        return error
    before = "; ".join(f"{name}: {other}" for name, other in tried[:-1])
    if isinstance(error, NotFound):
        return NotFound("image", text, f"{tried[-1][0]}: {error}; before that: {before}")
    return type(error)(f"{error}; before that: {before}")


def _signature(paths: Paths) -> tuple[object, ...]:
    """Changes when any of the files does."""
    found: list[object] = []
    for path in paths.all():
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
            found.append((path, info.st_ino, info.st_size, info.st_mtime_ns))
    return tuple(found)
