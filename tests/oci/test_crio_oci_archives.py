"""crio-oci's modules come from the archives that were built, as long as these are what the files say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.linux import process

from .command_line import Oci, oci

__all__ = ["oci"]
pytestmark = pytest.mark.root
CHECKOUT = Path(__file__).parents[2]
INTERPRETER = os.path.realpath(sys.executable)
BOOT = """
import sys, marshal
sys.path += {packages!r}
archives = {archives!r}
with open(archives + '/loader', 'rb') as file:
    exec(marshal.loads(file.read()))
load(archives + '/start')
from crio_native.cli.oci import main
main(-1, archives)
"""


class Copy:
    """A checkout of its own, built: its modules may be changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("crio_native", "helpers"):
            shutil.copytree(CHECKOUT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.program = directory / "build/crio-oci"
        self.archives = directory / f"build/modules.{sys.implementation.cache_tag}"
        self.make()

    def make(self) -> None:
        line = ["make", "-C", f"{self.directory}/helpers", f"PYTHON={sys.executable}", "crio-oci", "modules"]
        subprocess.run(line, check=True, capture_output=True, timeout=60)

    def file(self, module: str) -> Path:
        return self.directory / f"crio_native/{module}.py"

    def imported(self, *words: str | Path) -> list[str]:
        """The modules that a command looks for itself, by `-X importtime`."""
        code = BOOT.format(packages=[str(self.directory), *map(str, sys.path[1:])], archives=str(self.archives))
        program = process.unwritable_executable(INTERPRETER)
        line = [INTERPRETER, "-I", "-S", "-X", "importtime", "-c", code, *map(str, words)]
        with tempfile.TemporaryFile("w+") as output:  # a pipe would be kept open by the container
            done = subprocess.run(
                line,
                executable=f"/proc/self/fd/{program}",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[program],
                timeout=30,
            )
            os.close(program)
            output.seek(0)
            said = output.read()
        assert done.returncode == 0, said
        return [line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    directory = tmp_path_factory.mktemp("checkout")
    yield Copy(directory)
    shutil.rmtree(directory)


def test_commands_find_all_their_own_modules_in_an_archive(oci: Oci, copy: Copy) -> None:
    root = ("--root", oci.state)
    bundle = ("--bundle", oci.bundle("sleep", "1000"))
    commands = (
        ("create", *bundle, "c"),
        ("start", "c"),
        ("state", "c"),
        ("exec", "c", "true"),
        ("kill", "c", "KILL"),
        ("delete", "--force", "c"),
        ("run", "--bundle", oci.bundle("true"), "d"),
        ("list",),
    )
    for words in commands:
        found = copy.imported(*root, *words)
        assert "encodings" in found  # what is imported is seen
        # Of a container without hooks or a filter, nothing else.
        assert [name for name in found if name.startswith("crio_native")] == [], words


@pytest.mark.parametrize("module", ["cli/oci", "oci/builtin/standalone/show", "linux/cgroup/files"])
def test_a_changed_file_counts_and_not_its_copy(oci: Oci, copy: Copy, module: str) -> None:
    changed = copy.file(module)
    was, times = changed.read_text(), changed.stat()
    changed.write_text(was + "\nimport sys\nsys.stdout.write('changed ')\n")
    assert listed(oci, copy).startswith("changed ID")
    changed.write_text(was)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert listed(oci, copy).startswith("ID")


def listed(oci: Oci, copy: Copy) -> str:
    line = [str(copy.program), "--root", str(oci.state), "list"]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=30).stdout


def test_a_file_that_is_gone_is_missed_and_not_taken_from_the_archive(copy: Copy) -> None:
    gone = copy.file("oci/builtin/standalone/show")
    aside = gone.rename(gone.with_suffix(".aside"))
    done = subprocess.run([copy.program, "list"], capture_output=True, text=True)
    aside.rename(gone)
    assert done.returncode == 1 and "show" in done.stderr


@pytest.mark.parametrize("archive", ["loader", "start", "show"])
def test_without_an_archive_the_modules_are_imported(oci: Oci, copy: Copy, archive: str) -> None:
    path = copy.archives / archive
    aside = path.rename(path.with_suffix(".aside"))
    said = listed(oci, copy)
    aside.rename(path)
    assert said.startswith("ID")
