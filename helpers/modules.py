"""Compile the modules of crio-oci's commands into one file each (`crio_native/oci/builtin/standalone/archive.py`).

    python modules.py DIRECTORY     writes DIRECTORY.TAG/start, one for each module of commands, and loader

An interpreter without `site`, as crio-oci's is, imports a command as crio-oci does and notes what gets executed, in the
order in which that ends: so each finds there what it imports itself.
"""

import marshal
import os
import sys
from _frozen_importlib_external import PathFinder  # importlib's own, without the modules that it imports itself

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START = "crio_native.cli.oci"
COMMANDS = "crio_native.oci.builtin.standalone"
LOADER = COMMANDS + ".archive"
# The modules of commands, and what their commands import when they have begun.
MODULES = {
    "create": (f"{COMMANDS}.interpreter", "crio_native.linux.cgroup.devices", "crio_native.linux.cgroup.resources"),
    "exec": (f"{COMMANDS}.interpreter",),
    "control": (),
    "resources": (),
    "show": (),
    "checkpoint": (),
}
CIRCULAR = ("ctypes",)  # whose parts import each other, so that there is no such order


class Recorder:
    """A finder that notes what is executed, when it has been."""

    def __init__(self) -> None:
        self.executed: list[str] = []

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def noted(module: object) -> None:
                execute(module)
                self.executed.append(name)

            spec.loader.exec_module = noted
        return spec


def build(directory: str) -> None:
    """Write the archives: from a child of this process each, for a module is executed once in a process."""
    for name in ("start", *MODULES):
        if os.fork() == 0:
            if name != "start":
                __import__(START)
            write(
                f"{directory}/{name}", archive([START] if name == "start" else [*MODULES[name], f"{COMMANDS}.{name}"])
            )
            os._exit(0)
        _, status = os.wait()
        if status:
            sys.exit(f"modules.py: the archive {name!r} could not be written")
    write(f"{directory}/loader", marshal.dumps(compiled(f"{ROOT}/{LOADER.replace('.', '/')}.py")))


def archive(names: list[str]) -> bytes:
    """All modules that get executed when those are imported."""
    recorder = Recorder()
    sys.meta_path.insert(0, recorder)
    for name in names:
        __import__(name)
    sys.meta_path.remove(recorder)
    kept = [name for name in recorder.executed if name.partition(".")[0] not in CIRCULAR]
    files = [sys.modules[name].__file__ for name in kept]
    code = [compiled(path) if path.endswith(".py") else None for path in files]
    return sized(marshal.dumps([entry(name) for name in kept])) + marshal.dumps(code)


def sized(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def entry(name: str) -> tuple[object, ...]:
    """What `archive` says an entry is."""
    module = sys.modules[name]
    found = os.stat(module.__file__)
    return name, module.__file__, getattr(module, "__path__", [""])[0], found.st_mtime_ns, found.st_size


def compiled(path: str) -> object:
    """Without docstrings, which nobody reads there."""
    import ast  # and not before: it imports much that a command may have to

    with open(path, "rb") as file:
        tree = ast.parse(file.read(), path)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.copy_location(ast.Pass(), node.body[0])]
    return compile(tree, path, "exec", dont_inherit=True)


def write(path: str, content: bytes) -> None:
    """As a whole, by rename."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(content)
    os.rename(temporary, path)


def is_built(directory: str) -> bool:
    """Whether there is nothing to do, which takes a tenth of the time."""
    from crio_native.oci.builtin.standalone.archive import current

    files = [f"{directory}/{name}" for name in ("start", *MODULES, "loader")]
    newer = os.stat(__file__).st_mtime_ns
    try:
        return all(os.stat(file).st_mtime_ns > newer for file in files) and None not in map(current, files[:-1])
    except OSError:
        return False


def main() -> None:
    directory = f"{sys.argv[1]}.{sys.implementation.cache_tag}"
    if sys.flags.no_site:
        sys.path += sys.argv[2:]
        os.makedirs(directory, exist_ok=True)
        build(directory)
    elif not is_built(directory):
        from where import packages

        # Without the columns of each instruction, a third of the code.
        line = [sys.executable, "-I", "-S", "-X", "no_debug_ranges", __file__, sys.argv[1], *packages()]
        os.execv(os.path.realpath(sys.executable), line)


main()
