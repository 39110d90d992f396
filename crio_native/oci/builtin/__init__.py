"""The built-in executor: spec -> Plan -> launcher -> running container.

`plan` computes (pure), `client` is the daemon's side, `launcher` the warm process that clones, `init` what runs in
the clone, `steps` the single acts of it.  `launcher`, `init` and `steps` are imported by the launcher and must stay
small: ctypes, prctl, json, socket and nothing heavier.
"""
