"""The demonstration's parts: the image against skopeo, the summary against processes that we know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crio_native.cli import busybox, isolation
from crio_native.cli.scratch import mounts_below
from crio_native.errors import NotFound


def test_skopeo_reads_the_layout(tmp_path: Path) -> None:
    reference = busybox.build_layout(tmp_path / "layout", "demo")
    copied = tmp_path / "copy"
    subprocess.run(["skopeo", "copy", "--quiet", reference, f"dir:{copied}"], check=True)
    manifest = json.loads((copied / "manifest.json").read_text())
    layer = copied / manifest["layers"][0]["digest"].removeprefix("sha256:")
    names = subprocess.run(["tar", "tzf", layer], check=True, capture_output=True, text=True).stdout.split()
    assert {"bin/busybox", "bin/sh", "etc/passwd", "tmp/"} <= set(names)


def test_the_same_program_gives_the_same_image(tmp_path: Path) -> None:
    for name in ("one", "two"):
        busybox.build_layout(tmp_path / name, "demo")
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()


@pytest.mark.root
def test_the_summary_tells_an_isolated_process_from_a_free_one() -> None:
    words = [
        "unshare",
        "--pid",
        "--fork",
        "--uts",
        "setpriv",
        "--no-new-privs",
        "--bounding-set=-all,+kill",
        "sleep",
        "100",
    ]
    with subprocess.Popen(words) as unshare:
        try:
            child = _last_descendant(unshare.pid, "sleep")
            isolated, free = isolation.describe(child), isolation.describe(os.getpid())
        finally:
            unshare.kill()
            subprocess.run(["kill", "-9", str(child)], check=False)
    assert isolated["namespaces"].split() == ["pid", "uts"]
    assert "net" in isolated["  the host's"].split()
    assert (isolated["no_new_privs"], isolated["  can ever gain"]) == ("yes", "kill")
    assert free["namespaces"] == "none of its own"


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NotFound):
        isolation.describe(2**22 + 1)


@pytest.mark.root
def test_mounts_are_found_by_their_real_names(tmp_path: Path) -> None:
    """The kernel writes a space as an octal escape."""
    inside = tmp_path / "a name" / "ünder"
    inside.mkdir(parents=True)
    program = f"from crio_native.cli.scratch import mounts_below; print(mounts_below({str(tmp_path)!r}))"
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$1" -c "$2"']
    answer = subprocess.run(
        [*words, inside, sys.executable, program], check=True, capture_output=True, text=True
    ).stdout
    assert answer.strip() == repr([str(inside)])
    assert mounts_below(tmp_path) == []


def _last_descendant(pid: int, name: str) -> int:
    for _ in range(500):
        listing = subprocess.run(["ps", "-eo", "pid,ppid,comm"], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listing.splitlines()[1:]]
        for row in rows:
            if row[2] == name and row[1] == str(pid):
                return int(row[0])
    raise AssertionError(f"no {name} below {pid}")
