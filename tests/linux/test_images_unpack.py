"""Layers unpacked by the real, confined child: what must come out, and every attack that must not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from crio_native.errors import CrioError, InvalidArgument, ResourceExhausted, StepFailed
from crio_native.images.unpacker import Limits
from crio_native.images.unpacking import Unpacked, unpack

from ..images_support import in_private_mounts, member, sha256, tar, tree

pytestmark = pytest.mark.root

DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
CHR, BLK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
SMALL = Limits(entries=50, bytes=8 << 20, depth=20, ratio=50, ratio_from=1 << 20)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """An empty directory to unpack into, with a canary beside it."""
    (tmp_path / "canary").write_text("untouched")
    directory = tmp_path / "target"
    directory.mkdir()
    yield directory
    assert {path.name for path in tmp_path.iterdir()} == {"canary", "target"}
    assert (tmp_path / "canary").read_text() == "untouched"


# What makes one stream of each; two of them, one after the other, are one archive.
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def put(target: Path, *members: tuple[tarfile.TarInfo, bytes], limits: Limits = SMALL) -> Unpacked:
    return unpack(target, [tar(*members)], limits=limits)


def refusal(target: Path, data: bytes, *, limits: Limits = SMALL) -> CrioError:
    with pytest.raises(CrioError) as caught:
        unpack(target, [data], what="layer x", limits=limits)
    assert "layer x" in str(caught.value)
    return caught.value


def sparse(map_: str, data: bytes, size: object, *, minor: str = "0", name: str = "x") -> tuple[tarfile.TarInfo, bytes]:
    """A sparse file as PAX 1.0 has it: its map, in whole blocks, comes before its data."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": minor, "GNU.sparse.realsize": str(size)}
    begin = map_.encode().ljust(-(-len(map_) // 512) * 512, b"\0")
    return member(name, data=begin + data, pax_headers={**headers, "GNU.sparse.name": name})


# What must come out


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_tree_comes_out_as_gnu_tar_makes_it(
    target: Path, tmp_path_factory: pytest.TempPathFactory, format: str, compression: str
) -> None:
    work = tmp_path_factory.mktemp("original")
    source = work / "source"
    make_everything(source, long_names=format != "ustar", attributes=format == "pax")
    flags = ["--xattrs", "--xattrs-include=*"] if format == "pax" else []
    subprocess.run(["tar", "-C", source, f"--format={format}", *flags, "-cf", work / "t.tar", "."], check=True)
    (work / "peer").mkdir()
    subprocess.run(["tar", "-C", work / "peer", *flags, "--numeric-owner", "-xpf", work / "t.tar"], check=True)
    data = (work / "t.tar").read_bytes()
    blob = COMPRESS[compression](data[:70_000]) + COMPRESS[compression](data[70_000:])
    pieces = [blob[at : at + 1000] for at in range(0, len(blob), 1000)]
    made = unpack(target, pieces)
    assert tree(target) == tree(work / "peer")
    assert (made.digest, made.size) == (sha256(data), len(data))
    assert made.owner == (stat.S_IMODE(source.stat().st_mode), 12, 34)
    assert made.inodes == len({path.lstat().st_ino for path in target.rglob("*")})


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_files_come_out_as_gnu_tar_makes_them(
    target: Path, tmp_path_factory: pytest.TempPathFactory, format: str
) -> None:
    work = tmp_path_factory.mktemp("original")
    (work / "source").mkdir()
    for holes in (1, 3, 4, 5, 26, 300):  # the old format has maps of 4, and of 21 more
        with (work / f"source/{holes}").open("wb") as file:
            for number in range(holes):
                file.seek(number * 12345 << 4)
                file.write(b"data" * (number + 1))
            file.truncate(holes << 19)
    (work / "source/after").write_bytes(b"the next entry")
    for path in (*(work / "source").iterdir(), work / "source"):
        os.utime(path, (77, 77))  # the old format knows whole seconds
    command = ["tar", "-C", f"{work}/source", f"--format={format}", "--sparse", "-c", "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    made = unpack(target, [data])
    assert tree(target) == tree(work / "source")
    assert len(data) < 3 << 20 and (target / "300").stat().st_blocks * 512 < 4 << 20
    assert made.digest == sha256(data) and made.bytes > 150 << 20  # as every count of ours has it: by their sizes


def make_everything(root: Path, *, long_names: bool, attributes: bool) -> None:
    """Everything that a layer can hold."""
    root.mkdir()
    (root / "bin").mkdir()
    (root / "bin/su").write_bytes(os.urandom(100_000))
    os.chown(root / "bin/su", 5, 6)
    os.chmod(root / "bin/su", 0o6755)
    (root / "empty").touch()
    os.link(root / "bin/su", root / "bin/su2")
    os.symlink("/bin/su", root / "absolute")
    os.symlink("../../..", root / "bin/up")
    os.lchown(root / "absolute", 7, 8)
    os.link(root / "absolute", root / "absolute2", follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o622)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 700))
    (root / "sticky").mkdir()
    os.chmod(root / "sticky", 0o3777)
    (root / "sticky/secret").write_text("x")
    os.chmod(root / "sticky/secret", 0)
    (root / "closed").mkdir()
    (root / "closed/in").write_text("y")
    os.chmod(root / "closed", 0o000)
    (root / os.fsdecode(b"latin-\xe9 \n")).write_text("bytes")
    if long_names:
        deep = root / ("d" * 120) / ("e" * 120)
        deep.mkdir(parents=True)
        (deep / ("f" * 200)).write_text("long")
        os.symlink("t/" * 150, root / "longlink")
        os.link(deep / ("f" * 200), root / "tolong")
        os.chown(root / "empty", 4_000_000_000, 3_000_000_000)
    if attributes:
        os.setxattr(root / "empty", "user.note", b"kept\0=\n")
        os.setxattr(root / "closed", "user.dir", b"kept too")
        os.setxattr(root / "bin/su", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, (0, 1_234_567_890 + len(path.name)), follow_symlinks=False)
    os.chown(root, 12, 34)
    os.chmod(root, 0o751)
    os.utime(root, (0, 1_000_000_000))


def test_times_keep_their_fraction_and_may_be_before_the_epoch(target: Path) -> None:
    put(
        target, member("a", mtime=1.5, pax_headers={"mtime": "1.123456789"}), member("b", pax_headers={"mtime": "-2.5"})
    )
    assert (target / "a").stat().st_mtime_ns == 1_123_456_789
    assert (target / "b").stat().st_mtime_ns == -2_500_000_000


def test_only_harmless_attributes_are_kept(target: Path) -> None:
    names = ("user.a", "user.overlay.opaque", "trusted.overlay.opaque", "security.selinux", "security.ima")
    headers = {f"SCHILY.xattr.{name}": "v" for name in names}
    put(target, member("f", data=b"x", pax_headers=headers), member("d", DIR, pax_headers=headers))
    assert os.listxattr(target / "f") == os.listxattr(target / "d") == ["user.a"]


def test_a_leading_slash_or_dot_means_nothing(target: Path) -> None:
    put(
        target,
        member("/etc", DIR),
        member("/etc/passwd", data=b"mine"),
        member("./x//y/./z", data=b"1"),
        member("/", DIR),
    )
    assert (target / "etc/passwd").read_bytes() == b"mine"
    assert (target / "x/y/z").read_bytes() == b"1"


def test_a_later_entry_replaces_an_earlier_one(target: Path) -> None:
    put(
        target,
        *[member("file", data=b"old"), member("file", data=b"new")],
        *[
            member("dir", DIR),
            member("dir/sub", DIR),
            member("dir/sub/x", data=b"1"),
            member("dir", data=b"now a file"),
        ],
        *[member("thing", data=b"1"), member("thing", DIR), member("thing/x", data=b"2")],
        *[member("link", SYM, linkname="file"), member("link", data=b"no longer a link")],
        *[member("kept", DIR), member("kept/x", data=b"1"), member("kept", DIR, mode=0o700)],
        *[member("again", LNK, linkname="file"), member("again", LNK, linkname="file")],
        *[member("file2", LNK, linkname="dir"), member("dir", FIFO)],
    )
    assert (target / "file").read_bytes() == b"new"
    assert (target / "thing/x").read_bytes() == b"2"
    assert (target / "link").read_bytes() == b"no longer a link"
    assert (target / "kept/x").exists()
    assert stat.S_IMODE((target / "kept").stat().st_mode) == 0o700
    assert (target / "file2").read_bytes() == b"now a file"
    assert stat.S_ISFIFO((target / "dir").stat().st_mode)


def test_a_hard_link_can_be_written_anew_without_changing_its_twin(target: Path) -> None:
    put(target, member("a", data=b"a"), member("b", LNK, linkname="a"), member("b", data=b"b"))
    assert (target / "a").read_bytes() == b"a"


def test_a_relative_symlink_on_the_way_is_followed_inside(target: Path) -> None:
    put(target, member("usr/lib", DIR), member("lib", SYM, linkname="usr/lib"), member("lib/x", data=b"1"))
    assert (target / "usr/lib/x").read_bytes() == b"1"
    assert (target / "lib").is_symlink()


def test_a_replaced_directory_is_not_written_through_an_old_descriptor(target: Path) -> None:
    put(
        target, member("a/b/x", data=b"1"), member("a", SYM, linkname="c"), member("a/b/y", data=b"2"), member("c", DIR)
    )
    assert not (target / "a/b/x").exists()


def test_umask_and_missing_parents(target: Path) -> None:
    before = os.umask(0o077)
    try:
        put(target, member("a/b/c", data=b"1", mode=0o666))
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "a/b").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "a/b/c").stat().st_mode) == 0o666


# Whiteouts


def whiteout(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def opaque(path: Path) -> bool:
    return "trusted.overlay.opaque" in os.listxattr(path) and os.getxattr(path, "trusted.overlay.opaque") == b"y"


def test_whiteouts_become_what_overlayfs_reads(target: Path) -> None:
    made = put(target, member("d", DIR, mtime=5), member("d/.wh.gone"), member("e/.wh..wh..opq"), member(".wh.top"))
    assert whiteout(target / "d/gone")
    assert whiteout(target / "top")
    assert opaque(target / "e")
    assert not opaque(target / "d")
    assert (target / "d").stat().st_mtime == 5
    assert not made.opaque
    assert not list(target.rglob(".wh*"))


def test_a_whiteout_hides_only_what_is_below_this_layer(target: Path) -> None:
    put(
        target,
        *[member("before", data=b"1"), member(".wh.before")],
        *[member(".wh.after"), member("after", data=b"1")],
        *[member("dir1/x", data=b"1"), member(".wh.dir1")],
        *[member(".wh.dir2"), member("dir2", DIR), member("dir2/x", data=b"1")],
        *[member(".wh.dir3"), member("dir3/sub/x", data=b"1")],
    )
    assert (target / "before").read_bytes() == (target / "after").read_bytes() == b"1"
    for name in ("dir1", "dir2", "dir3"):
        assert opaque(target / name), name
    assert (target / "dir3/sub/x").read_bytes() == b"1"


def test_an_opaque_root_is_reported(target: Path) -> None:
    assert put(target, member(".wh..wh..opq"), member("x", data=b"1")).opaque


def test_names_of_aufs_are_skipped(target: Path) -> None:
    put(target, member(".wh..wh.plnk", DIR), member(".wh..wh.aufs", data=b"x"), member("y", data=b"z"))
    assert [path.name for path in target.iterdir()] == ["y"]


def test_whiteouts_are_plain_names_in_an_archive(target: Path) -> None:
    unpack(target, [tar(member(".wh.x", data=b"1"))], layer=False)
    assert (target / ".wh.x").read_bytes() == b"1"


# Attacks


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member("../canary", data=b"x")], "'..' in it"),
        ([member("a/../../canary", data=b"x")], "'..' in it"),
        ([member("a/..", DIR)], "'..' in it"),
        ([member("..", DIR)], "'..' in it"),
        ([member("l", SYM, linkname="/etc"), member("l/shadow", data=b"x")], "an absolute symlink ('l' -> '/etc')"),
        ([member("l", SYM, linkname=".."), member("l/canary", data=b"x")], "leads out of the layer"),
        ([member("a/l", SYM, linkname="../../.."), member("a/l/canary", data=b"x")], "leads out of the layer"),
        ([member("l", SYM, linkname="/"), member("l/x", DIR)], "an absolute symlink"),
        ([member("l", SYM, linkname="/"), member("l/.wh.etc")], "an absolute symlink"),
        ([member("l", SYM, linkname="l"), member("l/x", data=b"")], "too long a chain of symlinks"),
        ([member("h", LNK, linkname="../canary")], "'..' in it"),
        ([member("h", LNK, linkname="/etc/passwd")], "which this layer does not have"),
        ([member("h", LNK, linkname="nothing")], "which is not a file of this layer"),
        ([member("d", DIR), member("h", LNK, linkname="d")], "which is not a file of this layer"),
        ([member("l", SYM, linkname="/etc"), member("h", LNK, linkname="l/passwd")], "an absolute symlink"),
        ([member(".wh.x"), member("h", LNK, linkname=".wh.x")], "which is not a file"),
        ([member("h", LNK, linkname="")], "which is not a file"),
        ([member("f", data=b"x"), member("f/x", data=b"y")], "'f' on its way is not a directory"),
        ([member("s", SYM, linkname="")], "a symlink without a target"),
        ([member("d/.wh.")], "a whiteout of no name"),
        ([member("d/.wh...")], "a whiteout of no name"),
        ([member(".", SYM, linkname="/")], "the root of the layer is not a directory"),
        ([member("a" * 256, data=b"x")], "longer than 255 bytes"),
        ([member("a/" * 21 + "x", data=b"x")], "deeper than 20 directories"),
        ([member("x" * 5000)], "longer than 4096 bytes"),
        ([member("x", SYM, linkname="y" * 5000)], "longer than 4096 bytes"),
        ([sparse("1\n0\n5\n", b"xxxx", 5)], "does not fit its 4 bytes of data"),
        ([sparse("1\n0\n4\n", b"xxxx", 3)], "or its size of 3"),
        ([sparse("2\n5\n2\n0\n2\n", b"xxxx", 9)], "not in order: 2 bytes at 0 follow 7"),
        ([sparse("2\n0\n3\n2\n1\n", b"xxxx", 9)], "not in order: 1 bytes at 2 follow 3"),
        ([sparse("0\n", b"", 65 << 30)], "the most is"),
        ([sparse("0\n", b"", 5 << 20), sparse("0\n", b"", 5 << 20, name="y")], "bytes of holes"),
        ([sparse("65537\n", b"", 1)], "more than 65536 fragments"),
        ([sparse("-1\n", b"", 1)], "b'-1' for a number"),
        ([sparse("1\n0\n" + "0" * 600, b"", 1)], "a line that is no number"),
        ([sparse("1\n0\n", b"", 1)], "a line that is no number"),
        ([sparse("0\n", b"", "")], "b'' for a number"),
        ([sparse("0\n", b"", 1, minor="1")], "none that is known"),
        ([member("x", pax_headers={"GNU.sparse.map": "0,4"}, data=b"xxxx")], "none that is known"),
        ([member("x", DIR, pax_headers={"GNU.sparse.major": "1"})], "it is a sparse file, and is none"),
        (
            [member("x", pax_headers={"SCHILY.xattr.user.a": "v" * 70_000})],
            "no room for its attribute 'user.a' of 70000",
        ),
        ([member("x", pax_headers={"SCHILY.xattr.user." + "a" * 300: "v"})], "of 1 bytes: it takes none so large"),
        ([member("x", pax_headers={"SCHILY.xattr.user.a": "v" * 1_100_000})], "the most is 1048576"),
        ([member("x", b"Z")], "type b'Z' is not known"),
        ([member("x", pax_headers={"uid": "-1"})], "uid is not a number"),
        ([member("x", pax_headers={"uid": "4294967295"})], "uid 4294967295 is not in"),
        ([member("x", pax_headers={"size": "9" * 30})], "size is not a number"),
        ([member("x", pax_headers={"mtime": "1e9"})], "mtime is not a number"),
        ([member("x", pax_headers={"mtime": "9" * 25})], "out of range"),
    ],
)
def test_a_hostile_entry_is_refused_by_name(
    target: Path, members: list[tuple[tarfile.TarInfo, bytes]], words: str
) -> None:
    error = refusal(target, tar(*members))
    assert isinstance(error, InvalidArgument | ResourceExhausted)
    assert words in str(error)


def test_links_cannot_make_a_tree_deeper_than_its_bound(target: Path) -> None:
    steps = [
        member("a/" * 15 + "x", data=b""),
        member("l", SYM, linkname="a/" * 14 + "a"),
        member("l/" + "b/" * 15, DIR),
    ]
    assert "deeper than 20" in str(refusal(target, tar(*steps)))


def patched(offset: int, value: bytes, data: bytes = b"x" * 100) -> bytes:
    """A tar archive with a changed first header, and the right checksum for it."""
    raw = bytearray(tar(member("file", data=data), format=tarfile.USTAR_FORMAT))
    raw[offset : offset + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tar(member("x", data=b"x" * 5000))[:3000], "the archive is cut"),
        (tar(member("x", data=b"x" * 5000))[:700], "the archive is cut"),
        (tar(member("x", data=b"x"))[:100], "the archive is cut"),
        (tar(member("x" * 300, data=b"x"))[:1024], "ends after an extended header"),
        (tar(member("x" * 300, data=b"x"))[:700], "cut"),
        (b"x" * 10240, "not a number"),
        (tar(member("x")).replace(b"ustar", b"vstar", 1), "checksum is wrong"),
        (patched(124, b"\xff" * 12), "size -1 is not in"),
        (patched(124, b"\x80" + b"\xff" * 11), "size 309485009821345068724781055 is not in"),
        (patched(124, b"77777777777\0"), "cut"),
        (patched(124, b"9" * 11), "size is not a number"),
        (patched(100, b"abc"), "mode is not a number"),
        (patched(136, b"\x80" + b"\xff" * 11), "out of range"),
        (patched(156, b"x"), "record of an extended header is malformed"),
        (patched(156, b"x", b"30 path=x\n".ljust(40)), "record of an extended header is malformed"),
        (patched(156, b"x", b"99999999 path=x\n"), "record of an extended header is malformed"),
        (patched(156, b"x", b"0 path=x\n"), "record of an extended header is malformed"),
    ],
)
def test_a_damaged_archive_is_refused(target: Path, data: bytes, words: str) -> None:
    error = refusal(target, data)
    assert isinstance(error, InvalidArgument)
    assert words in str(error)


def test_an_empty_archive_is_an_empty_layer(target: Path) -> None:
    for data in (b"", b"\0" * 1024, tar()):
        assert unpack(target, [data]).inodes == 0


def test_what_follows_the_end_counts_for_the_digest(target: Path) -> None:
    data = tar(member("x", data=b"1")) + b"trailing"
    assert unpack(target, [data]).digest == sha256(data)


def test_an_unpacker_whose_daemon_was_killed_ends_without_a_word(target: Path) -> None:
    """Its archive breaks off, and nobody takes its report: no fault of its own to fill the log with."""
    script = """
        import os, socket, sys
        from crio_native.images.unpacker import Limits
        from crio_native.images.unpacker.run import run
        from crio_native.images.unpacker.stream import decompressor
        report, daemons = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        archive, daemons_write = os.pipe()
        os.dup2(archive, 0)
        os.write(daemons_write, b"x" * 100)
        os.close(daemons_write)
        daemons.close()
        run(report, sys.argv[1], decompressor("none"), Limits(), layer=True)
    """
    assert in_private_mounts(script, target).stderr == ""


NOISE = tar(member("x", data=bytes(range(256)) * 40))


@pytest.mark.parametrize("compression", sorted(COMPRESS.keys() - {"none"}))
@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-100], lambda data: data[:60] + bytes(40) + data[100:], lambda data: data[:20]],
    ids=["cut", "changed", "cut early"],
)
def test_damaged_compression_is_refused(target: Path, compression: str, spoil: Callable[[bytes], bytes]) -> None:
    """Or seen by the digest: of a zstd frame that is cut the library says nothing."""
    data = NOISE + os.urandom(2000)
    try:
        made = unpack(target, [spoil(COMPRESS[compression](data))])
    except InvalidArgument as error:
        assert f"{compression} data" in str(error) or "cut" in str(error)
    else:
        assert compression == "zstd" and made.digest != sha256(data)


@pytest.mark.parametrize("compression", sorted(COMPRESS.keys() - {"none"}))
def test_what_follows_compressed_data_is_refused(target: Path, compression: str) -> None:
    assert f"the {compression} data" in str(refusal(target, COMPRESS[compression](NOISE) + b"garbage" * 9))


def test_a_zstd_window_has_a_bound(target: Path) -> None:
    """A frame header that asks for a window of 2 GiB."""
    asks = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\x00\x00"
    assert f"window is above {128 << 20} bytes" in str(refusal(target, asks + bytes(20)))


# Bounds


@pytest.mark.parametrize("compression", sorted(COMPRESS.keys() - {"none"}))
def test_a_bomb_of_zeros_is_left_early(target: Path, compression: str) -> None:
    bomb = COMPRESS[compression](tar(member("zeros", data=b"\0" * (6 << 20))))
    error = refusal(target, bomb)
    assert isinstance(error, ResourceExhausted)
    assert "as a decompression bomb does" in str(error)
    assert sum(path.stat().st_size for path in target.iterdir()) < 3 << 20


def test_small_files_may_be_all_zeros(target: Path) -> None:
    unpack(target, [gzip.compress(tar(member("zeros", data=b"\0" * (900 << 10))))], limits=SMALL)


def test_bytes_are_bounded(target: Path) -> None:
    error = refusal(target, tar(member("a", data=os.urandom(9 << 20))))
    assert isinstance(error, ResourceExhausted)
    assert "larger than 8388608 bytes" in str(error)


def test_an_announced_size_allocates_nothing(target: Path) -> None:
    error = refusal(target, patched(124, b"\x80" + (1 << 50).to_bytes(11, "big")))
    assert "cut" in str(error)


def test_entries_are_bounded(target: Path) -> None:
    members = [member(f"f{number}") for number in range(51)]
    error = refusal(target, tar(*members))
    assert isinstance(error, ResourceExhausted)
    assert "more than 50 entries" in str(error)
    for path in target.iterdir():
        path.unlink()
    assert put(target, *members[:50]).inodes == 50


def test_what_is_replaced_does_not_count(target: Path) -> None:
    """bytes and inodes are what is there in the end, so that a layer can be checked by them."""
    made = put(
        target,
        *[member("a/b/c", data=b"1" * 5000), member("a/b/d", data=b"1"), member("file", data=b"1" * 9000)],
        *[member("twin", LNK, linkname="file"), member("file", data=b"2"), member("a", SYM, linkname="twin")],
        *[member("x/y", data=b"1"), member("x/y", DIR), member("x/y/z", data=b"1" * 4097)],
    )
    there = [path.lstat() for path in target.rglob("*")]
    assert made.inodes == len({info.st_ino for info in there}) == 6
    assert made.bytes == sum(-(-info.st_size // 4096) * 4096 if stat.S_ISREG(info.st_mode) else 0 for info in there) + (
        4096 * sum(stat.S_ISDIR(info.st_mode) for info in there)
    )


def test_files_of_many_directories_in_turn_land_where_they_belong(target: Path) -> None:
    """More directories than descriptors are kept, and some are replaced on the way."""
    limits = Limits(entries=5000, bytes=8 << 20, depth=20, ratio=1000, ratio_from=1 << 20)
    first = [member(f"d{n % 700}/f{n}", data=b"%d" % n) for n in range(1400)]
    anew = [member("d3", SYM, linkname="d4"), member("d3/late", data=b"1"), member("d5", data=b"1")]
    put(target, *first, *anew, limits=limits)
    assert (target / "d699/f1399").read_bytes() == b"1399" and (target / "d699/f699").read_bytes() == b"699"
    assert (target / "d4/late").read_bytes() == b"1" and (target / "d5").read_bytes() == b"1"
    assert not (target / "d4/f3").exists()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extended_headers_are_bounded(target: Path, format: int) -> None:
    info, _ = member("x" * (2 << 20) if format == tarfile.GNU_FORMAT else "x")
    if format == tarfile.PAX_FORMAT:
        info.pax_headers = {"comment": "c" * (2 << 20)}
    error = refusal(target, tar((info, b""), format=format))
    assert isinstance(error, ResourceExhausted)
    assert "extended header of" in str(error)


def test_an_attribute_that_the_kernel_refuses_is_told(target: Path) -> None:
    headers = {"SCHILY.xattr.security.capability": "not a capability"}
    error = refusal(target, tar(member("x", data=b"1", pax_headers=headers)))
    assert isinstance(error, StepFailed)
    assert error.path == "x"


# The child


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    done = in_private_mounts(
        """
        import subprocess, sys
        from pathlib import Path
        from crio_native.errors import ResourceExhausted
        from crio_native.images.unpacking import unpack
        from tests.images_support import member, tar

        target = Path(sys.argv[1])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", target], check=True)
        try:
            unpack(target, [tar(member("big", data=b"x" * (3 << 20)))], what="layer x")
        except ResourceExhausted as error:
            print(error)
        """,
        tmp_path,
    )
    assert "layer x: no space left on the device (ENOSPC) while unpacking 'big'" in done.stdout
