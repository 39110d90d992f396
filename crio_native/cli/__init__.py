"""The command lines: the daemon's verbs and crioctl, the CRI client for people.

crioctl (`crioctl.py` and `ctl/`) imports nothing of ours but `api`, `errors` and the version: it speaks only CRI.
"""
