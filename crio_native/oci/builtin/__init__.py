"""The built-in executor: spec -> Plan -> launcher -> running container.

`plan` computes (pure), `runtime` is the daemon's side, which asks by `launchers`; `launcher` is the warm process that
clones, `init` what runs in the clone, `steps` the single acts of it, `parent` what the init has its parent do, `wire`
their packets.  `standalone` is the same executor as a command line, without daemon and launchers.

What a launcher imports is copied page by page into every container's init: ctypes and the C halves of modules
(`_socket`, `_signal`, `_json`, `_prctl`), never `typing`, `dataclasses`, `json`, `socket` or `re`.
"""
