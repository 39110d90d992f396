"""The runtime handlers: which executor serves a name of [crio.runtime.runtimes], what it can do, or why it cannot run.

An executor is made by its handler's `runtime_type`: a new type is one more function in `TYPES`.  Each is asked once, at
start-up, whether it can run at all, so that a broken one is known before its first pod.  A pod keeps the part of its
handler that its containers are managed with (`HandlerRecord`): it can be stopped and removed when the configuration
has changed, or has no such handler any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.external.conmon import ConmonRuntime, is_conmon
from crio_native.oci.external.runtime import ExternalRuntime
from crio_native.oci.runtime import Abilities, Runtime
from crio_native.pods.records import HandlerRecord, Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What of the node executors are made with."""

    launchers: Launchers
    layout: Layout
    settings: RuntimeTable


@dataclass(frozen=True, slots=True)
class Handler:
    """A configured handler.  problem: why it cannot run, "" if it can; `abilities` then say what it can do."""

    name: str
    settings: RuntimeHandler
    runtime: Runtime
    abilities: Abilities = field(default_factory=Abilities)
    problem: str = ""

    @property
    def program(self) -> str:
        """The program that makes the containers, "" for none."""
        return str(getattr(self.runtime, "program", ""))

    def told(self) -> dict[str, Any]:
        """What an operator wants to know of it, as JSON data."""
        return {
            "type": self.settings.runtime_type,
            "program": self.program,
            "version": self.abilities.version,
            "problem": self.problem,
            "recursiveReadOnlyMounts": self.abilities.recursive_read_only_mounts,
            "userNamespaces": self.abilities.user_namespaces,
            "features": dict(self.abilities.features),
        }


def _builtin(name: str, settings: RuntimeHandler, parts: Parts) -> Runtime:
    return BuiltinRuntime(
        parts.launchers,
        cgroup_manager=parts.settings.cgroup_manager,
        monitor_cgroup=settings.monitor_cgroup,
        create_timeout=settings.container_create_timeout,
        sync_log=not settings.no_sync_log,
        pivot=not parts.settings.no_pivot,
    )


def _oci(name: str, settings: RuntimeHandler, parts: Parts) -> Runtime:
    scratch = parts.layout.runroot / "exec"
    kind = ConmonRuntime if is_conmon(settings.monitor_path) else ExternalRuntime
    return kind(name, settings, parts.settings, parts.launchers, scratch=scratch, bundle=parts.layout.bundle)


def _vm(name: str, settings: RuntimeHandler, parts: Parts) -> Runtime:
    from crio_native.oci.shim.runtime import ShimRuntime  # only who configures one pays for it

    manager = parts.settings.cgroup_manager
    return ShimRuntime(name, settings, parts.launchers, parts.layout.runroot / "containers", cgroup_manager=manager)


Make = Callable[[str, RuntimeHandler, Parts], Runtime]
TYPES: Mapping[str, Make] = {"builtin": _builtin, "oci": _oci, "vm": _vm}


class Handlers(Mapping[str, Handler]):
    """The handlers by name."""

    def __init__(self, parts: Parts) -> None:
        """Make and ask each.  Raises FailedPrecondition when the default handler cannot run."""
        self._parts = parts
        self._handlers = self._all_probed(parts.settings.runtimes)
        self._of_platforms: dict[tuple[str, str], Handler] = {}
        self._of_records: dict[tuple[str, HandlerRecord], Runtime] = {}
        # The pause process of a pod needs no image, and nothing that a runtime's program could do better.
        self.pause: Runtime = _builtin("", RuntimeHandler(runtime_type="builtin"), parts)
        self._default = _runnable(self._handlers, parts.settings.default_runtime)

    def reload(self, settings: RuntimeTable) -> None:
        """Take the handlers of a new configuration; those that are configured as before stay as they are.

        Raises FailedPrecondition when the new default cannot run; then nothing changes.
        """
        known = {name: each for name, each in self._handlers.items() if settings.runtimes.get(name) == each.settings}
        handlers = known | self._all_probed({n: each for n, each in settings.runtimes.items() if n not in known})
        self._default = _runnable(handlers, settings.default_runtime)
        self._handlers = handlers
        self._of_platforms = {}

    def __getitem__(self, name: str) -> Handler:
        return self._handlers[name]

    def __iter__(self) -> Any:
        return iter(self._handlers)

    def __len__(self) -> int:
        return len(self._handlers)

    def usable(self, name: str, program: str = "") -> Handler:
        """The handler for a new pod; "" is the default.

        program: a key of the handler's platform_runtime_paths, whose program is to be used.  Raises InvalidArgument
        for a name that is not configured, FailedPrecondition for a handler that cannot run.
        """
        handler = self._handlers.get(name or self._default)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            raise InvalidArgument("runtime_handler", name, f"no such handler is configured; there are: {known}")
        if program:
            handler = self._with_program(handler, program)
        if handler.problem:
            raise FailedPrecondition(f"runtime_handler {handler.name!r} cannot run: {handler.problem}")
        return handler

    def settings_of(self, name: str) -> RuntimeHandler:
        """A handler's configuration, also when it cannot run; the default of each key when there is no such handler."""
        handler = self._handlers.get(name)
        return handler.settings if handler else RuntimeHandler()

    def _with_program(self, handler: Handler, platform: str) -> Handler:
        paths = handler.settings.platform_runtime_paths
        if platform not in paths:
            known = ", ".join(sorted(paths)) or "none"
            raise InvalidArgument(
                "config.annotations", platform, f"is no platform of handler {handler.name!r}; there are: {known}"
            )
        if (handler.name, platform) not in self._of_platforms:
            settings = replace(handler.settings, runtime_path=paths[platform])
            self._of_platforms[handler.name, platform] = self._probed(handler.name, settings)
        return self._of_platforms[handler.name, platform]

    def of(self, name: str, record: HandlerRecord | None) -> Runtime:
        """The executor of a pod's containers.  Raises InvalidArgument when neither record nor name tells."""
        handler = self._handlers.get(name)
        if handler is not None and record in (None, HandlerRecord.of(handler.settings)):
            return handler.runtime
        if record is None:
            raise InvalidArgument(
                "runtime_handler", name, "is not configured any more, and the pod kept no record of it"
            )
        if (name, record) not in self._of_records:
            log.info("handler %s was another when its pods were made; they are managed with %s", name, record)
            self._of_records[name, record] = TYPES[record.runtime_type](name, record.settings(), self._parts)
        return self._of_records[name, record]

    def _all_probed(self, settings: Mapping[str, RuntimeHandler]) -> dict[str, Handler]:
        """All at once: a program that hangs has ten seconds for each question, and the socket waits for all."""
        with ThreadPoolExecutor(max(len(settings), 1), "probe") as pool:
            return dict(zip(settings, pool.map(self._probed, settings, settings.values()), strict=True))

    def _probed(self, name: str, settings: RuntimeHandler) -> Handler:
        runtime = TYPES[settings.runtime_type](name, settings, self._parts)
        try:
            return Handler(name, settings, runtime, abilities=runtime.abilities())
        except CrioError as error:
            log.error("handler %s cannot run: %s", name, error)
            return Handler(name, settings, runtime, problem=str(error))


def _runnable(handlers: Mapping[str, Handler], default: str) -> str:
    if problem := handlers[default].problem:
        raise FailedPrecondition(f"crio.runtime.default_runtime: the handler {default!r} cannot run: {problem}")
    return default
