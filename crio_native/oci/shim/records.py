"""What is kept of a container's shim, in the container's run_dir: enough to speak to it again, and to undo it all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crio_native.oci.shim.bootstrap import Address

_NAME = "shim"


@dataclass(slots=True)
class Record:
    """bundle: the container's.  cgroup: its cgroupsPath.  address, shim_pid: only of a pod's first container, which has
    the pod's id; of an answer that never came they are missing.  made: whether the shim has made the container."""

    pod_id: str
    bundle: str
    cgroup: str
    address: Address | None = None
    shim_pid: int = 0
    shim_start_time: int = 0
    made: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> Record | None:
        try:
            fields = json.loads((run_dir / _NAME).read_bytes())
        except FileNotFoundError:
            return None
        address = fields.pop("address")
        return cls(**fields, address=Address(**address) if address else None)

    def write(self, run_dir: Path) -> None:
        temporary = run_dir / f"{_NAME}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.rename(run_dir / _NAME)

    @staticmethod
    def remove(run_dir: Path) -> None:
        (run_dir / _NAME).unlink(missing_ok=True)
