"""Mounts of every form: options, propagation both ways, id mappings, tmpcopyup, remounts, control groups."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux import mounts, syscalls, trees
from crio_native.linux.cgroup import hierarchy

from ..machine import Machine
from .conftest import PARENT, Box
from .test_builtin_userns import in_user_namespace

pytestmark = pytest.mark.root

MAPPED = [{"containerID": 0, "hostID": 5000, "size": 1000}]


def add(spec: dict[str, Any], destination: str, source: object, *options: str, **more: Any) -> dict[str, Any]:
    spec["mounts"].append(
        {"destination": destination, "type": "bind", "source": str(source), "options": list(options), **more}
    )
    return spec


@pytest.fixture
def tree(box: Box) -> Iterator[Path]:
    """A directory with a mount below it, in a peer group of its own."""
    top = box.directory / "tree"
    top.mkdir()
    syscalls.mount("tree", str(top), "tmpfs", 0, None)
    syscalls.mount(None, str(top), None, mounts.MS_SHARED)
    (top / "below").mkdir()
    syscalls.mount("below", str(top / "below"), "tmpfs", 0, None)
    for directory in (top, top / "below"):
        (directory / "file").write_text("text\n")
        (directory / "link").symlink_to("file")
    yield top
    box.remove_containers()
    syscalls.umount2(str(top), mounts.MNT_DETACH)


def mount_rows(text: str, below: str) -> dict[str, tuple[set[str], str]]:
    """mountinfo: mount point -> (its options, its optional fields), of those at or below a path."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if fields[4].startswith(below):
            found[fields[4]] = set(fields[5].split(",")), " ".join(fields[6 : fields.index("-")])
    return found


@pytest.mark.parametrize(
    ("option", "there"),
    [
        ("ro", {"ro"}),
        ("nosuid", {"nosuid"}),
        ("nodev", {"nodev"}),
        ("noexec", {"noexec"}),
        ("noatime", {"noatime"}),
        ("nodiratime", {"nodiratime"}),
        ("nosymfollow", {"nosymfollow"}),
    ],
)
def test_an_option_is_the_top_mounts_and_its_recursive_form_the_whole_trees(
    box: Box, tree: Path, option: str, there: set[str]
) -> None:
    spec = add(box.spec("cat", "/proc/self/mountinfo"), "/plain", tree, "rbind", option)
    rows = mount_rows(box.run(spec=add(spec, "/deep", tree, "rbind", f"r{option}")).output(), "/")
    assert there <= rows["/plain"][0] and not there <= rows["/plain/below"][0]
    assert there <= rows["/deep"][0] and there <= rows["/deep/below"][0]


@pytest.mark.parametrize("option", ["rrw", "rsuid", "rdev", "rexec", "rsymfollow", "ratime", "rdiratime"])
def test_a_recursive_option_takes_back_what_the_source_has(box: Box, tree: Path, option: str) -> None:
    cleared = {"rrw": "ro", "ratime": "noatime"}.get(option, f"no{option[1:]}")
    to_set, _ = mounts.attributes(mounts.parse([cleared]).flags, 0)
    for directory in (tree, tree / "below"):
        fd = os.open(directory, os.O_PATH)
        syscalls.mount_setattr(fd, 0, set_=to_set, clear=mounts.MOUNT_ATTR_ATIME if "atime" in cleared else 0)
        os.close(fd)
    rows = mount_rows(
        box.run(spec=add(box.spec("cat", "/proc/self/mountinfo"), "/data", tree, "rbind", option)).output(), "/data"
    )
    assert all(cleared not in options for options, _ in rows.values()) and len(rows) == 2


def test_the_access_time_option_that_comes_last_decides(box: Box, tree: Path) -> None:
    spec = add(box.spec("cat", "/proc/self/mountinfo"), "/a", tree, "rbind", "rnoatime", "rstrictatime")
    rows = mount_rows(box.run(spec=add(spec, "/b", tree, "rbind", "rnoatime", "rrelatime")).output(), "/")
    for where in ("/a", "/a/below"):
        assert not rows[where][0] & {"noatime", "relatime"}
    for where in ("/b", "/b/below"):
        assert "relatime" in rows[where][0]


def test_a_plain_bind_leaves_what_is_mounted_below(box: Box, tree: Path) -> None:
    spec = add(box.spec("ls", "/data/below"), "/data", tree, "bind")
    assert box.run(spec=spec).output() == ""


def test_no_symlink_is_followed(box: Box, tree: Path) -> None:
    container = box.run(spec=add(box.spec("cat", "/data/file", "/data/link"), "/data", tree, "bind", "nosymfollow"))
    assert container.output() == "text\n"
    assert "symbolic links" in container.output("stderr")


@pytest.mark.parametrize(
    "form",
    [{"type": "none", "options": ["rbind"]}, {"type": "bind"}, {"type": "rbind"}, {"type": "", "options": ["bind"]}],
)
def test_a_bind_mount_by_any_name(box: Box, tree: Path, form: dict[str, Any]) -> None:
    spec = box.spec("cat", "/data/file")
    spec["mounts"].append({"destination": "data", "source": str(tree), **form})
    assert box.run(spec=spec).output().strip() == "text"


def test_a_relative_source_is_the_bundles(box: Box, tree: Path) -> None:
    spec = add(box.spec("cat", "/data/file"), "/data", "tree", "rbind")
    assert box.run(spec=spec).output().strip() == "text"


def test_what_is_mounted_can_be_changed_by_a_remount(box: Box, tree: Path) -> None:
    spec = add(box.spec("cat", "/proc/self/mountinfo"), "/data", tree, "rbind")
    spec["mounts"].append({"destination": "/data", "type": "none", "options": ["remount", "bind", "ro", "noexec"]})
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "options": ["size=64k"]})
    spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "options": ["remount", "size=128k", "nodev"]})
    text = box.run(spec=spec).output()
    rows = mount_rows(text, "/")
    assert {"ro", "noexec"} <= rows["/data"][0] and "nodev" in rows["/tmp"][0]
    assert "size=128k" in text


def test_a_remount_of_what_is_not_mounted(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["mounts"].append({"destination": "/tmp", "type": "none", "options": ["remount", "bind", "ro"]})
    with pytest.raises(StepFailed, match=r"step 'remount' failed on /tmp with EINVAL"):
        box.create(spec)


# -- propagation -------------------------------------------------------------------------------------------------


def mounted_later(box: Box, tree: Path, propagation: str, root: str) -> tuple[bool, bool]:
    """(whether the container sees what the host mounts, whether the host sees what the container does)."""
    spec = add(box.spec(), "/vol", tree, "rbind", *([propagation] if propagation else []))
    if root:
        spec["linux"]["rootfsPropagation"] = root
    admin = [*spec["process"]["capabilities"]["bounding"], "CAP_SYS_ADMIN"]
    spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), admin)
    for name in ("host", "container"):
        (tree / name).mkdir(exist_ok=True)
    container = box.create(spec).start()
    syscalls.mount("later", str(tree / "host"), "tmpfs", 0, None)
    (tree / "host/seen").touch()
    try:
        _, inside = container.exec("ls", "/vol/host")
        code, text = container.exec("mount", "-t", "tmpfs", "later", "/vol/container")
        assert code == 0, text
        with open("/proc/self/mountinfo") as file:
            outside = f"{tree}/container" in file.read()
    finally:
        with contextlib.suppress(OSError):
            syscalls.umount2(str(tree / "container"), mounts.MNT_DETACH)
        syscalls.umount2(str(tree / "host"), mounts.MNT_DETACH)
    return "seen" in inside, outside


@pytest.mark.parametrize(
    ("propagation", "root", "expected"),
    [
        ("", "", (False, False)),
        ("rprivate", "rslave", (False, False)),
        ("private", "rshared", (False, False)),
        ("rslave", "rslave", (True, False)),
        ("slave", "", (True, False)),
        ("rslave", "rshared", (True, False)),
        ("rshared", "rshared", (True, True)),
        ("shared", "shared", (True, True)),
        ("rshared", "rslave", (True, False)),
        ("rslave", "private", (False, False)),
    ],
)
def test_propagation_both_ways(box: Box, tree: Path, propagation: str, root: str, expected: tuple[bool, bool]) -> None:
    assert mounted_later(box, tree, propagation, root) == expected


def test_a_volume_on_the_roots_own_file_system_propagates(box: Box) -> None:
    """The root's parent must be private for pivot_root; a volume that lies on the same mount must not become so."""
    directory = box.directory / "shared"
    directory.mkdir()
    syscalls.mount(str(box.directory), str(box.directory), None, mounts.MS_BIND)
    syscalls.mount(None, str(box.directory), None, mounts.MS_SHARED)
    try:
        assert mounted_later(box, directory, "rshared", "rshared") == (True, True)
        with open("/proc/self/mountinfo") as file:
            assert f"{box.root}" not in file.read()
    finally:
        box.remove_containers()
        syscalls.umount2(str(box.directory), mounts.MNT_DETACH)


@pytest.mark.parametrize(
    ("propagation", "shown"),
    [("shared", "shared:"), ("private", ""), ("slave", ""), ("unbindable", "unbindable"), ("rshared", "shared:")],
)
def test_propagation_of_the_root(box: Box, propagation: str, shown: str) -> None:
    spec = box.spec("cat", "/proc/self/mountinfo")
    spec["linux"]["rootfsPropagation"] = propagation
    fields = mount_rows(box.run(spec=spec).output(), "/")["/"][1]
    assert fields.startswith(shown) if shown else fields == ""
    with open("/proc/self/mountinfo") as file:
        assert str(box.root) not in file.read()


# -- id mappings -------------------------------------------------------------------------------------------------


def owners(box: Box, tree: Path, spec: dict[str, Any], *options: str, **more: Any) -> list[str]:
    for directory in (tree, tree / "below"):
        (directory / "mine").touch()
        os.chown(directory / "mine", 3, 4)
    spec["process"]["args"] = ["stat", "-c", "%u:%g", "/data/mine", "/data/below/mine"]
    return box.run(spec=add(spec, "/data", tree, *options, **more)).output().splitlines()


@pytest.mark.parametrize(("option", "below"), [("idmap", "3:4"), ("ridmap", "5003:5004"), (None, "3:4")])
def test_an_id_mapped_mount(box: Box, tree: Path, option: str | None, below: str) -> None:
    options = ["rbind", *([option] if option else [])]
    mapping = {"uidMappings": MAPPED, "gidMappings": MAPPED}
    assert owners(box, tree, box.spec(), *options, **mapping) == ["5003:5004", below]


def test_an_id_mapped_volume_of_a_user_namespace_is_mapped_as_that_is(box: Box, tree: Path) -> None:
    assert owners(box, tree, in_user_namespace(box), "rbind", "ridmap") == ["3:4", "3:4"]


def test_without_it_the_owner_is_unknown(box: Box, tree: Path) -> None:
    assert owners(box, tree, in_user_namespace(box), "rbind") == ["65534:65534"] * 2


def test_what_is_written_there_is_the_mappings(box: Box, tree: Path) -> None:
    tree.chmod(0o777)
    spec = add(in_user_namespace(box, "touch", "/data/new"), "/data", tree, "rbind", "idmap")
    box.run(spec=spec)
    assert (tree / "new").stat().st_uid == 0


def test_two_mounts_of_the_same_mapping_and_one_of_another(box: Box, tree: Path) -> None:
    (tree / "mine").touch()
    spec = box.spec("stat", "-c", "%u", "/a/mine", "/b/mine", "/c/mine")
    other = [{"containerID": 0, "hostID": 7000, "size": 10}]
    for name, mapping in (("/a", MAPPED), ("/b", MAPPED), ("/c", other)):
        add(spec, name, tree, "bind", "idmap", uidMappings=mapping, gidMappings=mapping)
    assert box.run(spec=spec).output().split() == ["5000", "5000", "7000"]


def test_a_file_system_that_cannot_be_mapped(box: Box, leaks: Machine) -> None:
    spec = add(box.spec(), "/data", "/proc", "bind", "idmap", uidMappings=MAPPED, gidMappings=MAPPED)
    with pytest.raises(StepFailed, match=r"step 'bind' failed on /proc with EINVAL.*no id-mapped mounts"):
        box.create(spec)


@pytest.mark.parametrize(
    ("mount", "field"),
    [
        ({"options": ["bind", "idmap"]}, r"mounts\[5\].options"),
        ({"options": ["bind", "idmap"], "uidMappings": MAPPED}, r"mounts\[5\].gidMappings"),
        ({"options": ["bind"], "gidMappings": MAPPED}, r"mounts\[5\].uidMappings"),
        ({"options": ["bind"], "uidMappings": MAPPED * 2, "gidMappings": MAPPED}, r"mounts\[5\].uidMappings"),
        (
            {"type": "tmpfs", "options": ["idmap"], "uidMappings": MAPPED, "gidMappings": MAPPED},
            r"mounts\[5\].options",
        ),
        ({"type": "none"}, r"mounts\[5\].type"),
        ({"type": "proc", "options": ["tmpcopyup"]}, r"mounts\[5\].options"),
        ({"options": ["bind"], "source": 3}, r"mounts\[5\].source"),
        ({"destination": "/proc/1/ns"}, r"mounts\[5\].destination"),
        ({"destination": "/x/..", "type": "tmpfs", "options": []}, r"mounts\[5\].destination"),
    ],
)
def test_mounts_that_cannot_be(box: Box, mount: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": "/tmp"} | mount)
    with pytest.raises(InvalidArgument, match=f"^{field}:"):
        box.create(spec)


# -- targets and symlinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "user namespace", "shared"])
def test_a_bind_mount_on_the_root_takes_its_place(box: Box, tree: Path, case: str) -> None:
    box_spec = in_user_namespace if case == "user namespace" else Box.spec
    spec = box_spec(box, "sleep", "100")
    subprocess.run(["cp", "-a", f"{box.root}/.", str(tree)], check=True)
    (tree / "mark").write_text("the other root\n")
    if case == "shared":
        spec["linux"]["rootfsPropagation"] = "rshared"
    spec["mounts"].insert(0, {"destination": "/", "type": "bind", "source": str(tree), "options": ["rbind"]})
    container = box.create(spec).start()
    # The exec comes in by setns(2), which leads to the topmost of what is stacked on the namespace's root.
    code, said = container.exec("cat", "/mark", "/proc/self/mountinfo")
    assert (code, said[:15]) == (0, "the other root\n")
    for mountinfo in (said[15:], Path(f"/proc/{container.process.pid}/mountinfo").read_text()):
        points = [row.split()[4] for row in mountinfo.splitlines()]
        allowed = ("/proc", "/sys", "/dev", "/below")
        assert points.count("/") == 1 and all(path == "/" or path.startswith(allowed) for path in points)
        assert points.count("/sys") == 1 and "/below" in points and "/sys/kernel/tracing" not in points
    assert not (box.root / "mark").exists()


LINKS = [
    (["bind"], "cat /link /target", ["text", "text"]),
    (["bind", "dest-nofollow"], "cat /link; readlink /target || cat /target", ["text", "text"]),
    (["bind", "src-nofollow", "dest-nofollow"], "cat /link; readlink /target", ["text", "file"]),
    (["bind", "copy-symlink"], "cat /link; readlink /new", ["text", "file"]),
]


@pytest.mark.parametrize(
    ("options", "script", "said"), LINKS, ids=lambda value: ",".join(value) if isinstance(value, list) else None
)
@pytest.mark.parametrize("own_user", [False, True])
def test_a_symlink_is_followed_mounted_or_copied(
    box: Box, tree: Path, own_user: bool, options: list[str], script: str, said: list[str]
) -> None:
    (box.root / "target").symlink_to("elsewhere")
    spec = (in_user_namespace if own_user else Box.spec)(box, "sh", "-c", script)
    add(spec, "/link", tree / "link", "bind")
    add(spec, "/new" if "copy-symlink" in options else "/target", tree / "link", *options)
    if "src-nofollow" in options and not trees.HAVE_TREES:
        with pytest.raises(StepFailed, match="open_tree"):
            box.create(spec)
        return
    assert box.run(spec=spec).output().splitlines() == said
    assert (box.root / "elsewhere").exists() == (options == ["bind"])


def test_a_symlink_that_is_there_already_is_taken(box: Box, tree: Path) -> None:
    (box.root / "same").symlink_to("file")
    spec = add(box.spec("busybox", "readlink", "/same"), "/same", tree / "link", "bind", "copy-symlink")
    assert box.run(spec=spec).output() == "file\n"


def test_a_symlink_is_not_copied_over_another_thing(box: Box, tree: Path, leaks: Machine) -> None:
    with pytest.raises(StepFailed, match=r"/etc/passwd.*is there already"):
        box.create(add(box.spec(), "/etc/passwd", tree / "link", "bind", "copy-symlink"))


@pytest.mark.parametrize("target", ["/run/new/there", "../run/new/there", "/../../run/new/../new/there"])
def test_a_dangling_target_is_made_in_the_root(box: Box, tree: Path, target: str) -> None:
    (box.root / "etc/to-file").symlink_to(target + "-file")
    (box.root / "etc/to-directory").symlink_to(target)
    spec = add(box.spec("sh", "-c", "cat /run/new/there-file /run/new/there/file"), "/etc/to-file", tree / "file")
    assert box.run(spec=add(spec, "/etc/to-directory/", tree)).output() == "text\n" * 2
    assert not Path("/run/new").exists()


def test_a_file_system_may_cover_itself(box: Box) -> None:
    """As control groups do where the host's /sys was bound with all that is below it."""
    spec = box.spec("cat", "/proc/self/mountinfo")
    spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["noexec", "ro"]})
    if not (trees.HAVE_TREES and trees.HAVE_FSOPEN):
        with pytest.raises(StepFailed, match="/sys with EBUSY"):
            box.create(spec)
        return
    mounted = [line.split() for line in box.run(spec=spec).output().splitlines() if line.split()[4] == "/sys"]
    assert len(mounted) == 2 and {"ro", "noexec"} <= set(mounted[1][5].split(","))


def test_targets_that_lead_to_themselves(box: Box, tree: Path, leaks: Machine) -> None:
    (box.root / "round").symlink_to("round")
    (box.root / "left").symlink_to("right/x")
    (box.root / "right").symlink_to("left/x")
    for destination in ("/round", "/left", "/right/x/y"):
        with pytest.raises(StepFailed, match=f"{destination} with ELOOP"):
            box.create(add(box.spec(), destination, tree))


MODES = [
    ([], "712 0", "1777 0"),
    (["size=64k", "mode=1750"], "1750 0", "1750 0"),
    (["tmpcopyup", "mode=1750", "gid=7"], "1750 7", "1750 7"),
    (["tmpcopyup"], "712 0", "755 0"),
]


@pytest.mark.parametrize(("options", "covered", "new"), MODES)
def test_a_tmpfs_has_the_mode_of_what_it_covers(box: Box, options: list[str], covered: str, new: str) -> None:
    (box.root / "covered").mkdir()
    (box.root / "covered").chmod(0o712)
    spec = box.spec("stat", "-c", "%a %g", "/covered", "/new")
    for path in ("/covered", "/new"):
        spec["mounts"].append({"destination": path, "type": "tmpfs", "options": options})
    assert box.run(spec=spec).output().splitlines() == [covered, new]


# -- tmpcopyup ---------------------------------------------------------------------------------------------------


def fill(directory: Path) -> None:
    directory.mkdir(mode=0o750)
    os.chown(directory, 11, 12)
    (directory / "sub/deep").mkdir(parents=True)
    (directory / "file").write_bytes(b"x" * 3_000_000)
    (directory / "sub/deep/setuid").write_text("text\n")
    os.chown(directory / "sub/deep/setuid", 5, 6)
    (directory / "sub/deep/setuid").chmod(0o4711)
    os.utime(directory / "sub/deep/setuid", (1, 1000000000))
    (directory / "link").symlink_to("/etc/shadow")
    os.mkfifo(directory / "pipe")
    os.mknod(directory / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))


def test_a_tmpfs_starts_with_what_it_covers(box: Box) -> None:
    fill(box.root / "data")
    script = "cd /data; stat -c '%n %A %u:%g %s' . file sub/deep/setuid pipe null"
    script += "; stat -c %Y sub/deep/setuid; ls -l link; touch new"
    spec = box.spec("sh", "-c", script)
    spec["mounts"].append({"destination": "/data", "type": "tmpfs", "options": ["tmpcopyup", "size=8m", "nodev"]})
    lines = box.run(spec=spec).output().splitlines()
    assert lines[0].startswith(". drwxr-x--- 11:12")
    assert lines[1] == "file -rw-r--r-- 0:0 3000000"
    assert lines[2:5] == ["sub/deep/setuid -rws--x--x 5:6 5", "pipe prw-r--r-- 0:0 0", "null crw------- 0:0 0"]
    assert lines[5] == "1000000000" and lines[6].endswith("link -> /etc/shadow")
    assert not (box.root / "data/new").exists()


def test_holes_of_what_it_covers_take_no_memory(box: Box) -> None:
    (box.root / "data").mkdir()
    with (box.root / "data/file").open("wb") as file:
        for at in (0, 5 << 20, 1 << 30):
            file.seek(at)
            file.write(b"here")
        file.truncate(2 << 30)
    spec = box.spec("sh", "-c", "cd /data; stat -c %s file; tr -d '\\0' <file | wc -c")
    spec["mounts"].append({"destination": "/data", "type": "tmpfs", "options": ["tmpcopyup", "size=1m"]})
    assert box.run(spec=spec).output() == "2147483648\n12\n"


def test_a_tmpfs_that_is_too_small_for_it(box: Box, leaks: Machine) -> None:
    fill(box.root / "data")
    spec = box.spec()
    spec["mounts"].append({"destination": "/data", "type": "tmpfs", "options": ["tmpcopyup", "size=64k"]})
    with pytest.raises(StepFailed, match=r"step 'mount' failed on /data/file with ENOSPC.*tmpcopyup"):
        box.create(spec)


def test_directories_nested_without_end(box: Box) -> None:
    """An image can nest them deeper than a copy should follow."""
    fd = os.open(box.root, os.O_RDONLY)
    for _ in range(300):
        with contextlib.suppress(FileExistsError):
            os.mkdir("d", dir_fd=fd)
        following = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = following
    os.close(fd)
    spec = box.spec()
    spec["mounts"].append({"destination": "/d", "type": "tmpfs", "options": ["tmpcopyup"]})
    with pytest.raises(StepFailed, match=r"ELOOP.*deeper than 128"):
        box.create(spec)


# -- control groups and others' mount namespaces --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ro", "rw"])
@pytest.mark.parametrize("kind", ["cgroup", "cgroup2"])
def test_a_control_group_mount(box: Box, mode: str, kind: str) -> None:
    attempts = "for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/x 2>/dev/null && rmdir $d/x && echo w; done"
    spec = box.spec("sh", "-c", f"{attempts}; head -1 /proc/self/cgroup")
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{box.directory.name}"
    spec["mounts"].append(
        {"destination": "/sys/fs/cgroup", "type": kind, "source": "cgroup", "options": [mode, "nosuid"]}
    )
    lines = box.run(spec=spec).output().splitlines()
    assert lines.pop().endswith(":/")
    assert bool(lines) == (mode == "rw")


@pytest.mark.parametrize(
    ("options", "there", "missing"),
    [
        (["ro", "nosuid", "noexec"], {"ro", "nosuid", "noexec"}, set()),
        (["rro"], {"ro"}, set()),
        (["rnosuid", "rnoexec", "rnodev"], {"rw", "nosuid", "noexec", "nodev"}, set()),
        (["rnodiratime", "rnosymfollow"], {"nodiratime", "nosymfollow"}, set()),
        (["noatime", "ro", "rrw"], {"noatime", "rw"}, {"ro"}),
        (["noatime", "rrelatime"], {"relatime"}, {"noatime"}),
        (["nosuid", "rsuid", "rnoatime"], {"noatime"}, {"nosuid"}),
    ],
)
def test_every_hierarchy_has_the_options_of_a_control_group_mount(
    box: Box, options: list[str], there: set[str], missing: set[str]
) -> None:
    """On a v1 host it is a tmpfs with a mount below it for each."""
    spec = box.spec("cat", "/proc/self/mountinfo")
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{box.directory.name}"
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options})
    rows = mount_rows(box.run(spec=spec).output(), "/sys/fs/cgroup")
    assert len(rows) == 1 + len(hierarchy().mounts) * (hierarchy().mode != "v2")
    for where, (found, _) in rows.items():
        assert there <= found and not missing & found, where


@pytest.mark.skipif(hierarchy().mode == "v2", reason="one mount shows all control groups")
def test_the_mounts_of_the_hierarchies_propagate_as_asked(box: Box) -> None:
    spec = box.spec("cat", "/proc/self/mountinfo")
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{box.directory.name}"
    mount = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rshared"]}
    spec["mounts"].append(mount)
    rows = mount_rows(box.run(spec=spec).output(), "/sys/fs/cgroup")
    assert len(rows) > 1 and all("shared:" in fields for _, fields in rows.values())


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The path of a mount namespace that another process lives in."""
    other = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "1000"])
    path = f"/proc/{other.pid}/ns/mnt"
    while os.path.samestat(os.stat(path), os.stat("/proc/self/ns/mnt")):
        pass
    yield path
    other.kill()
    other.wait()


def test_a_mount_namespace_is_joined_and_stays_its_owners(box: Box, tree: Path, elsewhere: str) -> None:
    """pivot_root would give its other processes our root file system."""
    spec = add(
        box.spec("sh", "-c", "ls -l /proc/self/ns/mnt; ls /bin/busybox; cat /data/file; echo $$"),
        "/data",
        tree,
        "rbind",
    )
    spec["linux"]["namespaces"] = [
        {"type": "mount", "path": elsewhere} if entry["type"] == "mount" else entry
        for entry in spec["linux"]["namespaces"]
    ]
    container = box.create(spec)
    assert os.path.samestat(os.stat(f"/proc/{container.process.pid}/ns/mnt"), os.stat(elsewhere))
    assert os.listdir(elsewhere.replace("ns/mnt", "root")) == os.listdir("/")
    assert os.path.samestat(os.stat(f"/proc/{container.process.pid}/root"), os.stat(box.root))
    container.start().wait()
    assert container.output().splitlines()[1:] == ["/bin/busybox", "text", "1"]


def test_our_own_mount_namespace_is_refused(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"] = [{"type": "mount", "path": f"/proc/{os.getpid()}/ns/mnt"}, {"type": "uts"}]
    with pytest.raises(StepFailed, match=r"open_mount_namespace.*the runtime itself"):
        box.create(spec)
