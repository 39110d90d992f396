"""What the tests of images share: layers and images made by Python's tarfile, Debian's registry, a hostile one."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from crio_native.images import Image, ImageStore, Settings
from crio_native.images.manifests import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from crio_native.images.model import Platform
from crio_native.images.registries_conf import Paths
from crio_native.oci.runtime import Overlay

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar entry; fields are TarInfo's own."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Picture:
    """An image made by a test: its blobs by digest, and the descriptor of its manifest."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def put(self, media_type: str, data: bytes) -> dict[str, Any]:
        self.blobs[sha256(data)] = data
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def picture(
    *layers: bytes, compress: Callable[[bytes], bytes] | bool = _gzip, config: Mapping[str, Any] | None = None
) -> Picture:
    """An image of uncompressed layers.  compress: to gzip, or not at all."""
    made = Picture()
    entries = []
    for layer in layers:
        blob = (_gzip if compress is True else compress)(layer) if compress else layer
        entries.append(made.put(GZIP_LAYER if compress else PLAIN_LAYER, blob))
    platform = Platform.host()
    document = {
        "architecture": platform.architecture,
        "os": platform.os,
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        "config": {"Cmd": ["/bin/true"], "Env": ["PATH=/bin"]},
        **(config or {}),
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": made.put(OCI_CONFIG, json.dumps(document).encode()),
        "layers": entries,
    }
    made.manifest = made.put(OCI_MANIFEST, json.dumps(manifest).encode())
    return made


def write_layout(directory: Path, image: Picture, ref_name: str = "latest") -> Path:
    """An OCI image layout."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest, data in image.blobs.items():
        (blobs / digest.partition(":")[2]).write_bytes(data)
    annotations = {"org.opencontainers.image.ref.name": ref_name} if ref_name else {}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image.manifest | {"annotations": annotations}]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return directory


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """All that matters of every file below a directory: type and mode, owner, device, size, time, link target, links,
    content, attributes."""
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        info = path.lstat()
        name = os.fspath(path.relative_to(root))
        regular = path.is_file() and not path.is_symlink()
        found[name] = (
            oct(info.st_mode),
            (info.st_uid, info.st_gid),
            info.st_rdev,
            info.st_size if regular else 0,
            info.st_mtime_ns,
            os.readlink(path) if path.is_symlink() else "",
            first.setdefault(info.st_ino, name),
            sha256(path.read_bytes()) if regular else "",
            {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)},
        )
    return found


def in_private_mounts(script: str, *arguments: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python in a mount namespace of its own: what it mounts ends with it.  Raises if it fails."""
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def deaf() -> Iterator[str]:
    """The address of a server whose queue is full: whoever connects hears nothing."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        opened.enter_context(socket.create_connection(server.getsockname()))
        yield f"127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Registry:
    """Debian's docker-registry on the loopback."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.headers: dict[str, str] = {}  # sent with each request of `push`

    def push(self, repository: str, tag: str, image: Picture, *, document: dict[str, Any] | None = None) -> str:
        """Push an image; document: a manifest or index instead of its own.  Returns a pullable name."""
        for digest, data in image.blobs.items():
            if digest != image.manifest["digest"]:
                self._push_blob(repository, digest, data)
        if document is None:
            raw, media_type = image.blobs[image.manifest["digest"]], image.manifest["mediaType"]
        else:
            raw, media_type = json.dumps(document).encode(), document["mediaType"]
        self._call("PUT", f"/v2/{repository}/manifests/{tag}", raw, {"Content-Type": media_type}, 201)
        return f"{self.address}/{repository}:{tag}"

    def _push_blob(self, repository: str, digest: str, data: bytes) -> None:
        headers = self._call("POST", f"/v2/{repository}/blobs/uploads/", b"", {}, 202)
        location = headers["Location"].removeprefix(f"http://{self.address}")
        separator = "&" if "?" in location else "?"
        octets = {"Content-Type": "application/octet-stream"}
        self._call("PUT", f"{location}{separator}digest={digest}", data, octets, 201)

    def _call(self, method: str, path: str, body: bytes, headers: dict[str, str], status: int) -> Any:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, {**headers, **self.headers})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == status, (method, path, answer.status, text)
            return answer.headers


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


@contextlib.contextmanager
def running_registry(directory: Path, *, tls: str = "", auth: str = "") -> Iterator[Registry]:
    """Debian's registry; tls, auth: more of its configuration, as YAML's flow style."""
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry is not installed")
    address = f"127.0.0.1:{free_port()}"
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        "compatibility: {schema1: {enabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f"http: {{addr: '{address}'{tls and f', tls: {tls}'}}}\n" + (auth and f"auth: {auth}\n")
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
    try:
        _wait_for(address, process)
        yield Registry(address)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    for _ in range(200):
        assert process.poll() is None, "the registry has ended"
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the registry does not listen")


# A registry that misbehaves

Answer = Callable[[BaseHTTPRequestHandler], None]


class HostileRegistry:
    """An HTTP server of the test's own.

    routes: path -> what answers a GET of it; `serve` fills them for an image, and a test then spoils some.  requests:
    (path, headers) of all that came.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            body = b""

            def do_POST(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def do_GET(self) -> None:
                hostile.requests.append((self.path, dict(self.headers.items())))
                answer = hostile.routes.get(self.path.partition("?")[0], reply(404, b'{"errors":[]}'))
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up are what these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def serve(self, repository: str, image: Picture, tag: str = "latest") -> str:
        for digest, data in image.blobs.items():
            self.routes[f"/v2/{repository}/blobs/{digest}"] = reply(200, data)
        raw, media_type = image.blobs[image.manifest["digest"]], image.manifest["mediaType"]
        for reference in (tag, image.manifest["digest"]):
            self.routes[f"/v2/{repository}/manifests/{reference}"] = reply(200, raw, {"Content-Type": media_type})
        return f"{self.address}/{repository}:{tag}"

    def count(self, fragment: str) -> int:
        return sum(fragment in path for path, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def blob_path(layer: bytes) -> str:
    """Where `serve` has a layer of a picture in the repository app."""
    return f"/v2/app/blobs/{sha256(_gzip(layer))}"


def reply(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """The first answer for the first request, and so on; the last one for all further ones."""
    left: Sequence[Answer] = list(answers)

    def answer(request: BaseHTTPRequestHandler) -> None:
        nonlocal left
        now, left = left[0], left[1:] or left
        now(request)

    return answer


@pytest.fixture
def hostile() -> Iterator[HostileRegistry]:
    server = HostileRegistry()
    yield server
    server.close()


# A store

DIR = tarfile.DIRTYPE
BASE = tar(member("bin", DIR), member("bin/sh", data=b"shell", mode=0o755), member("etc/motd", data=b"old"))
TOP = tar(member("etc/.wh.motd"), member("etc/issue", data=b"new"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    made = ImageStore(tmp_path / "store")
    yield made
    made.close()


def load(store: ImageStore, tmp_path: Path, name: str, *layers: bytes) -> Image:
    """Load an image of these layers as localhost/NAME:latest."""
    (image,) = store.load(f"oci:{write_layout(tmp_path / name, picture(*layers))}")
    return image


def assert_nothing_left(root: Path, layers: int = 0) -> None:
    """The store holds so many layers and no scraps."""
    assert list((root / "tmp").iterdir()) == []
    assert len(list((root / "layers").iterdir())) == layers + 1


def root_of(store: ImageStore, image: Image, container: Path) -> Overlay:
    """The image's root file system, to be mounted; container: a directory that is made for it."""
    overlay = store.prepare_root(image.id, made_directory(container))
    assert overlay is not None
    return overlay


def layers_of(store: ImageStore, image: Image, container: Path) -> list[Path]:
    """The directories of the image's layers, the top first; container as for `root_of`."""
    overlay = root_of(store, image, container)
    return [Path(overlay.base) / lower for lower in overlay.lowers]


def made_directory(directory: Path) -> Path:
    directory.mkdir()
    return directory


# Tools that others made


def skopeo(*arguments: object) -> str:
    """Run skopeo without trust policy and TLS; what it prints."""
    command = ["skopeo", "--insecure-policy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def store_with(tmp_path: Path, conf: str = "", **settings: Any) -> Iterator[ImageStore]:
    """A store whose registries.conf says this."""
    file = tmp_path / "registries.conf"
    file.write_text(conf)
    made = Settings(Paths(file, tmp_path / "none", tmp_path / "none"), **{"certificate_directories": (), **settings})
    with contextlib.closing(ImageStore(tmp_path / "store", settings=made)) as store:
        yield store
