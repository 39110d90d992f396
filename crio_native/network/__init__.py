"""The pod network: addresses, links, routes and ports for pod sandboxes, made in the process by netlink.

Here belong the network's configuration (CNI lists), its records on disk, its acts on the kernel, and the running of CNI
plugins that are programs (`cni/`).  Making and pinning
the namespace itself is the launcher's, the pod's DNS files are `pods/`'s.  `pod_network.PodNetwork` is the way in.
"""

from crio_native.network.conflist import NetworkList
from crio_native.network.model import Attachment, PortMapping, Route
from crio_native.network.pod_network import PodNetwork

__all__ = ["Attachment", "NetworkList", "PodNetwork", "PortMapping", "Route"]
