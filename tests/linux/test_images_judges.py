"""Other programs look at the same images: umoci finds the files that a container sees, skopeo what the store says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from crio_native.images import ImageStore

from ..images_support import (
    BASE,
    DIR,
    TOP,
    Registry,
    in_private_mounts,
    made_directory,
    member,
    picture,
    registry,
    skopeo,
    tar,
    tree,
    write_layout,
)
from ..images_support import store as store

__all__ = ["registry"]

pytestmark = pytest.mark.root

# struct vfs_ns_cap_data, version 2: CAP_NET_RAW permitted and effective
CAPABLE = (0x02000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)


def with_attributes(name: str, attributes: dict[str, bytes], **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    pax = {f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in attributes.items()}
    return member(name, data=b"data", pax_headers=pax, **fields)


def of_gnu_tar(directory: Path, *options: str) -> bytes:
    """A real tree as a real archiver writes it: long names, holes, hard links, attributes."""
    made_directory(directory)
    for name in ("usr", "usr/share", "usr/share/" + "long" * 40):
        made_directory(directory / name)
    for holes in (3, 100):
        with (directory / f"usr/with-{holes}-holes").open("wb") as file:
            for number in range(1, holes + 1):
                file.seek(number << 16)
                file.write(b"data" * number)
            file.truncate(holes + 1 << 16)
    with (directory / "usr/hole").open("wb") as file:
        file.truncate(1 << 20)
    (directory / "usr/share" / ("long" * 40) / "ünï-\udcff").write_bytes(b"a name that is not UTF-8")
    (directory / "usr/empty").touch()
    os.link(directory / "usr/empty", directory / "usr/link")
    os.symlink("/" + "far/" * 200, directory / "usr/symlink")
    os.chown(directory / "usr/symlink", 70_000, 2_000_000, follow_symlinks=False)
    os.setxattr(directory / "usr/empty", "user.note", b"of the file")
    os.setxattr(directory / "usr/share", "user.note", bytes(range(1, 256)))
    os.chmod(directory / "usr/share", 0o3777)
    command = ["tar", "-C", str(directory), *options, "-c", "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


LOWER = tar(
    *[member("./", DIR, mode=0o711, uid=5, gid=6, mtime=1000), member("bin", DIR), member("etc", DIR, mtime=3)],
    *[member("bin/su", data=b"1", mode=0o4755), member("bin/wall", data=b"2", mode=0o2755, gid=5, mtime=1.5)],
    *[with_attributes("bin/ping", {"security.capability": CAPABLE}, mode=0o755)],
    *[with_attributes("etc/noted", {"user.a": b"1", "user.b": b"\0\xff"}, uid=12)],
    *[member("etc/old", data=b"old"), member("etc/gone", data=b"gone"), member("etc/dir/inside", data=b"x")],
    *[member("dev", DIR), member("dev/pipe", b"6", mode=0o600), member("dev/null", b"3", devmajor=1, devminor=3)],
    *[member("dev/disk", b"4", devmajor=7, devminor=99, mode=0o660, gid=6)],
    *[member("one", data=b"linked"), member("two", b"1", linkname="one"), member("lib", b"2", linkname="usr/lib")],
    *[member("usr/lib/a", data=b"a"), member("become-file/x", data=b"x"), member("become-dir", data=b"x")],
    *[member("usr/lib", DIR, mtime=4), member("whole/a/b", data=b"b"), member("opaque/a"), member("opaque/sub/a")],
)
# With the directories on the way to what is changed, as archivers write them: what a layer does not say of a directory
# is nothing that a store of single layers could know.
UPPER = tar(
    *[member("./", DIR, mode=0o755, uid=1, gid=2, mtime=5), member("etc", DIR, mode=0o700, uid=3, mtime=77)],
    *[member("etc/.wh.gone"), member("etc/.wh.dir"), member("etc/old", data=b"new", mode=0o600, uid=9)],
    *[member(".wh.whole"), member("opaque", DIR, mtime=8), member("opaque/.wh..wh..opq"), member("opaque/b")],
    *[member("become-file", data=b"now"), member("become-dir", DIR, mode=0o1777, mtime=9), member("become-dir/x")],
    *[member("usr", DIR, mtime=10), member("usr/linked", data=b"b"), member("three", b"1", linkname="usr/linked")],
)


def seen_by_a_container(store: ImageStore, name: str, root: Path) -> dict[str, tuple[Any, ...]]:
    overlay = store.prepare_root(name, made_directory(root.with_suffix(".container")))
    assert overlay
    script = """
        import os, pickle, sys
        from pathlib import Path
        from crio_native.linux import syscalls
        from tests.images_support import tree
        base, data, root, target = sys.argv[1:]
        os.chdir(base)
        syscalls.mount("overlay", root, "overlay", 0, data)
        Path(target).write_bytes(pickle.dumps(tree(Path(root))))
        """
    in_private_mounts(script, overlay.base, overlay.data(), made_directory(root), root.with_suffix(".found"))
    found: dict[str, tuple[Any, ...]] = pickle.loads(root.with_suffix(".found").read_bytes())
    return found


PAX = ("--format=pax", "--xattrs", "--xattrs-include=*")


@pytest.mark.parametrize("options", [(), PAX, (*PAX, "--sparse")], ids=" ".join)
def test_umoci_unpacks_the_files_that_a_container_sees(
    store: ImageStore, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """options: of GNU tar; without any, what its layers are is made by hand."""
    if not shutil.which("umoci"):
        pytest.skip("umoci is not installed")
    layers = (of_gnu_tar(tmp_path / "tree", *options),) if options else (LOWER, UPPER)
    layout = write_layout(tmp_path / "layout", picture(*layers))
    store.load(f"oci:{layout}:latest")
    ours = seen_by_a_container(store, store.list()[0].id, tmp_path / "root")
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", tmp_path / "bundle"], check=True)
    theirs = tree(tmp_path / "bundle/rootfs")
    ours["."], theirs["."] = (found["."][:4] for found in (ours, theirs))  # a container's root is as old as itself
    assert ours == theirs and len(ours) > 5
    if "--sparse" in options:
        [there] = (tmp_path / "store").rglob("with-100-holes")
        assert there.stat().st_blocks * 512 < there.stat().st_size // 4


def test_skopeo_says_of_an_image_what_the_store_does(store: ImageStore, registry: Registry) -> None:
    config = {
        "created": "2024-02-29T12:00:00.5Z",
        "author": "A. Uthor <ünï@example.com>",
        "config": {"Labels": {"a": "1", "ü": ""}, "Env": ["PATH=/bin", "EMPTY="], "User": "5:6", "StopSignal": "9"},
        "history": [{"created_by": "by hand"}, {"created_by": "nothing", "empty_layer": True}, {"comment": "x"}],
    }
    name = registry.push("judged/app", "v1", picture(BASE, TOP, config=config))
    image = store.pull(name)
    look = ["inspect", "--tls-verify=false", f"docker://{name}"]
    said, configured = json.loads(skopeo(*look)), json.loads(skopeo(*look, "--config"))
    manifest = json.loads(skopeo(*look, "--raw"))
    assert image.digests == (f"{said['Name']}@{said['Digest']}",)
    assert image.id == manifest["config"]["digest"] and list(image.layers) == configured["rootfs"]["diff_ids"]
    assert (said["Created"], said["Architecture"], said["Os"]) == (
        *(image.config["created"], image.config["architecture"], image.config["os"]),
    )
    assert {key: configured[key] for key in image.config} == dict(image.config)
    assert said["Env"] == image.config["config"]["Env"] and said["Labels"] == image.config["config"]["Labels"]
    assert "v1" in said["RepoTags"] and f"{said['Name']}:v1" in image.names
