"""checkpoint and restore: by CRIU, where the host has it.

Saving a container's processes is CRIU's work; this host's packages decide whether it is there.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass
