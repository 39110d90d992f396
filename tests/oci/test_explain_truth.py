"""What an explanation says is what happens: a launcher that notes every call, against the explained ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from crio_native.oci.builtin import launchers as warm
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.explain import INIT, explain

from ..apart import MARK
from . import observed
from .conftest import Box

pytestmark = pytest.mark.root

# Calls that change something and that the observer can see; the others are made inside of C modules.
SEEN = frozenset(
    "mount umount2 pivot_root chroot chdir fchdir unshare setns open_tree move_mount mount_setattr fsopen fsconfig "
    "fsmount mknodat symlinkat fchownat sethostname setdomainname keyctl setsid setgroups setresgid setresuid umask "
    "capset seccomp execve personality".split()
)
CONDITIONAL = re.compile(r"\b(when|where|unless|for each|or the mount point|on EPERM)\b")
USERS = [{"containerID": 0, "hostID": 100000, "size": 65536}]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observed") / "calls"


@pytest.fixture(scope="module")
def runtime(notes: Path) -> Iterator[BuiltinRuntime]:
    with mock.patch.object(warm, "BOOT", observed.BOOT.format(str(notes))):
        launchers = Launchers(1)
        launchers.start()
        yield BuiltinRuntime(launchers)
        launchers.stop()


def plain(spec: dict[str, Any], directory: Path) -> None:
    pass


def rich(spec: dict[str, Any], directory: Path) -> None:
    spec["domainname"] = "example"
    spec["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(directory), "options": ["rbind", "ro", "rnosuid"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    ]
    spec["process"] |= {"noNewPrivileges": False, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 99}]}
    spec["root"]["readonly"] = True
    spec["linux"] |= {
        "cgroupsPath": f"/{MARK}explained",
        "sysctl": {"kernel.msgmax": "9000"},
        "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "uid": 7}],
        "personality": {"domain": "LINUX"},
    }


def with_terminal(spec: dict[str, Any], directory: Path) -> None:
    spec["process"] |= {"terminal": True, "consoleSize": {"height": 24, "width": 80}}


def in_user_namespace(spec: dict[str, Any], directory: Path) -> None:
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"] |= {"uidMappings": USERS, "gidMappings": USERS}
    directory.chmod(0o755)
    (directory / "rootfs").chmod(0o755)


@pytest.mark.parametrize("change", [plain, rich, with_terminal, in_user_namespace])
def test_the_explained_calls_are_those_that_happen(box: Box, notes: Path, change: Any) -> None:
    spec = box.spec("true")
    change(spec, box.directory)
    notes.write_text("")
    container = box.create(spec)
    container.start().wait()
    explained = [row for row in explain(container.spec.spec, name=container.spec.id).rows if row.process == INIT]
    # What is explained is crio-oci's way: the daemon has its groups made meanwhile, and looks for the command late.
    explained = [row for row in explained if row.step != "find_command"]
    its_own = ("await_cgroup", "find_command")
    happened = [(name, made) for name, made in steps_of(notes.read_text()) if name not in its_own]
    assert [row.step for row in explained] == [name for name, _ in happened]
    for row, (name, calls) in zip(explained, happened, strict=True):
        said = {call for line in row.calls for call in re.findall(r"\b(\w+)\(", line)} & SEEN
        certain = {
            call for line in row.calls if not CONDITIONAL.search(line) for call in re.findall(r"\b(\w+)\(", line)
        } & SEEN
        assert calls <= said, f"{name} made calls that are not explained: {calls - said}"
        assert certain <= calls, f"{name} did not make calls that are explained: {certain - calls}"


def steps_of(text: str) -> list[tuple[str, set[str]]]:
    """The notes of one init: (step, its calls), in order."""
    found: list[tuple[str, set[str]]] = []
    for line in text.splitlines():
        kind, name = line.split()
        if kind == "step":
            found.append((name, set()))
        elif found:
            found[-1][1].update({name} & SEEN)
    return found
