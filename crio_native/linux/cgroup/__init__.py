"""Control groups: limits, accounting and collective signals, on hosts with cgroup v2, v1 or both, as they are found.

`hierarchy` finds what is mounted.  `Cgroup` is one group: made, limited, joined, read, killed, removed.  `resources`
turns OCI limits into file writes, `devices` turns device rules into either kernel's form, `stats` reads accounts.
`manager` turns an OCI cgroupsPath into a Cgroup and is the only place that knows who owns the tree.

Not here: which limits a pod gets (`pods/`), and what a limit that was hit means to Kubernetes.
"""

from .group import Cgroup
from .hierarchy import Hierarchy, hierarchy
from .manager import cgroup_of

__all__ = ["Cgroup", "Hierarchy", "cgroup_of", "hierarchy"]
