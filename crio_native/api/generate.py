"""Write the Python modules for every .proto file: ``python -m crio_native.api.generate`` in a checkout.

Needs grpcio-tools, a development dependency.  The result is committed, because whoever installs the program has no
compiler; a test regenerates and compares.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "api"
PACKAGE = "crio_native/api"


def generate(destination: Path, sources: Path = SOURCES) -> list[Path]:
    """Compile all of `sources` into packages below `destination`/crio_native/api; returns the files written.

    Raises RuntimeError when a .proto file does not compile (protoc has then said why on stderr).
    """
    # Imported here because it is not installed where the program only runs.
    from grpc_tools import protoc  # type: ignore[import-untyped]

    # protoc derives Python's import paths from the paths that it sees, so it sees the sources as part of our package.
    protos = sorted(f"{PACKAGE}/{path.relative_to(sources)}" for path in sources.rglob("*.proto"))
    well_known = files("grpc_tools") / "_proto"
    grpc = [proto for proto in protos if not proto.startswith(f"{PACKAGE}/shim/")]  # shims speak ttrpc, which is ours
    for kind, chosen in (("python", protos), ("pyi", protos), ("grpc_python", grpc)):
        command = ["protoc", f"-I{PACKAGE}={sources}", f"-I{well_known}", f"--{kind}_out={destination}", *chosen]
        if protoc.main(command) != 0:
            raise RuntimeError(f"protoc refused one of: {', '.join(chosen)}")
    written: list[Path] = []
    for directory in {(destination / proto).parent for proto in protos}:
        for package in (directory, *directory.parents[: len(directory.relative_to(destination / PACKAGE).parts) - 1]):
            (package / "__init__.py").write_text("")
        written += directory.glob("*_pb2*.py*")
    return sorted(written)


if __name__ == "__main__":
    for path in generate(SOURCES.parent):
        sys.stdout.write(f"{path.relative_to(SOURCES.parent)}\n")
