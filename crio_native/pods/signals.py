"""Signals by name, as images and the CRI write them: SIGTERM, TERM, 15, SIGRTMIN+3, SIGNAL_SIGRTMINPLUS3."""

from __future__ import annotations

import re
import signal

from crio_native.errors import InvalidArgument

_REALTIME = re.compile(r"RTM(IN|AX)(?:(?:\+|PLUS|-|MINUS)(\d{1,2}))?")
# glibc keeps 32 and 33 for itself, musl and the kernel's own numbering count from there: CRI-O's numbers.
_RTMIN, _RTMAX = 34, 64


def stop_signal(cri: str, image: str) -> int:
    """The signal that stops a container: the CRI's enum name, else the image's StopSignal, else SIGTERM."""
    if cri:
        return number(cri.removeprefix("SIGNAL_"), "config.stop_signal")
    return number(image, "the image's StopSignal") if image else int(signal.SIGTERM)


def number(text: str, field: str) -> int:
    """Raises InvalidArgument for what is no signal from 1 to 64."""
    name = text.upper().removeprefix("SIG")
    realtime = _REALTIME.fullmatch(name)
    if name.isascii() and name.isdecimal() and len(name) < 3:
        result = int(name)
    elif realtime:
        offset = int(realtime[2] or 0)
        result = _RTMIN + offset if realtime[1] == "IN" else _RTMAX - offset
    else:
        result = int(getattr(signal, f"SIG{name}", 0)) if name.isalnum() else 0
    if not 1 <= result <= 64:
        raise InvalidArgument(field, text, "is no signal name or number")
    return result
