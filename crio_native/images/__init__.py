"""Images: names, registries, layers, the store, and what a container's root file system is made of.

Here belongs everything from an image's name to the directories that its layers became.  What runs on them (mounting
the overlay, the process) is `oci/`'s; which container uses which image is `pods/`'s.

    references   names as people and the kubelet write them
    manifests    the documents: index, manifest, config
    sources      who has the image of a name, from:
      registries_conf, short_names, credentials, certificates, proxies
    registry     a source: OCI Distribution, over `transport` (HTTP) and `logins`
    admission    what the trust policy says of an image, by trust/
    layouts      more of them, on disk: OCI layout, docker-archive, dir; and `containers_storage`; in `directories`
    conversion   what is no plain image made into one: `artifacts`, `schema1`, `encryption`
    chunked      zstd:chunked layers by their files, from tables that `jsonstream` reads
    exporting    images written to disk
    unpacking    the daemon's side of unpacker/, the confined child that turns a layer into a directory
    adding       the layers of an image that comes
    layers       the directories that layers became
    records      the database of images
    store        all of it together: pull, load, save, list, remove
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which the unpacker would import for nothing
if TYPE_CHECKING:
    from typing import Any

    from crio_native.images.model import Credentials, FsUsage, Image, Platform, Progress
    from crio_native.images.sources import Settings
    from crio_native.images.store import ImageStore

__all__ = ["Credentials", "FsUsage", "Image", "ImageStore", "Platform", "Progress", "Settings"]


def __getattr__(name: str) -> Any:
    # The unpacker imports this package, too, and must not pay for the store.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = {"ImageStore": "store", "Settings": "sources"}.get(name, "model")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
