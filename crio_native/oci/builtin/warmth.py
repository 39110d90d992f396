"""Which pages of memory a start writes: learned from one, and written in advance by the spares that come after it.

A spare shares its launcher's pages until it writes them, which the kernel then copies, at some microseconds each.  The
same few hundred are written by every start, so a spare that waits anyway has them copied before it is needed.
"""

from __future__ import annotations

import _socket
import fcntl
import marshal

from crio_native.linux import donation, syscalls
from crio_native.oci.builtin import steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crio_native.oci.builtin.steps import Plan

_FILTERED = ("seccomp", "execute", "execute_pause")  # from the first of these on, system calls may be refused


class Lesson:
    """Taken in one start, and sent to the launcher as ("pages", kind, runs).

    Its descriptors are above all others, and it closes them itself.
    """

    _FIRST = 200

    def __init__(self, kind: str, news: _socket.socket) -> None:
        self._kind = kind
        self._news = fcntl.fcntl(news, fcntl.F_DUPFD_CLOEXEC, self._FIRST)
        self._pages = donation.Pages(self._FIRST)
        self.descriptors = [self._news, self._pages.descriptor]

    def before_the_filter(self, plan: Plan) -> Plan:
        """The plan with one more step, as late as it can be."""
        at = next((number for number, (name, _) in enumerate(plan) if name in _FILTERED), len(plan))
        return [*plan[:at], ("note_pages", {}), *plan[at:]]

    def acts(self) -> Mapping[str, Callable[..., None]]:
        return {**steps.STEPS, "note_pages": self._note}

    def _note(self, context: steps.Context) -> None:
        self.tell()

    def tell(self) -> None:
        """The pages that were written until now; nothing of the lesson stays open."""
        news = wire.channel(self._news)
        try:
            wire.send(news, marshal.dumps(("pages", self._kind, self._pages.written())))
        except OSError:
            pass  # the launcher has ended with its daemon: the container was created under another
        news.close()
        syscalls.close_range(self._FIRST)
