"""The unpacker's confinement, tried from inside by a program that wants out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import crio_native

pytestmark = pytest.mark.root

ESCAPES = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from crio_native.images.unpacker.run import CAPABILITIES
from crio_native.linux import capabilities, confine, syscalls

os.mknod(sys.argv[2] + "/zero", 0o020666, os.makedev(1, 5))
with open(sys.argv[2] + "/program", "wb") as file:
    file.write(b"#!/program\\n")
os.chmod(sys.argv[2] + "/program", 0o755)
confine.limit_resources(memory=1 << 30, files=64, file_size=1 << 20, cpu=60)
if (child := confine.bear_alone()):
    sys.exit(os.waitpid(child, 0)[1])
confine.into_directory(sys.argv[2], CAPABILITIES)

def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__

print(json.dumps({
    "root": sorted(os.listdir("/")),
    "above": sorted(os.listdir("/../..")),
    "passwd": attempt(lambda: open("/etc/passwd")),
    "device": attempt(lambda: open("/zero", "rb")),
    "new device": attempt(lambda: (os.mknod("/disk", 0o060660, os.makedev(259, 0)), open("/disk", "rb"))),
    "exec": attempt(lambda: os.execv("/program", ["program"])),
    "mount": attempt(lambda: syscalls.mount("proc", "/", "proc", 0)),
    "remount": attempt(lambda: syscalls.mount(None, "/", None, 32 | 4096)),
    "unshare": attempt(lambda: syscalls.unshare(syscalls.CLONE_NEWNS)),
    "chroot": attempt(lambda: os.chroot("/")),
    "trusted": attempt(lambda: os.setxattr("/", "trusted.overlay.opaque", b"y")),
    "network": attempt(lambda: socket.socket().connect(("127.0.0.1", 1))),
    "links": [name for _, name in socket.if_nameindex()],
    "parent": [os.getpid(), attempt(lambda: os.kill(int(sys.argv[3]), 0))],
    "capabilities": [capabilities.names(bits) for bits in syscalls.capget()],
    "large": attempt(lambda: os.truncate("/program", 2 << 20)),
}), flush=True)
os._exit(0)
"""


def test_nothing_is_left_to_reach(tmp_path: Path) -> None:
    package = Path(crio_native.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", ESCAPES, package, tmp_path, os.getpid()]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP"]
    refused = "PermissionError"
    assert found == {
        "root": ["program", "zero"],
        "above": ["program", "zero"],
        "passwd": "FileNotFoundError",
        "device": refused,
        "new device": refused,
        "exec": refused,
        "mount": refused,
        "remount": refused,
        "unshare": refused,
        "chroot": refused,
        "trusted": refused,
        "network": "OSError",
        "links": ["lo"],
        "parent": [1, "ProcessLookupError"],
        "capabilities": [kept, kept, []],
        "large": "OSError",
    }
