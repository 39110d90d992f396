"""Containers that a shim runs (containerd's shim v2: Kata, or containerd's own over runc), one shim for each pod.

Here belongs what is special to shims: ttrpc, starting one and finding it again, the task service, and the Runtime made
of them.  The container's output goes through our own monitor in its `remote` mode, so that it is logged while no daemon
runs; pods/ does not know the difference.  What a shim needs of the host is in docs/runtimes.md.
"""
