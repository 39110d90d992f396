"""`crio-native check --images` and `--repair`: the image store looked at, and mended, while no daemon uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crio_native import assembly
from crio_native.config import Config

if TYPE_CHECKING:
    from crio_native.images.upkeep import Damage


def examine(config: Config, *, repair: bool) -> tuple[list[Damage], list[str]]:
    """The damage of the image store; with `repair` the images on it are removed, but for those that containers use.

    Returns the damage, and what could not be removed, in words.  Raises FailedPrecondition while a daemon uses the
    state directory.
    """
    from crio_native.images import ImageStore, upkeep
    from crio_native.pods.store import Store, images_in_use

    root = Path(config.crio.root)
    with assembly.held(config) as keep:
        keep()
        images = ImageStore(Path(config.crio.imagestore or root / "images"))
        try:
            if not repair:
                return upkeep.check(images), []
            store = Store(root / "state.db")
            try:
                return upkeep.repair(images, in_use=images_in_use(store))
            finally:
                store.close()
        finally:
            images.close()
