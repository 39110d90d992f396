"""Root file systems: options of the storage driver, additional stores, and images that go while somebody comes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import textwrap
import threading
import time
from pathlib import Path

import pytest

from crio_native.config import Config
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, NotFound, StepFailed, Unimplemented
from crio_native.images import Image, ImageStore, roots, upkeep
from crio_native.linux.mounts import MS_NODEV
from crio_native.oci.runtime import Overlay

from ..images_support import (
    BASE,
    DIR,
    TOP,
    in_private_mounts,
    load,
    made_directory,
    member,
    picture,
    root_of,
    tar,
    write_layout,
)
from ..images_support import store as store

pytestmark = pytest.mark.root


def seen_in(overlay: Overlay, root: Path, look: str) -> str:
    """What a shell sees in a root file system that is really mounted."""
    return in_private_mounts(
        """
        import os, subprocess, sys
        from crio_native.linux import syscalls
        base, flags, data, root, look = sys.argv[1:]
        os.chdir(base)
        assert len(data) < 4096
        syscalls.mount("overlay", root, "overlay", int(flags), data)
        os.chdir(root)
        subprocess.run(["sh", "-c", look], check=True)
        """,
        *(overlay.base, overlay.flags, overlay.data(), made_directory(root), look),
    ).stdout


# Options


def test_options_are_read_as_containers_storage_spells_them(tmp_path: Path) -> None:
    given = [
        "overlay.mountopt=nodev,metacopy=on,volatile",
        "overlay.size=10G",
        "inodes=5000",
        f"overlay.imagestore={tmp_path}",
    ]
    found = roots.parse("overlay", given)
    assert found == roots.Options(
        data=("metacopy=on", "volatile"), flags=MS_NODEV, size=10 << 30, inodes=5000, stores=(tmp_path,)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("overlay.mountopt=lowerdir=/etc", "lowerdir"),
        ("overlay.mountopt=metacopy=on,context=x", "context=x"),
        ("overlay.size=much", "must be a size"),
        ("overlay.inodes=-1", "must be a number"),
        ("overlay.imagestore=here", "absolute path of a directory"),
        ("overlay.imagestore=/no/such/place", "absolute path of a directory"),
        ("overlay.ignore_chown_errors=true", "no option of the overlay driver"),
        ("overlay.mount_program=fuse-overlayfs", "absolute path of a program"),
        ("overlay.size", "NAME=VALUE"),
    ],
)
def test_an_option_without_effect_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        roots.parse("overlay", ["overlay.size=1G", text])
    assert "crio.storage_option[1]" in str(caught.value)


def test_mount_options_reach_the_kernel(tmp_path: Path) -> None:
    options = roots.parse("overlay", ["overlay.mountopt=nodev,metacopy=on,volatile"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        image = load(store, tmp_path, "one", BASE)
        overlay = root_of(store, image, tmp_path / "c")
        line = seen_in(overlay, tmp_path / "root", 'grep " $PWD " /proc/self/mounts')
    words = set(line.split()[3].split(","))
    assert {"nodev", "metacopy=on"} <= words and words & {"volatile", "fsync=volatile"}  # newer kernels name it so


def test_a_quota_where_there_are_none_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    options = roots.parse("overlay", ["overlay.size=10M"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        image = load(store, tmp_path, "one", BASE)
        with pytest.raises(FailedPrecondition, match="project quotas"):
            store.prepare_root(image.id, made_directory(tmp_path / "c"))
        assert list((tmp_path / "c").iterdir()) == []


def test_the_pause_image_is_pinned_with_what_the_operator_names() -> None:
    config = Config()
    assert config.image.pause_image in roots.pinned(config)


# Images that go while somebody comes


def test_a_container_that_is_being_made_keeps_its_image(store: ImageStore, tmp_path: Path) -> None:
    """It is recorded, then asks for its layers; in between, and at the same time, somebody removes the image."""
    image = load(store, tmp_path, "one", BASE, TOP)
    recorded: set[str] = set()
    with pytest.raises(FailedPrecondition, match="in use"):
        store.remove(image.id, in_use=lambda: recorded | {image.id})
    kept = gone = 0
    for number in range(60):
        image = load(store, made_directory(tmp_path / f"again{number}"), "one", BASE, TOP)
        recorded.clear()
        answers: list[object] = []
        threads = [
            threading.Thread(target=remove, args=(store, image, recorded, answers)),
            threading.Thread(target=create, args=(store, image, recorded, tmp_path / f"c{number}", answers)),
        ]
        for thread in threads[:: 1 if number % 2 else -1]:
            thread.start()
            time.sleep(number % 3 / 500)  # at once, or one of them well ahead
        for thread in threads:
            thread.join()
        made = [answer for answer in answers if isinstance(answer, Overlay)]
        if made:
            kept += 1
            assert all((Path(made[0].base) / lower).is_dir() for lower in made[0].lowers)
            assert any(isinstance(answer, FailedPrecondition) for answer in answers)
            assert store.get(image.id)
        else:
            gone += 1
            assert any(isinstance(answer, NotFound) for answer in answers)
            assert store.list() == []
    assert kept and gone  # both happened


def remove(store: ImageStore, image: Image, recorded: set[str], answers: list[object]) -> None:
    try:
        store.remove(image.id, in_use=lambda: set(recorded))
    except CrioError as error:
        answers.append(error)


def create(store: ImageStore, image: Image, recorded: set[str], directory: Path, answers: list[object]) -> None:
    directory.mkdir()
    recorded.add(image.id)
    try:
        answers.append(store.prepare_root(image.id, directory))
    except NotFound as error:
        recorded.discard(image.id)
        answers.append(error)


def test_removing_beside_pulls_of_the_same_layers_loses_none(store: ImageStore, tmp_path: Path) -> None:
    """Every image that is there at any moment is whole; what nobody needs is gone in the end."""
    layouts = [write_layout(tmp_path / f"i{n}", picture(BASE, TOP, tar(member(f"own{n}")))) for n in range(3)]
    stop, problems = threading.Event(), list[str]()

    def come_and_go(layout: Path) -> None:
        while not stop.is_set():
            (image,) = store.load(f"oci:{layout}")
            overlay = store.view(image.id)
            problems.extend(lower for lower in overlay.lowers if not (Path(overlay.base) / lower).is_dir())
            store.remove(image.id)

    threads = [threading.Thread(target=come_and_go, args=(layout,)) for layout in layouts]
    for thread in threads:
        thread.start()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == [] and store.list() == []
    assert [path.name for path in (tmp_path / "store/layers").iterdir()] == ["empty"]


# Other drivers


def test_copied_layers_are_what_the_kernel_shows(tmp_path: Path) -> None:
    lower = tar(
        *[member("./", DIR, mode=0o711, uid=5, gid=6), member("gone", data=b"1"), member("kept", data=b"1", uid=7)],
        *[member("dir/hidden", data=b"1"), member("whole/x/y", data=b"1"), member("file", data=b"1")],
        *[member("become", DIR), member("become/old", data=b"1"), member("link", b"2", linkname="../outside")],
        *[member("setuid", data=b"1", mode=0o4755, mtime=77), member("pipe", b"6"), member("tty", b"3", devmajor=5)],
    )
    upper = tar(
        *[member(".wh.gone"), member("dir/.wh..wh..opq"), member("dir/shown", data=b"2"), member(".wh.whole")],
        *[member("become", data=b"2"), member("file/is/dir", data=b"2")],
        *[member("dir", DIR, mode=0o1777, mtime=99), member("d/e/f/.wh.nothing")],
    )
    with contextlib.closing(ImageStore(tmp_path / "store")) as store:
        image = load(store, tmp_path, "one", lower, upper)
        overlay = store.prepare_root(image.id, made_directory(tmp_path / "c"))
        assert overlay
    with contextlib.closing(ImageStore(tmp_path / "store", options=roots.parse("vfs", []))) as store:
        assert store.prepare_root(image.id, made_directory(tmp_path / "copied")) is None
    look = "find . | sort | xargs stat -c '%n %F %a %u %g %s %t %T' | sed '/directory/s/ [0-9]* 0 0$//'; cat dir/shown"
    shown = seen_in(overlay, tmp_path / "root", look)
    copied = subprocess.run(
        ["sh", "-c", look], cwd=tmp_path / "copied/rootfs", capture_output=True, text=True, check=True
    )
    assert copied.stdout == shown and "./file/is/dir" in shown


def test_a_file_of_holes_is_copied_as_holes(tmp_path: Path) -> None:
    """Else a few kilobytes of an image could fill the disk, once a container."""
    begin = b"2\n1048576\n5\n4294967296\n4\n".ljust(512, b"\0")
    numbers = {"major": "1", "minor": "0", "name": "big", "realsize": str(5 << 30)}
    headers = {f"GNU.sparse.{name}": value for name, value in numbers.items()}
    layer = tar(member("big", data=begin + b"firstlast", pax_headers=headers), member("plain", data=b"x" * 100_000))
    with contextlib.closing(ImageStore(tmp_path / "store", options=roots.parse("vfs", []))) as store:
        image = load(store, tmp_path, "one", layer)
        store.prepare_root(image.id, made_directory(tmp_path / "c"))
    copied = tmp_path / "c/rootfs/big"
    assert copied.stat().st_size == 5 << 30
    assert copied.stat().st_blocks * 512 < 1 << 20
    with copied.open("rb") as file:
        assert [(file.seek(at), file.read(6))[1] for at in (1 << 20, 4 << 30)] == [b"first\0", b"last\0\0"]
    assert (tmp_path / "c/rootfs/plain").read_bytes() == b"x" * 100_000


@pytest.mark.parametrize("program", ["/bin/false", "/bin/true"])
def test_a_program_that_does_not_mount_is_told_and_leaves_nothing(tmp_path: Path, program: str) -> None:
    options = roots.parse("overlay", [f"overlay.mount_program={program}"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        image = load(store, tmp_path, "one", BASE)
        (made_directory(tmp_path / "c") / "rootfs").mkdir()
        with pytest.raises(StepFailed, match=f"{program}: status"):
            store.prepare_root(image.id, tmp_path / "c")
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["rootfs"]


# Many layers


def test_a_root_of_100_layers(tmp_path: Path) -> None:
    with contextlib.closing(ImageStore(tmp_path / "store", layers_in_parallel=4)) as store:
        image = load(store, tmp_path, "one", *[tar(member(f"f{n}")) for n in range(100)])
        overlay = root_of(store, image, tmp_path / "c")
        assert len(seen_in(overlay, tmp_path / "root", "ls").split()) == 100


# Additional stores


def test_a_store_of_ours_is_used_where_it_is(tmp_path: Path) -> None:
    lower = tar(member("./", DIR, mode=0o711, uid=5, gid=6), member("etc/motd", data=b"old"))
    with contextlib.closing(ImageStore(tmp_path / "baked")) as baked:
        image = load(baked, tmp_path, "one", lower, TOP)
        load(baked, tmp_path, "single", BASE)
    before = sorted((path, path.lstat().st_mtime_ns) for path in (tmp_path / "baked").rglob("*"))
    options = roots.parse("overlay", [f"overlay.imagestore={tmp_path / 'baked'}"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        found = store.get("localhost/one:latest")
        assert (found.id, found.layers, found.size) == (image.id, image.layers, image.size) and found.pinned
        overlay = root_of(store, found, tmp_path / "c")
        assert seen_in(overlay, tmp_path / "root", "ls etc; stat -c '%a %u %g' .").split() == "issue 711 5 6".split()
        single = store.view(store.get("localhost/single:latest").id)
        assert seen_in(single, tmp_path / "view", "cat etc/motd") == "old"
        with pytest.raises(FailedPrecondition, match="additional store"):
            store.remove(found.id)
        with pytest.raises(Unimplemented, match="additional store"):
            store.save(found.id, f"oci:{tmp_path / 'saved'}")
        assert store.usage().bytes == 0
        mine = load(store, made_directory(tmp_path / "mine"), "one", lower, TOP)  # the node's own comes first
        assert mine.id == image.id and not store.get(image.id).pinned
        store.remove(image.id)
        assert store.get(image.id).pinned
    assert before == sorted((path, path.lstat().st_mtime_ns) for path in (tmp_path / "baked").rglob("*"))


def test_an_image_that_is_here_too_keeps_its_names_in_an_additional_store(tmp_path: Path) -> None:
    with contextlib.closing(ImageStore(tmp_path / "baked")) as baked:
        load(baked, tmp_path, "one", BASE, TOP)
        load(baked, tmp_path, "two", BASE)
    options = roots.parse("overlay", [f"overlay.imagestore={tmp_path / 'baked'}"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        mine = load(store, made_directory(tmp_path / "mine"), "other", BASE, TOP)
        both = {"localhost/other:latest", "localhost/one:latest"}
        assert set(store.get("localhost/one:latest").names) == both == set(store.get(mine.id).names)
        load(store, made_directory(tmp_path / "taken"), "one", TOP)  # the name is another image's now
        assert store.get(mine.id).names == ("localhost/other:latest",)
        assert store.get("localhost/one:latest").id != mine.id
        for layer in (store.layers.base / layer.lower for layer in store.layers.all()):
            (layer / "more").write_bytes(b"damage")
        damage, left = upkeep.repair(store)
        assert len(damage) == 2 and left == []
        assert [image.names for image in store.list() if image.id == mine.id] == [("localhost/one:latest",)]


def test_a_storage_of_podman_and_skopeo_is_used_where_it_is(tmp_path: Path) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    lower = tar(member("etc/motd", data=b"old"), member("keep", data=b"1"))
    layout = write_layout(tmp_path / "layout", picture(lower, TOP))
    storage = tmp_path / "storage"
    target = f"containers-storage:[overlay@{storage}/root+{storage}/run]localhost/app:v1"
    in_private_mounts(
        "import sys; from tests.images_support import skopeo; skopeo('copy', '--quiet', *sys.argv[1:])",
        *(f"oci:{layout}:latest", target),
    )
    options = roots.parse("overlay", [f"overlay.imagestore={storage}/root"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        image = store.get("localhost/app:v1")
        overlay = root_of(store, image, tmp_path / "c")
        assert seen_in(overlay, tmp_path / "root", "find . -type f | sort").split() == ["./etc/issue", "./keep"]
        assert image.config["config"]["Cmd"] == ["/bin/true"] and image.pinned


def test_an_additional_store_that_is_damaged_costs_only_its_own_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(ImageStore(tmp_path / "baked")) as baked:
        load(baked, tmp_path, "one", BASE)
        lost = load(baked, tmp_path, "two", TOP)
        lower = baked.view(lost.id).lowers[0]
    shutil.rmtree(tmp_path / "baked/layers" / os.path.dirname(lower))
    made_directory(tmp_path / "nothing")
    made_directory(tmp_path / "broken")
    (tmp_path / "broken/images.db").write_bytes(b"no database " * 1000)
    places = ":".join(str(tmp_path / name) for name in ("nothing", "broken", "baked"))
    options = roots.parse("overlay", [f"overlay.imagestore={places}"])
    with contextlib.closing(ImageStore(tmp_path / "store", options=options)) as store:
        assert [image.names for image in store.list()] == [("localhost/one:latest",)]
    for words in ("nothing cannot be used", "broken cannot be used", "has lost layer"):
        assert words in caplog.text


HUNG = """
    import logging, os, sys, time
    from pathlib import Path
    from crio_native.errors import CrioError
    from crio_native.images import ImageStore, additional, roots
    from crio_native.linux import syscalls
    from tests.images_support import BASE, TOP, load, made_directory
    place = Path(sys.argv[1])
    def hang(directory):
        # A FUSE file system whose server never says a word, as a network's whose host has gone.
        fd = os.open("/dev/fuse", os.O_RDWR)
        syscalls.mount("none", str(directory), "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
        return fd
    def timed(what):
        began = time.monotonic()
        answer = what()
        assert time.monotonic() - began < 20  # what hangs does so for ever
        return answer
    logging.basicConfig()
    """


def test_an_additional_store_that_hangs_does_not_hold_the_start_up(tmp_path: Path) -> None:
    done = in_private_mounts(
        textwrap.dedent(HUNG)
        + textwrap.dedent(
            """
            with_images = made_directory(place / "baked")
            baked = ImageStore(with_images)
            image = load(baked, place, "one", BASE)
            baked.close()
            made_directory(place / "hung")
            server = hang(place / "hung")
            additional.PATIENCE = roots._LOOK_SECONDS = 0.2
            options = roots.parse("overlay", [f"imagestore={place}/hung:{with_images}"])
            store = timed(lambda: ImageStore(place / "store", options=options))
            assert [found.id for found in store.list()] == [image.id]
            os.close(server)
            os._exit(0)  # a thread of ours may still hang
            """
        ),
        tmp_path,
    )
    assert f"{tmp_path}/hung did not answer within 0.2 s" in done.stderr


def test_an_additional_store_that_goes_does_not_hold_lists_up(tmp_path: Path) -> None:
    """Its server goes while its images are in use; the node's own images work all the time."""
    in_private_mounts(
        textwrap.dedent(HUNG)
        + textwrap.dedent(
            """
            baked = ImageStore(made_directory(place / "baked"))
            theirs = load(baked, place, "theirs", BASE)
            baked.close()
            store = ImageStore(place / "store", options=roots.parse("overlay", [f"imagestore={place}/baked"]))
            server = hang(place / "baked")
            assert [found.id for found in timed(store.list)] == [theirs.id]
            assert timed(lambda: store.get("localhost/theirs:latest")).pinned
            timed(store.usage)
            timed(lambda: store.prepare_root(theirs.id, made_directory(place / "container")))  # the mount will wait
            mine = timed(lambda: load(store, made_directory(place / "mine"), "mine", TOP))
            timed(lambda: store.prepare_root(mine.id, made_directory(place / "other")))
            timed(lambda: store.remove(mine.id))
            assert len(timed(store.list)) == 1
            os.close(server)
            store.close()
            """
        ),
        tmp_path,
    )


# Snapshots


@pytest.fixture
def btrfs_disk(tmp_path: Path) -> Path:
    if "btrfs" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no btrfs")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", disk], check=True, capture_output=True)
    return disk


def on_btrfs(disk: Path, script: str) -> str:
    """Run with `place`, the only directory of a btrfs, and `store`, which has the image `image` of three layers."""
    start = """
        import contextlib, errno, os, subprocess, sys, threading
        from pathlib import Path
        from crio_native.errors import CrioError, FailedPrecondition
        from crio_native.images import ImageStore, roots
        from crio_native.linux import btrfs
        from tests.images_support import BASE, TOP, load, made_directory, member, tar
        place = made_directory(Path(sys.argv[1]).parent / "btrfs")
        subprocess.run(["mount", "-o", "loop", sys.argv[1], place], check=True)
        def opened(*options):
            return ImageStore(place / "store", options=roots.parse("btrfs", options))
        def subvolumes():
            listed = subprocess.run(["btrfs", "subvolume", "list", place], check=True, capture_output=True, text=True)
            return sorted(line.split()[-1] for line in listed.stdout.splitlines())
        big = tar(member("big", data=os.urandom(20 << 20), mtime=99), member("./", b"5", mode=0o711, uid=5, gid=6))
        store = opened()
        image = load(store, Path(sys.argv[1]).parent, "one", BASE, TOP, big)
        whole = "store/wholes/" + image.id.removeprefix("sha256:")
        """
    return in_private_mounts(textwrap.dedent(start) + textwrap.dedent(script), disk).stdout


def test_snapshots_share_and_go_with_their_container(btrfs_disk: Path) -> None:
    on_btrfs(
        btrfs_disk,
        """
        before = os.statvfs(place).f_bavail
        containers = [made_directory(place / f"c{n}") for n in range(3)]
        (containers[0] / "rootfs").mkdir()  # as pods/ makes it
        threads = [threading.Thread(target=store.prepare_root, args=(image.id, c)) for c in containers]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert subvolumes() == ["c0/rootfs", "c1/rootfs", "c2/rootfs", whole]
        os.sync()
        taken = (before - os.statvfs(place).f_bavail) * os.statvfs(place).f_frsize
        assert taken < 15 << 20, taken  # of four times 20 MiB
        root = containers[0] / "rootfs"
        assert sorted(os.listdir(root)) == ["big", "bin", "etc"] and os.listdir(root / "etc") == ["issue"]
        assert os.stat(root / "big").st_mtime == 99
        assert (oct(os.stat(root).st_mode), os.stat(root).st_uid, os.stat(root).st_gid) == ("0o40711", 5, 6)
        (root / "big").unlink()
        assert (containers[1] / "rootfs/big").stat().st_size == 20 << 20
        with contextlib.suppress(CrioError):
            store.prepare_root(image.id, containers[0])
            raise AssertionError("prepared twice")

        # What a hostile container makes below its root goes with it: subvolumes in subvolumes, read-only ones, too.
        (root / "q").mkdir()
        for name in ("q/one", "q/one/two", "three", *(f"q/one/two/{n}" for n in range(150))):
            btrfs.create(str(root / name))
        for name in ("q/one/two", "three"):
            subprocess.run(["btrfs", "property", "set", root / name, "ro", "true"], check=True)
        for container in containers:
            roots.release(container)
            assert os.listdir(container) == []
        assert subvolumes() == [whole]
        store.remove(image.id)
        assert subvolumes() == [] and os.listdir(place / "store/tmp") == []
        """,
    )


def test_snapshots_have_bounds_where_quotas_are_on(btrfs_disk: Path) -> None:
    on_btrfs(
        btrfs_disk,
        """
        store.close()
        store = opened("btrfs.size=2m")
        container = made_directory(place / "c")
        try:
            store.prepare_root(image.id, container)
        except FailedPrecondition as error:
            assert "btrfs quota enable" in str(error)
        else:
            raise AssertionError("no bound, and no error")
        assert os.listdir(container) == []
        subprocess.run(["btrfs", "quota", "enable", place], check=True)
        store.prepare_root(image.id, container)
        try:
            with open(container / "rootfs/more", "wb") as file:
                for _ in range(100):
                    file.write(bytes(1 << 16))
                    file.flush()
        except OSError as error:
            assert error.errno == errno.EDQUOT
        else:
            raise AssertionError("more than its bound")
        roots.release(container)
        assert subvolumes() == [whole]
        """,
    )


def test_a_start_removes_snapshots_of_images_that_are_gone(btrfs_disk: Path) -> None:
    on_btrfs(
        btrfs_disk,
        """
        store.prepare_root(image.id, made_directory(place / "c"))
        btrfs.create(str(place / "store/wholes/of-another-image"))
        btrfs.create(str(made_directory(place / "store/tmp/left") / "whole"))  # a crash while one was made
        store.close()
        store = opened()
        assert subvolumes() == ["c/rootfs", whole]
        store.close()
        ImageStore(place / "store").close()  # with another driver
        assert subvolumes() == ["c/rootfs"]
        """,
    )


def test_the_btrfs_driver_is_refused_elsewhere(tmp_path: Path) -> None:
    options = roots.parse("btrfs", [])
    with pytest.raises(FailedPrecondition, match=r'"btrfs" needs .* to be on btrfs, and it is not'):
        ImageStore(tmp_path / "store", options=options)
    with contextlib.closing(ImageStore(tmp_path / "store")):
        pass  # what the failed start had locked is free
    with pytest.raises(InvalidArgument, match="no option of the btrfs driver"):
        roots.parse("btrfs", ["btrfs.inodes=5"])
