"""Images for tests: the busybox image with another configuration, and so another id."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli import busybox

from .conftest import Client


def variant(client: Client, name: str, **config: Any) -> str:
    """Load the image with `config` added to its configuration; what to name it by in a request."""
    layout = client.daemon.directory / f"layout-{name}"
    reference = busybox.build_layout(layout, name)
    index = json.loads((layout / "index.json").read_bytes())
    [entry] = index["manifests"]
    manifest = _read(layout, entry["digest"])
    image = _read(layout, manifest["config"]["digest"])
    image["config"] |= config
    manifest["config"] |= _written(layout, image)
    entry |= _written(layout, manifest)
    (layout / "index.json").write_text(json.dumps(index))
    return str(client.call("PullImage", image=pb.ImageSpec(image=reference)).image_ref)


def _read(layout: Path, digest: str) -> Any:
    return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())


def _written(layout: Path, document: Any) -> dict[str, Any]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}
