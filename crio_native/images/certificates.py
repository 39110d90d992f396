"""TLS for one registry: whom to trust and how to show who we are (containers-certs.d(5)).

certs.d/HOST[:PORT]/*.crt        authorities to trust, beside the system's
certs.d/HOST[:PORT]/NAME.cert    a client certificate
certs.d/HOST[:PORT]/NAME.key     its key
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crio_native.errors import InvalidArgument

if TYPE_CHECKING:
    import ssl

DIRECTORIES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
MAX_FILES = 64  # of one registry


def directory_of(registry: str, directories: tuple[Path, ...] = DIRECTORIES) -> Path | None:
    """The first directory there is for a registry."""
    return next((path for base in directories if (path := base / registry).is_dir()), None)


def context(directory: Path | None, *, verify: bool = True) -> ssl.SSLContext:
    """A context with the certificates of a directory.  Raises InvalidArgument, naming the file that is not usable."""
    import ssl  # heavy, and a node at rest pulls nothing

    made = ssl.create_default_context()
    if not verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    for path in sorted(directory.iterdir())[:MAX_FILES] if directory else ():
        try:
            if path.suffix == ".crt":
                made.load_verify_locations(path)
            elif path.suffix == ".cert":
                key = _existing(path.with_suffix(".key"), path)
                made.load_cert_chain(path, key, password="")  # an encrypted key is an error, not a question
            elif path.suffix == ".key":
                _existing(path.with_suffix(".cert"), path)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument(str(path), str(error), "it cannot be used for TLS") from None
    return made


def _existing(path: Path, other: Path) -> Path:
    if not path.is_file():
        raise InvalidArgument(str(other), str(path), "its other half, certificate or key, is missing")
    return path
