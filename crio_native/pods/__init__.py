"""Pods and containers: what they are, their life, their durable state, and what becomes of them at a restart.

    values       what a caller asks for, in the CRI's words
    records      what the program knows of a pod and a container, and where their things are
    store        the records on disk (state_database: the file)
    names        names, ids
    sandboxes    the life of a pod
    containers   the life of a container, and `ends`
    recovery     start-up: records against what exists
    spec*        configuration -> config.json, pure

Protobuf is not known here (`cri/` translates), nor is a system call but the mount of a pod's shared memory: `oci/`,
`network/` and `images/` act.
"""
