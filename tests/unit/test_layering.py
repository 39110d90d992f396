"""Which room may import which, read from the source: the architecture's one direction, held by a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "crio_native"

# A room imports rooms of lower levels only.  `oci.runtime` is not its room: the interface between them all, plain data.
LEVEL = {
    "errors": 0,
    "__version__": 0,
    "oci.runtime": 1,
    "api": 0,
    "linux": 1,
    "config": 1,
    "history": 2,
    "monitor": 2,
    "network": 3,
    "images": 3,
    "oci": 3,
    "pods": 4,
    "streaming": 5,
    "places": 5,
    "assembly": 6,
    "named_files": 5,
    "foreign_storage": 5,
    "reload": 5,
    "cri": 6,
    "repairing": 7,
    "daemon": 8,
    "wiping": 9,
    "cli": 10,
}
# What a level would allow, but the room must do without.
FORBIDDEN = {"linux": {"api", "oci.runtime"}, "config": {"api", "linux", "oci.runtime"}, "pods": {"api"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that the file imports, anywhere in it; names of ``from`` are joined on."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{full}.{alias.name}") for alias in node.names)


def room(name: str) -> str:
    """The room of a module of ours."""
    parts = name.split(".")[1:]
    return "oci.runtime" if parts[:2] == ["oci", "runtime"] else parts[0] if parts else "__version__"


def sources(below: str = "") -> list[Path]:
    found = sorted((PACKAGE / below).rglob("*.py"))
    assert found, f"nothing below {below}"
    return found


def ours(path: Path) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(path) if name.split(".")[0] == PACKAGE.name)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    mine = room(module_name(path))
    wrong = [
        f"{path}:{line}: {mine} may not import {theirs} ({name})"
        for line, name in ours(path)
        if (theirs := room(name)) != mine
        if LEVEL[theirs] >= LEVEL[mine] or theirs in FORBIDDEN.get(mine, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Neither for types only nor late, in a function: what two modules share has a place below both."""
    modules = {module_name(path): path for path in sources()}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for _, name in ours(path)}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_only_linux_calls_the_kernel_by_ctypes() -> None:
    users = [path for path in sources() if any(name.split(".")[0] == "ctypes" for _, name in imports(path))]
    assert {path.relative_to(PACKAGE).parts[0] for path in users} == {"linux"}


def test_linux_needs_the_standard_library_only() -> None:
    """The launcher loads it into every container's init; all but what talks to systemd, over D-Bus."""
    bus = PACKAGE / "linux/cgroup/systemd/bus.py"
    foreign = {name.split(".")[0] for path in sources("linux") if path != bus for _, name in imports(path)}
    assert foreign - sys.stdlib_module_names == {PACKAGE.name}


def test_crioctl_works_without_the_rest() -> None:
    """It speaks to any CRI socket, so nothing of the daemon may be in it."""
    wrong = [
        f"{path}:{line}: {name}"
        for path in [PACKAGE / "cli/crioctl.py", *sources("cli/ctl")]
        for line, name in ours(path)
        if room(name) not in ("api", "errors", "__version__") and not name.startswith(f"{PACKAGE.name}.cli.ctl")
        if name != f"{PACKAGE.name}.cli.standard_streams"
        if (path.name, name) != ("isolation.py", f"{PACKAGE.name}.cli.isolation.print_report")  # reads its own node
        if (path.name, name) != ("streams.py", f"{PACKAGE.name}.streaming.spdy")  # frames, without I/O
    ]
    assert not wrong, "\n".join(wrong)
