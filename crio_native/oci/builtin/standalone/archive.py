"""The modules of a command, read from one file instead of from sixty.

To find, open and read a module takes the interpreter a tenth of a millisecond, and `run` has some sixty: a quarter of
all that it costs.  `helpers/modules.py` compiles them when the program is built, for each command one file of what it
imports, in the order in which that is to be executed; here it is.  An archive is a copy, so it counts only as long as
every file that it was made from is as it was: else, and for what is imported later, the interpreter looks for itself.

The code of this module is in the first archive (see `helpers/crio-oci.c`), so it imports only what is there already.
"""

import posix
import sys
from _frozen_importlib import ModuleSpec, _load  # type: ignore[attr-defined]  # importlib's own, here without it
from _frozen_importlib_external import ExtensionFileLoader
from marshal import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO
    from types import ModuleType

    # name, file, the directory of a package or "", the file's st_mtime_ns and st_size
    Entry = tuple[str, str, str, int, int]


def load(path: str) -> None:
    """Import the modules of the archive at that path, if it is there."""
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(descriptor, "rb", buffering=0) as file:
        add(file)


def add(file: "FileIO") -> None:
    """Import all modules of an archive, or none when a file has changed since.

    file: unbuffered, or all would be copied once more; at the size of the list of entries (4 bytes, little end first),
    which the list follows, and then the modules' code in its order, both as `marshal` writes them.
    """
    entries = loads(file.read(int.from_bytes(file.read(4), "little")))
    if _outdated(entries):
        return
    code = loads(file.read())  # None for a module in C
    # First all of them, still empty: a package is executed after its parts.
    python = [entry for entry, body in zip(entries, code, strict=True) if body is not None]
    for name, path, directory, *_ in python:
        sys.modules[name] = _empty(name, path, directory)
    for name, *_ in python:
        package, _, own = name.rpartition(".")
        if package:
            setattr(sys.modules[package], own, sys.modules[name])
    for (name, path, *_), body in zip(entries, code, strict=True):
        if body is not None:
            exec(body, sys.modules[name].__dict__)
        else:
            _load(ModuleSpec(name, ExtensionFileLoader(name, path), origin=path))


def _outdated(entries: "Sequence[Entry]") -> bool:
    try:
        for _, path, _, changed, size in entries:
            found = posix.stat(path)
            if found.st_mtime_ns != changed or found.st_size != size:
                return True
    except OSError:
        return True
    return False


def _empty(name: str, path: str, directory: str) -> "ModuleType":
    module = type(sys)(name)
    module.__spec__ = ModuleSpec(name, None, origin=path, is_package=bool(directory))
    module.__file__ = path
    module.__package__ = name if directory else name.rpartition(".")[0]
    if directory:
        module.__path__ = [directory]
    return module
