"""The configuration: crio.conf and its drop-ins, with CRI-O's names, types and defaults.

`tables` declares every option once; parsing (`loading`), printing (`render`), the flags and the manual's tables all
follow from it.  A Config is immutable: a reload makes a new one.  What belongs elsewhere: looking at the host
(`crio-native check`), and registries.conf and policy.json, which are the images room's.
"""

from crio_native.config.loading import Loaded, load, socket_anyway
from crio_native.config.tables import Config, RuntimeHandler, Workload

__all__ = ["Config", "Loaded", "RuntimeHandler", "Workload", "load", "socket_anyway"]
