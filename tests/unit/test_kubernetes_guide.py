"""docs/kubernetes.md and the files that it installs agree with what the program looks for."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from crio_native.config import Config, installed
from crio_native.config.loading import DEFAULT_FILE
from crio_native.monitor import client

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/kubernetes.md").read_text()
DESTINATIONS = {
    "build/crio-monitor": str(client._INSTALLED),
    "conf/seccomp.json": f"{installed.PLACES[-1]}/seccomp.json",
    "conf/crio.conf": str(DEFAULT_FILE),
    "conf/10-crio-native.conflist": f"{Config().network.network_dir.rstrip('/')}/10-crio-native.conflist",
    "conf/crictl.yaml": "/etc/crictl.yaml",
    "conf/crio-native.service": "/etc/systemd/system/crio-native.service",
}


def test_files_are_installed_where_the_program_looks_for_them() -> None:
    commands = [shlex.split(line) for line in re.findall(r"^    (install .*)$", GUIDE, re.MULTILINE)]
    assert {words[-2]: words[-1] for words in commands} == DESTINATIONS
    assert not [source for source in DESTINATIONS if source.startswith("conf/") and not (ROOT / source).exists()]


def test_every_endpoint_is_the_socket_that_is_served_by_default() -> None:
    served = f"unix://{Config().api.listen}"
    crictl = yaml.safe_load((ROOT / "conf/crictl.yaml").read_text())
    assert crictl["runtime-endpoint"] == crictl["image-endpoint"] == served
    assert set(re.findall(r"unix://\S+\.sock", GUIDE)) == {served}


@pytest.mark.parametrize("line", ["Type=notify", "KillMode=process", "ExecStart=/usr/bin/crio-native serve"])
def test_the_unit_keeps_what_the_guide_says(line: str) -> None:
    assert line in (ROOT / "conf/crio-native.service").read_text().splitlines()


def test_kubelet_and_daemon_are_told_the_same_cgroup_manager() -> None:
    drivers = set(re.findall(r"^\s+cgroupDriver: (\w+)$", GUIDE, re.MULTILINE))
    settings = re.findall(r"^    # /etc/crio/crio.conf.d/\S+\n((?:    .+\n)+)", GUIDE, re.MULTILINE)
    managers = [tomllib.loads(each)["crio"].get("runtime", {}).get("cgroup_manager") for each in settings]
    assert set(filter(None, managers)) == drivers
