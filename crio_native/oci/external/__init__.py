"""Containers made by an OCI runtime's program (runc, crun, or any with runc's command line) under our monitor.

`program` knows the command line, what comes back from it, and what that means; `runtime` is the `Runtime` made of it;
`runner` is what runs in a clone of a launcher, because the daemon itself never forks; it has its containers made by
`making`, or by conmon (`conmon_runner`).  Nothing here knows of pods.
"""
