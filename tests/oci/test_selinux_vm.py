"""Containers under an SELinux policy that is enforced: a level keeps one pod's files from another's processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import StepFailed
from crio_native.pods import selinux

from .conftest import Box
from .selinux_policy import load

# A boot of its own: who loads a policy cannot unload it for others.
pytestmark = pytest.mark.vm(lsm="selinux", memory="1025M")

PROCESS = "system_u:system_r:container_t"
FILES = "system_u:object_r:container_file_t"


@pytest.fixture(scope="module", autouse=True)
def policy(tmp_path_factory: pytest.TempPathFactory) -> None:
    load(tmp_path_factory.mktemp("policy"))


def reader(box: Box, volume: Path, level: str) -> dict[str, Any]:
    spec = box.spec("sh", "-c", "cat /proc/self/attr/current; echo; cat /volume/deep/file; echo new > /volume/made")
    spec["process"]["selinuxLabel"] = f"{PROCESS}:{level}"
    spec["mounts"].append({"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind"]})
    return spec


def test_levels_keep_pods_apart(box: Box, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "deep").mkdir(parents=True)
    (volume / "deep/file").write_text("secret\n")
    selinux.relabel(str(volume), f"{FILES}:s0:c1,c2")
    own = box.run(spec=reader(box, volume, "s0:c1,c2"))
    assert own.output().replace("\0", "") == f"{PROCESS}:s0:c1,c2\nsecret\n"
    made = os.getxattr(volume / "made", "security.selinux").decode().rstrip("\0")
    assert made.endswith(":s0:c1,c2")
    other = box.run(spec=reader(box, volume, "s0:c1,c3"))
    assert other.output().replace("\0", "") == f"{PROCESS}:s0:c1,c3\n"
    assert other.output("stderr").count("Permission denied") == 2


def test_a_label_that_the_policy_does_not_know_is_refused(box: Box) -> None:
    spec = box.spec("true")
    spec["process"]["selinuxLabel"] = "system_u:system_r:no_such_t:s0"
    with pytest.raises(StepFailed, match="write_labels"):
        box.create(spec)
