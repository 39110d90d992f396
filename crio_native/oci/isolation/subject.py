"""A live process as /proc shows it, and its root file system, read without leaving either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import NamedTuple

from crio_native.errors import NotFound
from crio_native.linux import inroot, mountinfo

READ_MAX = 4 << 20  # bytes of any one file
PF_EXITING = 0x4  # a process gives up its namespaces and its root before it is a zombie


class Probe(NamedTuple):
    """Something that a path of the container leads to.  at: where that is, symbolic links resolved."""

    descriptor: int
    status: os.stat_result
    at: str
    mount: mountinfo.Mount | None

    @property
    def mount_point(self) -> bool:
        return self.mount is not None and self.mount.point == self.at


class Subject:
    """Everything is read through one descriptor of /proc/PID, which never becomes another process's.  thread: one of
    the process's, for what each has by itself."""

    def __init__(self, pid: int, thread: int | None = None) -> None:
        """Raises NotFound when there is no such process."""
        self.pid = pid
        where = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
        try:
            self._proc = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise NotFound("process", str(pid)) from None
        self._root = -1

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for descriptor in (self._proc, self._root):
            if descriptor >= 0:
                os.close(descriptor)
        self._proc = self._root = -1

    def check_alive(self) -> None:
        """Raises NotFound when the process has ended, or is about to."""
        try:
            fields = self.text("stat").rpartition(")")[2].split()
            ended = fields[0] in "ZX" or bool(int(fields[6]) & PF_EXITING)
        except (OSError, IndexError):
            ended = True
        if ended:
            raise NotFound("process", str(self.pid), "it has ended")

    def text(self, name: str) -> str:
        """A file of /proc/PID.  Raises OSError."""
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with open(descriptor, "rb") as file:
            return file.read(READ_MAX).decode("utf-8", "surrogateescape")

    def link(self, name: str) -> str:
        return os.readlink(name, dir_fd=self._proc)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._proc)

    def names(self, directory: str) -> list[str]:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)

    @cached_property
    def status(self) -> Mapping[str, str]:
        """The fields of /proc/PID/status."""
        lines = self.text("status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def namespace(self, kind: str) -> tuple[int, int] | None:
        """Identity of a namespace of kind "net", "mnt", ...; None on a kernel without that kind."""
        try:
            found = self.stat(f"ns/{kind}")
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    @cached_property
    def cgroups(self) -> Mapping[str, str]:
        """Controller -> cgroup; the unified hierarchy is ""."""
        paths: dict[str, str] = {}
        for line in self.text("cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), path))
        return paths

    @cached_property
    def mounts(self) -> Mapping[int, mountinfo.Mount]:
        """What is mounted in the process's mount namespace, by id."""
        return {mount.id: mount for mount in mountinfo.parse(self.text("mountinfo"))}

    def mount_of(self, name: str) -> int:
        """Id of the mount that a link of /proc/PID ("cwd", "exe") leads to.  Raises OSError."""
        descriptor = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return mountinfo.id_of(descriptor)
        finally:
            os.close(descriptor)

    def probes(self, path: str, *, follow: bool = True) -> Iterator[Probe]:
        """What `path` leads to inside the root, or nothing; follow: also through a symlink at its end.  The descriptor
        is open until the next step of the loop.

        Symbolic links are followed below the root as the executor follows them; one that swings meanwhile can only
        show another part of the same root.  Raises OSError.
        """
        if self._root < 0:
            self._root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            descriptor = inroot.open_in_root(self._root, path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            at, status = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
            if status.st_nlink == 0:  # the file that was mounted has been replaced in its own directory
                at = at.removesuffix(" (deleted)")
            yield Probe(descriptor, status, at, self.mounts.get(mountinfo.id_of(descriptor)))
        finally:
            os.close(descriptor)
