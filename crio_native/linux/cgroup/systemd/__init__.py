"""The systemd cgroup manager: a container's group is a transient scope, which systemd makes, limits and removes.

`units` knows how names become units and paths, `properties` says limits in systemd's words, `variant` reads those of
annotations, `bus` talks to the manager, `scope` is the Cgroup that all this is for.

systemd lets nobody else make or remove groups in its tree, and writes its own idea of a unit's limits again whenever it
reloads: so each limit that it has a word for is told to it first, and then written exactly as on any other host.
"""

from .scope import Scope, check
from .units import slice_path

__all__ = ["Scope", "check", "slice_path"]
