"""Errors and warnings, in the forms that engines read: a file of text or JSON lines (`--log`), and standard error.

With --log the file gets a record with time and level, and standard error the words alone for people.
"""

from __future__ import annotations

import os
import time

from crio_native.errors import InvalidArgument, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import SimpleNamespace

LEVELS = ("debug", "info", "warning", "error")

_file = ""
_json = False
_least = "info"


def configure(options: SimpleNamespace) -> None:
    """Take --log, --log-format, --log-level and --debug.  Raises InvalidArgument."""
    global _file, _json, _least
    if options.log_format not in ("", "text", "json"):
        raise InvalidArgument("--log-format", options.log_format, "must be text or json")
    if options.log_level and options.log_level not in LEVELS:
        raise InvalidArgument("--log-level", options.log_level, f"must be one of {', '.join(LEVELS)}")
    _json = options.log_format == "json"
    _least = "debug" if options.debug else options.log_level or "info"
    _file = options.log
    if _file:
        try:
            os.close(os.open(_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644))
        except OSError as failure:
            why = f"cannot be written: {os.strerror(failure.errno or 0).lower()}"
            path, _file = _file, ""
            raise InvalidArgument("--log", path, why) from None


def error(text: str) -> None:
    _say("error", text)


def warning(text: str) -> None:
    _say("warning", text)


def debug(text: str) -> None:
    _say("debug", text)


def _say(level: str, text: str) -> None:
    if LEVELS.index(level) < LEVELS.index(_least):
        return
    text = printable(text)
    if _file:
        _append(_record(level, text))
    if _json and not _file:
        tell(_record(level, text))
    elif level == "error" or not _file:
        tell(f"crio-oci: {text}\n" if level == "error" else f"crio-oci: {level}: {text}\n")


def tell(text: str) -> None:
    """By the descriptor, so that nothing of what cannot be written is left; then the exit code has to do."""
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        pass


def _record(level: str, text: str) -> str:
    from crio_native.oci.builtin import wire

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if _json:
        return wire.encode({"level": level, "msg": text, "time": now}) + "\n"
    return f"time={wire.encode(now)} level={level} msg={wire.encode(text)}\n"


def _append(record: str) -> None:
    """A log that cannot be written must not hide what it was to tell: that goes to standard error too."""
    try:
        fd = os.open(_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, record.encode())
        finally:
            os.close(fd)
    except OSError as failure:
        tell(f"crio-oci: --log {_file}: {os.strerror(failure.errno or 0).lower()}: {record}")
