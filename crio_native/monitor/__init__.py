"""The daemon's side of crio-monitor, the C program that is the parent of every container.

Here belongs how to start one, talk to its control socket and read how its container ended.  What it does itself is in
``helpers/``; who asks it, and when, in ``oci/``.  docs/architecture.md specifies the packets.
"""
