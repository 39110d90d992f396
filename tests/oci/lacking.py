"""What a kernel without mount_setattr(2) refuses; run by `test_builtin_fallbacks` on one that seems to lack it."""

from __future__ import annotations

import pytest

from crio_native.errors import StepFailed
from crio_native.linux import trees

from ..machine import Machine
from .conftest import Box

pytestmark = pytest.mark.root


def test_recursive_attributes_and_id_mappings_are_refused(box: Box, leaks: Machine) -> None:
    assert not trees.HAVE_SETATTR
    mapping = [{"containerID": 0, "hostID": 0, "size": 10}]
    for more in ({"options": ["rbind", "rro"]}, {"options": ["bind", "idmap"], "uidMappings": mapping}):
        spec = box.spec()
        mount = {"destination": "/data", "type": "bind", "source": "/tmp", **more}
        if "uidMappings" in mount:
            mount["gidMappings"] = mapping
        spec["mounts"].append(mount)
        with pytest.raises(StepFailed, match=r"step 'bind' failed on .* with ENOSYS.*mount_setattr \(Linux 5.12\)"):
            box.create(spec)
