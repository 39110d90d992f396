"""start, kill, delete, pause, resume and state: one container, which exists, as a whole."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import os
import select
import sys

from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, StepFailed
from crio_native.linux.cgroup import cgroup_of, files, hierarchy
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.standalone import channel, log, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import SimpleNamespace

    from crio_native.linux.cgroup import Cgroup
    from crio_native.oci.builtin.standalone.state import State

END_SECONDS = 10.0  # for a killed init to be gone: the kernel takes its memory apart first


def start(options: SimpleNamespace) -> int:
    found = _load(options)
    status = found.status()
    if status != "created" or not channel.start(found):
        status = _load(options).status() if status == "created" else status
        what = {"stopped": "a container that has stopped", "running": "an already running container"}
        raise FailedPrecondition(f"cannot start {what.get(status, f'a container that is {status}')}: {found.id!r}")
    if found.record["hooks"]:
        _run_poststart(found)
    return 0


def _run_poststart(found: State) -> None:
    """A hook that fails is the container's end, and its removal (runtime-spec, lifecycle)."""
    from crio_native.oci.builtin.standalone import create

    try:
        create.poststart(found)
    except StepFailed:
        kill_init(found)
        remove(found)
        raise


def state_(options: SimpleNamespace) -> int:
    sys.stdout.write(_indented(_load(options).oci()) + "\n")
    return 0


def _indented(value: object, margin: str = "\n") -> str:
    """JSON of nested objects as runc prints it, without json: to import that takes longer than to ask for a state."""
    if not isinstance(value, dict) or not value:
        return wire.encode(value)
    inner = margin + "  "
    return (
        "{"
        + ",".join(f"{inner}{wire.encode(key)}: {_indented(item, inner)}" for key, item in value.items())
        + f"{margin}}}"
    )


def kill(options: SimpleNamespace) -> int:
    """To the init or, with --all and where the container has no PID namespace of its own, to every process."""
    found = _load(options)
    number = signal_number(options.arguments[1] if len(options.arguments) > 1 else "TERM")
    cgroup = found.cgroup
    if options.all and cgroup is not None:
        _signal_all(cgroup, number)
    else:
        pidfd = found.open_process()
        try:
            _signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            raise FailedPrecondition(f"container not running: {found.id!r} has just ended") from None
        finally:
            os.close(pidfd)
    if number == _signal.SIGKILL and cgroup is not None and cgroup.frozen():
        cgroup.thaw()
    return 0


def _signal_all(cgroup: Cgroup, number: int) -> None:
    if number == _signal.SIGKILL:
        cgroup.kill()
        return
    for pid in cgroup.processes():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def delete(options: SimpleNamespace) -> int:
    """Remove a container that has stopped, or never started; with --force any, and it is no error when it is gone.
    With --regex, all whose ids it matches anywhere; the first that cannot be removed ends it."""
    if not options.regex:
        return _delete(options)
    import re

    try:
        pattern = re.compile(options.arguments[0])
    except re.error as error:
        raise InvalidArgument("--regex", options.arguments[0], f"is no regular expression: {error}") from None
    for name in [name for name in state.ids(options.root) if pattern.search(name)]:
        options.arguments = [name]
        _delete(options)
    return 0


def _delete(options: SimpleNamespace) -> int:
    try:
        found = _load(options)
    except state.DoesNotExist as error:
        if not options.force:
            raise
        if error.half_made:
            state.clear(f"{options.root}/{error.name}")
        return 0
    except state.Damaged as error:
        if not options.force:
            raise
        log.warning(f"{error}: what can be known of it is removed, and no hook of it is run")
        _remove_damaged(options)
        return 0
    status = found.status()
    if status not in ("stopped", "created") and not options.force:
        raise FailedPrecondition(f"cannot delete container {found.id!r} that is not stopped: {status}")
    if found.alive():
        kill_init(found)
    remove(found)
    return 0


def _remove_damaged(options: SimpleNamespace) -> None:
    """A container without its state: all processes of its control group, the group, the directory.

    Which group that is the copy of its config.json tells, as it told `create`, with the same global flags.  Without
    that nobody knows: the group that has the container's name may be anybody's.
    """
    from crio_native.oci import spec as specs
    from crio_native.oci.builtin.standalone import create

    name = options.arguments[0]
    directory = f"{options.root}/{name}"
    try:
        spec = state.read_json(f"{directory}/config.json")
        specs.validate(spec)
        path, manager = create.group_of(spec.get("linux") or {}, name, options.cgroup_manager, options.rootless)
        if manager != "disabled":
            cgroup = cgroup_of(path, manager, spec.get("annotations") or {})
            if cgroup.exists():
                cgroup.kill()
            cgroup.remove()
    except (OSError, CrioError) as error:
        log.warning(f"container {name!r}: its control group is left, and what runs in it: {error}")
    state.clear(directory)


def remove(found: State) -> None:
    found.remove_cgroup()
    found.unmount()
    if found.remove() and found.record["hooks"]:
        from crio_native.oci.builtin.standalone import create

        create.poststop(found)


def kill_init(found: State) -> None:
    """SIGKILL, and wait until it is gone.  Raises StepFailed when it is not in 10 seconds."""
    try:
        pidfd = found.open_process()
    except FailedPrecondition:
        return
    try:
        _signal.pidfd_send_signal(pidfd, _signal.SIGKILL)
        _thaw(found)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(END_SECONDS * 1000):
            raise StepFailed("kill", 0, f"process {found.pid}", f"does not end within {END_SECONDS:g} s of SIGKILL")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _thaw(found: State) -> None:
    """On v1 a stopped process dies when it goes on, in whatever group somebody has put it."""
    mount = hierarchy().v1_freezer
    if not mount:
        return
    try:
        with open(f"/proc/{found.pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        group = next(path for _, controllers, path in lines if "freezer" in controllers.split(","))
        files.write(f"{mount}{group}/freezer.state", "THAWED")
    except (OSError, StopIteration):
        pass  # it has ended, or is in the root group, which nobody can stop


def pause(options: SimpleNamespace) -> int:
    found = _load(options)
    status = found.status()
    if status not in ("running", "created"):
        raise FailedPrecondition(f"container not running: {found.id!r} is {status}, so it cannot be paused")
    _cgroup(found).freeze()
    return 0


def resume(options: SimpleNamespace) -> int:
    found = _load(options)
    if found.status() != "paused":
        raise FailedPrecondition(f"container not paused: {found.id!r} is {found.status()}")
    cgroup = _cgroup(found)
    cgroup.thaw()
    if above := cgroup.frozen_ancestors():
        raise FailedPrecondition(f"container {found.id!r} stays paused: frozen above it is {', '.join(above)}")
    return 0


def _cgroup(found: State) -> Cgroup:
    cgroup = found.cgroup
    if cgroup is None:
        raise FailedPrecondition(f"container {found.id!r} was made without a cgroup, so it cannot be paused")
    return cgroup


def signal_number(text: str) -> int:
    """TERM, SIGTERM, term, 15, RTMIN+3; 0 asks only whether the process is there.  Raises InvalidArgument."""
    name, plus, offset = text.upper().removeprefix("SIG").partition("+")
    number = int(text) if text.isascii() and text.isdecimal() else getattr(_signal, f"SIG{name}", None)
    if plus and isinstance(number, int):
        number = number + int(offset) if name == "RTMIN" and offset.isdecimal() else None
    if not isinstance(number, int) or name.startswith("_") or (number not in _signal.valid_signals() and text != "0"):
        raise InvalidArgument("signal", text, "unknown signal: give a name like TERM, or a number")
    return number


def _load(options: SimpleNamespace) -> State:
    return state.load(options.root, options.arguments[0])
