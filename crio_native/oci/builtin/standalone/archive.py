"""The modules of a command, read from one file instead of from sixty.

To find, open and read a module takes the interpreter a tenth of a millisecond, and `run` has some sixty: a quarter of
all that it costs.  `helpers/modules.py` compiles them when the program is built, for each command one file of what it
imports, in the order in which that is to be executed; here it is.  An archive is a copy, so it counts only as long as
every file that it was made from is as it was: else, and for what is imported later, the interpreter looks for itself.

The code of this module is a file beside the archives (see `helpers/crio-oci.c`); it imports only what is there already.
"""

import posix
import sys
from _frozen_importlib import ModuleSpec, _load  # type: ignore[attr-defined]  # importlib's own, here without it
from _frozen_importlib_external import ExtensionFileLoader
from marshal import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

    # name, file, the directory of a package or "", the file's st_mtime_ns and st_size
    Entry = tuple[str, str, str, int, int]


def load(path: str) -> None:
    """Import all modules of the archive at that path, or none when it is not `current`."""
    found = current(path)
    if found is None:
        return
    modules = [(entry, code) for entry, code in zip(*found, strict=True) if entry[0] not in sys.modules]
    # First all of them, still empty: a package is executed after its parts.
    python = [entry for entry, code in modules if code is not None]
    for name, path, directory, *_ in python:
        sys.modules[name] = _empty(name, path, directory)
    for name, *_ in python:
        package, _, own = name.rpartition(".")
        if package:
            setattr(sys.modules[package], own, sys.modules[name])
    for (name, path, *_), code in modules:
        if code is not None:
            exec(code, sys.modules[name].__dict__)
        else:
            _load(ModuleSpec(name, ExtensionFileLoader(name, path), origin=path))


def current(path: str) -> "tuple[Sequence[Entry], Sequence[CodeType | None]] | None":
    """What an archive has, if it is there and no file has changed since it was made; None is the code of a module in C.

    In the file: the size of the list of entries (4 bytes, little end first), the list, and the code in its order, both
    as `marshal` writes them.
    """
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb", buffering=0) as file:  # a buffer would copy all once more
        entries = loads(file.read(int.from_bytes(file.read(4), "little")))
        return None if _outdated(entries) else (entries, loads(file.read()))


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
