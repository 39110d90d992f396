"""Where the program's own data files are: in conf/ of a checkout, else where a package puts them."""

from __future__ import annotations

from pathlib import Path

from crio_native.errors import NotFound

PLACES = (Path(__file__).resolve().parents[2] / "conf", Path("/usr/share/crio-native"))


def installed(name: str) -> Path:
    """The path of a file of conf/.  Raises NotFound with the places that were searched."""
    for place in PLACES:
        if (place / name).is_file():
            return place / name
    raise NotFound("the program's file", name, "searched " + ", ".join(map(str, PLACES)))
