"""What runc and crun say of a value that the kernel refuses: what is known of it, and what stays as it is."""

from __future__ import annotations

import errno

import pytest

from crio_native.errors import StepFailed
from crio_native.oci.refusals import as_step

RUNC = "runc says: runc create failed: unable to start container process: "
INIT = RUNC + "error during container init: "
CPUSET = 'failed to write "4000": write /sys/fs/cgroup/cpuset/pod/crio-1/cpuset.cpus: '


@pytest.mark.parametrize(
    ("said", "step", "number", "path"),
    [
        (INIT + 'error mounting "/a" to rootfs at "/etc": mount /a:/etc: not a directory', "bind", "ENOTDIR", "/etc"),
        ("crun says: mount `/tmp` to `etc/passwd`: Not a directory", "bind", "ENOTDIR", "/etc/passwd"),
        (INIT + "mkdir /etc/passwd: not a directory", "change_directory", "ENOTDIR", "/etc/passwd"),
        (
            INIT + 'chdir to cwd ("/root") set in config.json failed: permission denied',
            "change_directory",
            "EACCES",
            "",
        ),
        ("crun says: chdir `/no`: No such file or directory", "change_directory", "ENOENT", "/no"),
        (RUNC + CPUSET + "numerical result out of range\n", "cgroup", "ERANGE", ""),
        ("crun says: writing file `cpuset.mems`: Invalid argument", "cgroup", "EINVAL", ""),
        ("crio-oci says: step 'bind' failed on /a b with EISDIR (is a directory): a file", "bind", "EISDIR", "/a b"),
        ("crio-oci says: step 'mask_paths' failed with EINVAL (invalid argument)", "mask_paths", "EINVAL", ""),
    ],
)
def test_what_is_known(said: str, step: str, number: str, path: str) -> None:
    made = as_step(StepFailed("create", 0, "", said))
    assert (made.step, made.number) == (step, getattr(errno, number))
    assert made.path == path or not path
    assert made.detail.startswith("linux.resources.cpu.") or step != "cgroup"


@pytest.mark.parametrize(
    "said",
    [
        "",
        INIT + 'error mounting "/a" to rootfs at "/b": operation not permitted',
        INIT + "error creating device nodes: mkdir /rootfs/etc/passwd: not a directory",
        RUNC + CPUSET + "no such file or directory",
        RUNC + 'exec: "/no/such": stat /no/such: no such file or directory',
        "crun says: chdir `/home`: Input/output error",
        "crio-oci says: linux.resources.unified: must be",
    ],
)
def test_what_is_not_known_stays(said: str) -> None:
    error = StepFailed("create", 0, "", said)
    assert as_step(error) is error
