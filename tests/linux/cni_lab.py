"""Plugins for the tests of CNI: Debian's, under their own names and others, and programs that behave as told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from crio_native.network import PodNetwork
from crio_native.network.cni.plugins import Limits

DEBIAN = Path("/usr/lib/cni")
SHORT = Limits(add=2, delete=2, check=2, gc=2, status=2, version=2)

# A plugin that writes down each call, hands ADD, DEL and CHECK to the plugin that it is told of, and adds nothing: what
# flannel does, and others that write a configuration of their own making for a plugin of somebody else.
DELEGATE = """\
#!{python} -IS
import json, os, subprocess, sys
config = json.load(sys.stdin)
command = os.environ["CNI_COMMAND"]
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls"), "a") as file:
    names = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH")
    json.dump({{"env": {{name: os.environ.get(name) for name in names}}, "config": config}}, file)
    file.write("\\n")
if command == "VERSION":
    print(json.dumps({{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}}))
elif command in ("STATUS", "GC"):
    state = os.path.join(os.path.dirname(sys.argv[0]), "not-ready")
    if command == "STATUS" and os.path.exists(state):
        print(json.dumps({{"cniVersion": "1.1.0", "code": 50, "msg": open(state).read()}}))
        sys.exit(1)
else:
    inner = {{**config["delegate"], "name": config["name"], "cniVersion": config["delegate"]["cniVersion"]}}
    if "prevResult" in config and command != "ADD":
        inner["prevResult"] = {{**config["prevResult"], "cniVersion": inner["cniVersion"]}}
    if "runtimeConfig" in config:
        inner["runtimeConfig"] = config["runtimeConfig"]
    places = (os.path.join(place, inner["type"]) for place in os.environ["CNI_PATH"].split(":"))
    program = next(path for path in places if os.path.exists(path))
    done = subprocess.run([program], input=json.dumps(inner).encode(), stdout=subprocess.PIPE)
    sys.stdout.buffer.write(done.stdout)
    sys.exit(done.returncode)
"""

# A plugin in shell whose body is the test's; VERSION is answered unless the test's body begins with it.
SHELL = """\
#!/bin/sh
here=$(dirname "$0")
echo "$CNI_COMMAND $CNI_CONTAINERID" >>"$here/called"
ok='{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}]}'
"""
VERSION = """\
if [ "$CNI_COMMAND" = VERSION ]; then
    echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}'
    exit 0
fi
"""


class Lab:
    """A configuration directory, a directory of plugins, and what they say they were called with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.network_dir, self.programs = directory / "net.d", directory / "bin"
        self.network_dir.mkdir()
        self.programs.mkdir()
        self.ipam_dir = directory / "ipam"

    def debian(self, **names: str) -> None:
        """Debian's plugins under their own names; `cni_bridge="bridge"` adds one as cni-bridge, which no list takes
        for the built-in one."""
        for path in DEBIAN.iterdir():
            (self.programs / path.name).symlink_to(path)
        for name, target in names.items():
            (self.programs / name.replace("_", "-")).symlink_to(DEBIAN / target)

    def delegating(self, name: str) -> None:
        self._install(name, DELEGATE.format(python=os.path.realpath(sys.executable)))

    def shell(self, name: str, body: str, *, version: str = VERSION) -> None:
        self._install(name, SHELL + version + body)

    def _install(self, name: str, text: str) -> None:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def write(self, *plugins: dict[str, Any], file: str = "10-test.conflist", name: str = "test", **more: Any) -> None:
        data = {"cniVersion": "1.0.0", "name": name, **more, "plugins": list(plugins)}
        (self.network_dir / file).write_text(json.dumps(data))

    def open(self, **more: Any) -> PodNetwork:
        """The network of a daemon that has started."""
        return PodNetwork.from_directory(
            network_dir=self.network_dir,
            plugin_dirs=[str(self.programs)],
            state_dir=self.directory / "state",
            cache_dir=self.directory / "cni",
            limits=more.pop("limits", None),
            **more,
        )

    def opened(self, **more: Any) -> PodNetwork:
        network = self.open(**more)
        network.collect(set(network._attachments.all()))
        return network

    def ipam(self, *subnets: str) -> dict[str, Any]:
        routes = [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets]
        ranges = [[{"subnet": subnet}] for subnet in subnets]
        return {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": str(self.ipam_dir)}

    def leased(self) -> set[str]:
        """Addresses that the program host-local has given out."""
        return {path.name for path in self.ipam_dir.glob("*/*[.:]*") if not path.name.startswith("last_")}

    def calls(self, command: str = "") -> list[dict[str, Any]]:
        """What delegating plugins were called with."""
        path = self.programs / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if command in ("", call["env"]["CNI_COMMAND"])]

    def called(self) -> list[str]:
        """The shell plugins' calls: command and container."""
        path = self.programs / "called"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("VERSION")]

    def results(self) -> dict[str, Any]:
        """The recorded attachments by file name; one may go while we look."""
        found = {}
        for path in (self.directory / "cni/results").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = json.loads(path.read_text())
        return found


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that mention the directory: what plugins left running."""
    done = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if str(directory) in line]
