"""The parts of crioctl: one module a subject, each with its commands.

`client` is the connection, `find` turns what people type into ids, `parse` reads option values, `show` prints, `logs`
reads CRI log files; `run`, `containers`, `images` and `node` are the commands.
"""
