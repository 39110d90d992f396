"""The store itself: removing, root file systems that the kernel mounts, restarts, kills and full disks."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from crio_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StepFailed,
)
from crio_native.images import Image, ImageStore

from ..images_support import (
    BASE,
    DIR,
    TOP,
    HostileRegistry,
    assert_nothing_left,
    in_private_mounts,
    layers_of,
    load,
    made_directory,
    member,
    picture,
    reply,
    root_of,
    tar,
    write_layout,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry
from ..images_support import store as store

pytestmark = pytest.mark.root


# Removing, pinning, usage


def test_an_image_is_removed_with_the_layers_that_nobody_else_needs(store: ImageStore, tmp_path: Path) -> None:
    one, two = load(store, tmp_path, "one", BASE), load(store, tmp_path, "two", BASE, TOP)
    before = store.usage()
    store.remove("localhost/two:latest")
    assert_nothing_left(tmp_path / "store", layers=1)
    assert store.usage().bytes < before.bytes and store.usage().inodes < before.inodes
    with pytest.raises(NotFound, match=two.id):
        store.remove(two.id)
    with pytest.raises(FailedPrecondition, match=f"image {one.id} .* is in use by container c1"):
        store.remove(one.id[7:20], in_use={one.id: "container c1"})
    with pytest.raises(FailedPrecondition, match="in use"):
        store.remove(one.id, in_use=[one.id])
    store.remove(one.id)
    assert_nothing_left(tmp_path / "store")


def test_ids_are_found_by_their_beginning_only_if_it_is_long_and_theirs(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    for ref in (image.id[7:18], f"{'0' * 12}", "localhost/one:other"):
        with pytest.raises(NotFound):
            store.get(ref)
    with pytest.raises(InvalidArgument):
        store.get("Not A Name")


def test_pinned_images_are_marked(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    assert not image.pinned
    for patterns, pinned in (
        (["localhost/one:latest"], True),
        (["localhost/*"], True),
        (["*two*"], False),
        ([], False),
    ):
        store.pin(patterns)
        assert store.get(image.id).pinned == pinned


def test_usage_is_near_what_du_says(store: ImageStore, tmp_path: Path) -> None:
    data = [member(f"d{number}/f{number}", data=os.urandom(number * 1000)) for number in range(100)]
    load(store, tmp_path, "one", tar(*data))
    done = subprocess.run(["du", "-s", "-B1", tmp_path / "store/layers"], capture_output=True, text=True, check=True)
    assert abs(store.usage().bytes / int(done.stdout.split()[0]) - 1) < 0.1
    assert store.usage().mountpoint == str(tmp_path / "store")


def test_usage_looks_at_no_file(store: ImageStore, tmp_path: Path) -> None:
    load(store, tmp_path, "one", BASE, TOP)
    before = store.usage()
    (tmp_path / "store/layers").rename(tmp_path / "store/elsewhere")
    after = store.usage()
    (tmp_path / "store/elsewhere").rename(tmp_path / "store/layers")
    assert (after.bytes, after.inodes) == (before.bytes, before.inodes) and after.bytes and after.inodes


# Root file systems


def mounted(store: ImageStore, image: Image, container: Path, look: str) -> str:
    """What a shell sees in the image's root file system, really mounted."""
    overlay = root_of(store, image, container)
    (container / "root").mkdir()
    return in_private_mounts(
        """
        import os, subprocess, sys
        from crio_native.linux import syscalls
        base, lowers, upper, work, root, look = sys.argv[1:]
        os.chdir(base)
        options = f"lowerdir={lowers},upperdir={upper},workdir={work}"
        assert len(options) < 4096
        syscalls.mount("overlay", root, "overlay", 0, options)
        os.chdir(root)
        subprocess.run(["sh", "-c", look], check=True)
        """,
        *(overlay.base, ":".join(overlay.lowers), overlay.upper, overlay.work, container / "root", look),
    ).stdout


def test_the_kernel_reads_our_whiteouts(store: ImageStore, tmp_path: Path) -> None:
    lower = tar(
        *[member("./", DIR, mode=0o711, uid=5, gid=6), member("gone", data=b"1"), member("kept", data=b"1")],
        *[member("dir/hidden", data=b"1"), member("whole/x", data=b"1"), member("anew/old", data=b"1")],
    )
    upper = tar(
        *[member(".wh.gone"), member("dir/.wh..wh..opq"), member("dir/shown", data=b"2"), member(".wh.whole")],
        *[member(".wh.anew"), member("anew", DIR), member("anew/new", data=b"2")],
    )
    image = load(store, tmp_path, "one", lower, upper, tar(member("top", data=b"3")))
    seen = mounted(store, image, tmp_path / "c", "find . | sort; stat -c '%a %u %g' .; cat top")
    expected = [".", "./anew", "./anew/new", "./dir", "./dir/shown", "./kept", "./top", "711 5 6", "3"]
    assert seen.splitlines() == expected


def test_an_opaque_root_hides_all_below(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE, tar(member(".wh..wh..opq"), member("only", data=b"1")))
    assert mounted(store, image, tmp_path / "c", "find . | sort").split() == [".", "./only"]


def test_the_same_layer_may_come_twice(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", TOP, BASE, TOP)
    assert mounted(store, image, tmp_path / "c", "ls etc").split() == ["issue"]


@pytest.mark.slow
def test_127_layers_fit(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", layers_in_parallel=4)
    with contextlib.closing(store):
        image = load(store, tmp_path, "one", *[tar(member(f"f{n}")) for n in range(127)])
        assert len(mounted(store, image, tmp_path / "c", "ls").split()) == 127


def test_a_root_is_prepared_once_and_quickly(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    times = []
    for number in range(20):
        directory = tmp_path / f"c{number}"
        directory.mkdir()
        before = time.perf_counter()
        store.prepare_root(image.id, directory)
        times.append(time.perf_counter() - before)
    assert sorted(times)[10] < 0.001
    with pytest.raises(AlreadyExists, match="c0/diff exists"):
        store.prepare_root(image.id, tmp_path / "c0")
    with pytest.raises(NotFound):
        store.prepare_root("sha256:" + "0" * 64, tmp_path)
    shutil.rmtree(tmp_path / "c1/diff")
    with pytest.raises(AlreadyExists, match="c1/work exists"):
        store.prepare_root(image.id, tmp_path / "c1")
    assert not (tmp_path / "c1/diff").exists()


# Restarts


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        image = load(store, tmp_path, "one", BASE, TOP)
    with contextlib.closing(ImageStore(root)) as store:
        assert list(store.list()) == [image]
        assert (layers_of(store, image, tmp_path / "c")[1] / "bin/sh").read_bytes() == b"shell"
        with pytest.raises(FailedPrecondition, match="in use by another process"):
            ImageStore(root)
        store.remove(image.id)
    with contextlib.closing(ImageStore(root)) as store:
        assert store.list() == []


def test_what_a_crash_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        kept, damaged = load(store, tmp_path, "one", BASE), load(store, tmp_path, "two", TOP)
        lost = layers_of(store, damaged, tmp_path / "c")[0].parent
    (root / "tmp/half/fs/x").mkdir(parents=True)
    (root / "layers/strange/fs").mkdir(parents=True)
    subprocess.run(["cp", "-a", root / "layers" / lost, root / "layers/copy"], check=True)
    shutil.rmtree(root / "layers" / lost)
    with caplog.at_level(logging.WARNING), contextlib.closing(ImageStore(root)) as store:
        assert [image.id for image in store.list()] == [kept.id]
        assert_nothing_left(root, layers=1)
        assert "has lost layer" in caplog.text and "layers/strange is not usable" in caplog.text
        assert load(store, made_directory(tmp_path / "again"), "two", TOP).id == damaged.id


def test_a_damaged_database_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        load(store, tmp_path, "one", BASE)
    (root / "images.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with contextlib.closing(ImageStore(root)) as store:
        assert store.list() == []
        assert "is damaged" in caplog.text
        assert len(list(root.glob("images.db.corrupt-*"))) == 1
        load(store, made_directory(tmp_path / "again"), "one", BASE)


def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    ImageStore(root).close()
    with contextlib.closing(sqlite3.connect(root / "images.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for _ in range(2):  # the first refusal has let go of the lock
        with pytest.raises(FailedPrecondition, match="has version 99"):
            ImageStore(root)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepFailed, match=r"open the image store.*/file/store with ENOTDIR"):
        ImageStore(tmp_path / "file/store")


def test_sigkill_in_the_middle_of_a_pull_leaves_nothing(hostile: HostileRegistry, tmp_path: Path) -> None:
    root = tmp_path / "store"
    image = picture(tar(member("first", data=b"1" * 100_000), member("second", data=os.urandom(3 << 20))))
    name = hostile.serve("app", image)
    path = max((path for path in hostile.routes if "/blobs/" in path), key=lambda path: len(image.blobs[path[-71:]]))
    data, silence = image.blobs[path[-71:]], threading.Event()

    def stall(request: BaseHTTPRequestHandler) -> None:
        reply(200, data[: 1 << 20], {"Content-Length": str(len(data))})(request)
        silence.wait(20)
        request.close_connection = True

    serve, hostile.routes[path] = hostile.routes[path], stall
    script = """
        import sys
        from pathlib import Path
        from crio_native.images import ImageStore
        ImageStore(Path(sys.argv[1])).pull(sys.argv[2])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), root, name])
    try:
        assert _soon(lambda: any(root.glob("tmp/*/fs/first")))
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        unpackers = [int(pid) for file in children for pid in file.read_text().split()]
        assert len(unpackers) == 1
        (inner,) = Path(f"/proc/{unpackers[0]}/task/{unpackers[0]}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        silence.set()
    assert _soon(lambda: all(_ended(pid) for pid in (*unpackers, int(inner))))
    hostile.routes[path] = serve
    with contextlib.closing(ImageStore(root)) as store:
        assert_nothing_left(root)
        assert store.list() == []
        assert store.pull(name).names == (name,)


def _soon(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _ended(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    for name, size in (("big", 8 << 20), ("small", 1000)):
        write_layout(tmp_path / name, picture(BASE, tar(member("data", data=os.urandom(size)))))
    root = made_directory(tmp_path / "disk")
    done = in_private_mounts(
        """
        import os, subprocess, sys
        from pathlib import Path
        from crio_native.errors import ResourceExhausted
        from crio_native.images import ImageStore
        from tests.images_support import assert_nothing_left

        disk, layouts = Path(sys.argv[1]), Path(sys.argv[2])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
        store = ImageStore(disk / "store")
        for source in (f"oci:{layouts}/big", f"oci-archive:{layouts}/big.tar"):
            try:
                store.load(source)
            except ResourceExhausted as error:
                print(error)
            assert store.list() == []
            assert_nothing_left(disk / "store")
        print(store.load(f"oci:{layouts}/small")[0].names[0])
        """,
        *(root, _archived(tmp_path)),
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("no space left on the device" in line and "ENOSPC" in line for line in lines[:2])
    assert lines[2] == "localhost/small:latest"


def _archived(directory: Path) -> Path:
    subprocess.run(["tar", "-C", directory / "big", "-cf", directory / "big.tar", "."], check=True)
    return directory


def test_the_daemon_pays_for_pulling_only_when_it_pulls(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from crio_native.images import ImageStore
        ImageStore(Path(sys.argv[1]))
        heavy = ("urllib3", "ssl", "tarfile", "crio_native.images.unpacker.tree")
        print([name for name in heavy if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "store")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
