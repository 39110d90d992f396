"""The interpreter is not the attack surface: a process that enters a container runs from a file nobody can write to.

`helpers/crio-oci.c` starts the interpreter that way.  Here is the check, and what to do when it was started otherwise
(by a script that pip installed): start once more.  CVE-2019-5736 is what happens without.
"""

from __future__ import annotations

import fcntl
import os
import sys

import crio_native
from crio_native.errors import Internal
from crio_native.linux import process, syscalls

BOOT = "import sys; sys.path += {}; from crio_native.cli.oci import main; main({})"
_MARK = "crio-oci-again"


def protect(view: int) -> View:
    """Return in a process whose executable cannot be written to, and that no process of a container can look into.

    view: descriptor that it was started by, or -1.  Raises Internal when the kernel offers neither read-only detached
    mounts nor sealed files.
    """
    if not _is_unwritable():
        _start_again()
    # Who is not root stays dumpable, and so does the init that waits for its start.  The kernel would give our files in
    # /proc to root, and we have to write some; and while the init waits, its own user has to get at its namespaces: an
    # exec enters them, an engine sets up the network.  For that the kernel asks, of a process that is not dumpable, for
    # CAP_SYS_PTRACE in the user namespace that its program was started in: the host's, where he has none.
    if os.geteuid() == 0:
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    return View(view)


class View:
    """The descriptor that holds the interpreter's detached mount.

    The kernel takes milliseconds to close the last one (an RCU grace period), so that is done while a child works.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _is_unwritable() -> bool:
    if os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY:
        return True
    fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)
    except OSError:
        return False  # a file system without seals
    finally:
        os.close(fd)


def _start_again() -> None:
    if _MARK in sys._xoptions:
        raise Internal(f"the interpreter {sys.executable} cannot be started from a file that nobody can write to")
    program = process.unwritable_executable(os.path.realpath(sys.executable))
    import _prctl  # type: ignore[import-not-found]  # prctl's C half

    # Also where a finder of `site`'s, which is not there the second time, has found them.
    packages = [os.path.dirname(os.path.dirname(crio_native.__file__)), os.path.dirname(_prctl.__file__), *sys.path[1:]]
    os.set_inheritable(program, True)
    line = [sys.executable, "-I", "-S", "-X", _MARK, "-c", BOOT.format(repr(packages), program), *sys.argv[1:]]
    os.execve(program, line, os.environ)
