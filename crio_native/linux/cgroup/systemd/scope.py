"""A container's group as a transient scope: the Cgroup of hosts whose tree belongs to systemd."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import os

from crio_native.errors import AlreadyExists, StepFailed

from .. import resources
from ..group import STEP, Cgroup
from . import properties, units, variant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ... import bpf
    from .bus import Manager
    from .properties import Property

_HOLDER = "/bin/cat"


def check() -> None:
    """Raises FailedPrecondition or Unavailable when there is no systemd to talk to."""
    _manager(os.geteuid() != 0).close()


def _manager(user: bool) -> Manager:
    from .bus import Manager  # most uses of a group need no conversation

    return Manager(user)


class Scope(Cgroup):
    """The scope that ``slice:prefix:name`` names; it need not exist.  As Cgroup, but systemd makes and removes it."""

    def __init__(self, cgroups_path: str, annotations: Mapping[str, str] | None = None) -> None:
        """annotations: may ask for more properties; what they ask for is trusted.  Raises InvalidArgument."""
        self._unit = units.parse(cgroups_path, os.geteuid() != 0)
        self._more = variant.of_annotations(annotations or {})
        self._holder: Holder | None = None
        super().__init__(self._unit.path)

    def begin(self) -> None:
        """Start the scope, held open until `release`.

        Raises AlreadyExists when there is such a unit, StepFailed, InvalidArgument for an annotation's value that
        systemd refuses; Unavailable, DeadlineExceeded, FailedPrecondition when it cannot be asked.
        """
        if self.exists() and (pids := self.processes()):
            raise AlreadyExists(f"systemd unit {self._unit.name} is in use by processes {pids[:5]}")
        self._holder = Holder()
        try:
            with _manager(self._unit.user) as manager:
                manager.start_scope(self._unit.name, self._properties(self._holder.pid))
            self._add_what_is_missing()
        except BaseException:
            self.release()
            raise

    def complete(self) -> None:
        """systemd has made it whole."""

    def _properties(self, pid: int) -> list[Property]:
        accounts = ("CPU", "Memory", "Tasks", "IO" if self._host.mode == "v2" else "BlockIO")
        own: dict[str, tuple[str, object]] = {
            "Description": ("s", f"container {self._unit.name.removesuffix('.scope')}"),
            "Slice": ("s", self._unit.slice),
            "PIDs": ("au", [pid]),
            "Delegate": ("b", True),  # what is below the group is not systemd's
            "DefaultDependencies": ("b", False),
            "CollectMode": ("s", "inactive-or-failed"),
            **{f"{name}Accounting": ("b", True) for name in accounts},
        }
        return list((own | dict(self._more)).items())

    def _add_what_is_missing(self) -> None:
        """The hierarchies and controllers that systemd does not care for."""
        first = self._host.mounts[0] + self.path
        if not any(os.path.isdir(directory) for directory in self._directories):
            raise StepFailed(STEP, 0, first, f"systemd has started {self._unit.name}, but its group is not there")
        for mount in self._host.mounts:
            if not os.path.isdir(mount + self.path):
                self._make(mount, self._made)
            elif mount == self._host.unified:
                self._delegate_controllers(mount + self.path)

    def release(self) -> None:
        """Whoever was to be born in the group has been: let its holder go."""
        if self._holder is not None:
            self._holder.end()
            self._holder = None

    def remove(self) -> None:
        """As `Cgroup.remove`, and the unit too, also when its group has gone."""
        self.release()
        super().remove()
        with _manager(self._unit.user) as manager:
            manager.stop(self._unit.name)

    def _announce(self, writes: Sequence[resources.Write]) -> None:
        self._set(properties.of_writes(writes))

    def _announce_devices(self, rules: Sequence[bpf.Rule]) -> None:
        with open("/proc/devices", encoding="ascii", errors="replace") as file:
            self._set(properties.of_devices(rules, file.read()))

    def _set(self, wanted: list[Property]) -> None:
        if wanted:
            with _manager(self._unit.user) as manager:
                manager.set_properties(self._unit.name, wanted)


class Holder:
    """A process that keeps a scope alive until a container's init is in it.

    systemd makes a scope only around processes that there are, and drops it when the last one leaves; but an init is
    to be born in a group that is there, limited, before it.  The holder is `cat` on a pipe of ours: when we end,
    however that is, so does it, and with it a scope that nothing else came into.
    """

    def __init__(self) -> None:
        read, self._pipe = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        moves = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in ((read, 0), (null, 1), (null, 2))]
        try:
            self.pid = os.posix_spawn(_HOLDER, ["cat"], {}, file_actions=moves)
        except OSError as error:
            os.close(self._pipe)
            raise StepFailed(STEP, error.errno or 0, _HOLDER, "a process to begin the scope with") from error
        finally:
            os.close(read)
            os.close(null)

    def end(self) -> None:
        os.close(self._pipe)
        try:
            os.kill(self.pid, _signal.SIGKILL)  # a clone of ours may have the pipe as well
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # somebody waits for any child here, and has had it
