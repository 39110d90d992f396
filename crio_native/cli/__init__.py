"""The command lines: the daemon's verbs and crioctl, the CRI client for people.

crioctl (`crioctl.py` and `ctl/`) imports nothing of ours but `api`, `errors`, `standard_streams` and the version: it
speaks only CRI.
"""
