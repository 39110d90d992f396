"""An image made from Debian's busybox-static: what the demonstration and the benchmark run.

Here belongs the making of that one OCI image layout (image-spec 1.1), with the standard library alone; nothing that
reads images.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import NotFound

BUSYBOX = Path("/bin/busybox")
ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUPS = "root:x:0:\nnogroup:x:65534:\n"
DIRECTORIES = {"bin": 0o755, "etc": 0o755, "root": 0o700, "tmp": 0o1777, "var": 0o755, "www": 0o755}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def build_layout(directory: Path, tag: str, command: Sequence[str] = ("sh",)) -> str:
    """Write a layout with one image into `directory` (made here) and return its reference, ``oci:DIRECTORY:TAG``.

    The same program gives the same bytes, so the image id stays.  Raises NotFound when busybox-static is missing.
    """
    layer = _layer()
    machine = platform.machine()
    config = {
        "architecture": ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": list(command), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _store(blobs, "application/vnd.oci.image.config.v1+json", _json(config)),
        "layers": [_store(blobs, "application/vnd.oci.image.layer.v1.tar+gzip", gzip.compress(layer, 1, mtime=0))],
    }
    entry = _store(blobs, str(manifest["mediaType"]), _json(manifest))
    index = {"schemaVersion": 2, "manifests": [{**entry, "annotations": {"org.opencontainers.image.ref.name": tag}}]}
    (directory / "index.json").write_bytes(_json(index))
    (directory / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return f"oci:{directory}:{tag}"


def populate_root(root: Path) -> None:
    """The same files as a directory, for runtimes that are given a bundle."""
    with tarfile.open(fileobj=io.BytesIO(_layer())) as archive:
        archive.extractall(root)


def _layer() -> bytes:
    if not BUSYBOX.exists():
        raise NotFound("program", str(BUSYBOX), "install Debian's package busybox-static")
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in DIRECTORIES.items():
            archive.addfile(_entry(name, tarfile.DIRTYPE, mode))
        _add_file(archive, "bin/busybox", BUSYBOX.read_bytes(), 0o755)
        _add_file(archive, "etc/passwd", ACCOUNTS.encode(), 0o644)
        _add_file(archive, "etc/group", GROUPS.encode(), 0o644)
        for name in applets:
            if name != "busybox":
                archive.addfile(_entry(f"bin/{name}", tarfile.SYMTYPE, 0o777, linkname="busybox"))
    return buffer.getvalue()


def _entry(name: str, kind: bytes, mode: int, *, linkname: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname = kind, mode, linkname
    return entry


def _add_file(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = _entry(name, tarfile.REGTYPE, mode)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _store(blobs: Path, media_type: str, content: bytes) -> dict[str, Any]:
    """Write a blob; return its descriptor."""
    digest = _digest(content)
    (blobs / digest.removeprefix("sha256:")).write_bytes(content)
    return {"mediaType": media_type, "digest": digest, "size": len(content)}


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
