"""What a container's init has its parent do, until the parent becomes the monitor, or goes.

The words on the channel between the two, one packet each, while the plan has `duties`:

    B PID     "I am only your first child; PID is the init, and yours too"         no answer
    N         move the network devices into my network namespace                   k
    H         run the prestart and createRuntime hooks                             k
    D         that was all                                                         k
    E {...}   I failed, and end

What a duty consists of the parent knows from the request, not from the init, which may have stepped into a stranger's
namespaces by then.  A duty that fails is the end of the init.
"""

from __future__ import annotations

import os

from crio_native.linux import netlink
from crio_native.oci.builtin import hooks, steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Mapping
    from typing import Any


class Failed(Exception):
    """The init failed, or a duty did.  report: JSON of `errors.StepFailed.to_dict`.  init: the pid that it had, to be
    killed and waited for."""

    def __init__(self, report: bytes, init: int) -> None:
        super().__init__(report.decode())
        self.report, self.init = report, init


class Duties:
    """A plan's `duties`, and the process that they are done for.

    init: the pid of the process that speaks on `channel`; it changes when that announces another.
    """

    def __init__(self, channel: _socket.socket, init: int, duties: Mapping[str, Any]) -> None:
        self.channel, self.init, self.duties = channel, init, duties

    def serve(self) -> int:
        """Answer until the init says that it needs its parent no more, and waits for `release`; returns its pid.

        Raises Failed.
        """
        while True:
            packet, _ = wire.receive(self.channel)
            word, rest = packet[:1], packet[1:]
            if word == b"B":
                os.waitpid(self.init, 0)
                self.init = int(rest)
            elif word == b"N":
                self._do("move_net_devices", self._move_net_devices)
            elif word == b"H":
                self._do("parent_hooks", self._run_hooks)
            elif word == b"D":
                return self.init
            elif word == b"E":
                raise Failed(rest, self.init)
            else:
                raise self._failed("init", steps.Refused("", "the init ended before it was ready"))

    def release(self) -> None:
        """Let the init go on, once its pid is known to whoever looks after it from now on."""
        self.channel.send(b"k")

    def _do(self, step: str, duty: Any) -> None:
        try:
            duty()
        except Exception as error:
            raise self._failed(step, error) from None
        self.channel.send(b"k")

    def _move_net_devices(self) -> None:
        namespace = os.open(f"/proc/{self.init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            netlink.move_links(self.duties["net_devices"], namespace)
        finally:
            os.close(namespace)

    def _run_hooks(self) -> None:
        state = {**self.duties["state"], "pid": self.init}
        for kind, entries in self.duties["hooks"].items():
            try:
                # creating ends with step 2 of the specification's life cycle, and these hooks are its step 3
                hooks.run(kind, entries, {**state, "status": "created"} if kind == "prestart" else state)
            except hooks.HookFailed as error:
                raise steps.Refused(error.path, str(error), error.number) from None

    def _failed(self, step: str, error: BaseException) -> Failed:
        return Failed(wire.encode(steps.describe(step, error)).encode(), self.init)
