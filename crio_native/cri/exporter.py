"""crio-native's own metrics for Prometheus, by CRI-O's names, where `crio.metrics` says.

The numbers are `counting`'s; the library that writes them down is imported with the first scrape, because most daemons
are never asked.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from crio_native.config import Config
from crio_native.cri import http
from crio_native.cri.counting import Counts
from crio_native.cri.front_door import claim_socket
from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound
from crio_native.pods.events import Events
from crio_native.streaming.reception import Reception

log = logging.getLogger(__name__)

PREFIX = "container_runtime_crio_"
_BACKLOG = 1024
_QUANTILES = (0.5, 0.9, 0.99)
_CONNECTIONS_MAX = 64  # that are being answered
_STRANGERS_MAX = 64  # that ask nothing


def listen(config: Config, port: int) -> tuple[Sequence[socket.socket], Callable[[], ssl.SSLContext] | None]:
    """Raises FailedPrecondition when the address cannot be had, InvalidArgument for a certificate that is none."""
    host, tls = config.metrics.metrics_host, _tls(config)
    try:
        return _listeners(host, port), tls
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise FailedPrecondition(f"metrics cannot be served on {host}:{port} ({why}); change crio.metrics") from None


def _tls(config: Config) -> Callable[[], ssl.SSLContext] | None:
    table, api = config.metrics, config.api
    if not table.metrics_cert:
        return None
    from crio_native.streaming.settings import TlsFiles
    from crio_native.streaming.tls import Tls

    files = TlsFiles(table.metrics_cert, table.metrics_key, "", api.tls_min_version, tuple(api.tls_cipher_suites))
    try:
        return Tls(files).context
    except InvalidArgument as error:
        raise InvalidArgument("crio.metrics.metrics_cert", table.metrics_cert, error.reason) from None


class Exporter:
    """Serves `/metrics` between `open` and `close`; does nothing where `crio.metrics.enable_metrics` is off."""

    def __init__(self, config: Config, counts: Counts, events: Events) -> None:
        self._config, self._counts, self._events = config, counts, events
        self._stack = ExitStack()

    async def open(self) -> None:
        """Raises as `listen`."""
        table = self._config.metrics
        if not table.enable_metrics:
            return
        listeners, tls = listen(self._config, table.metrics_port)
        self._serve(listeners, tls)
        if table.metrics_socket:
            claim_socket(table.metrics_socket, "crio.metrics.metrics_socket")
            behind = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            behind.bind(table.metrics_socket)
            self._stack.callback(_remove, table.metrics_socket)
            os.chmod(table.metrics_socket, 0o660)
            behind.listen(_BACKLOG)
            self._serve([behind], None)
        where = ", ".join("{}:{}".format(*listener.getsockname()[:2]) for listener in listeners)
        log.info("serving metrics on %s", where)

    def close(self) -> None:
        self._stack.close()

    def _serve(self, listeners: Sequence[socket.socket], tls: Callable[[], ssl.SSLContext] | None) -> None:
        async def serve(sock: socket.socket) -> None:
            await http.serve(sock, self.route, reception, tls)

        reception = Reception("metrics clients", serve, most=_CONNECTIONS_MAX, strangers=_STRANGERS_MAX)
        self._stack.callback(reception.hang_up)
        for listener in listeners:
            listener.setblocking(False)
            reception.open(listener)
            self._stack.callback(listener.close)
            self._stack.callback(reception.close, listener)

    async def route(self, path: str) -> http.Answer:
        if path != "/metrics":
            raise NotFound("path", path, "metrics are at /metrics")
        return await asyncio.to_thread(self._answer)

    def _answer(self) -> http.Answer:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return http.Answer(generate_latest(registry), CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Any]:
        """The chosen families; called by the library."""
        for name, make in _FAMILIES.items():
            if name in self._config.metrics.metrics_collectors:
                yield make(self, PREFIX + name)

    # The families

    def _total(self, name: str, text: str, value: Callable[[], float]) -> Any:
        from prometheus_client.core import Metric

        family = Metric(name.removesuffix("_total"), text, "counter")
        family.add_sample(name, {}, value())
        return family

    def _labelled(self, name: str, text: str, rows: Mapping[tuple[str, ...], float], *labels: str) -> Any:
        """Whatever the name ends in, it is told as it is: these are CRI-O's."""
        from prometheus_client.core import Metric

        family = Metric(name.removesuffix("_total"), text, "counter" if name.endswith("_total") else "gauge")
        for values, number in rows.items():
            family.add_sample(name, dict(zip(labels, values, strict=True)), number)
        return family

    def _operations(self, name: str, text: str, what: str) -> Any:
        rows: dict[tuple[str, ...], float] = {
            (call,): getattr(each, what) for call, each in dict(self._counts.operations).items()
        }
        return self._labelled(name, text, rows, "operation")

    def _latencies(self, name: str) -> Any:
        from prometheus_client.core import Metric

        family = Metric(name, "Latency of calls, in seconds, with quantiles of the recent ones.", "summary")
        for call, each in dict(self._counts.operations).items():
            for part in _QUANTILES:
                family.add_sample(name, {"operation": call, "quantile": str(part)}, each.quantile(part))
            family.add_sample(f"{name}_sum", {"operation": call}, each.seconds)
            family.add_sample(f"{name}_count", {"operation": call}, each.calls)
        return family

    def _layer_sizes(self, name: str) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(name, "Sizes of pulled layers, in bytes.")
        family.add_metric([], self._counts.layers.cumulative(), self._counts.layers.total)
        return family


def _rows(rows: Mapping[tuple[str, str], int]) -> dict[tuple[str, ...], float]:
    return {(first, second): number for (first, second), number in dict(rows).items()}


def _single(rows: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(label,): number for label, number in dict(rows).items()}


_FAMILIES: Mapping[str, Callable[[Exporter, str], Any]] = {
    "operations_total": lambda e, n: e._operations(n, "Calls.", "calls"),
    "operations_errors_total": lambda e, n: e._operations(n, "Calls that failed.", "errors"),
    "operations_latency_seconds": lambda e, n: e._operations(n, "Latency of the last call, in seconds.", "last"),
    "operations_latency_seconds_total": lambda e, n: e._latencies(n),
    "image_pulls_layer_size": lambda e, n: e._layer_sizes(n),
    "image_pulls_bytes_total": lambda e, n: e._labelled(
        n, "Bytes pulled.", _rows(e._counts.pulled_bytes), "mediatype", "size"
    ),
    "image_pulls_skipped_bytes_total": lambda e, n: e._labelled(
        n, "Bytes of layers that were here already.", _single(e._counts.skipped_bytes), "size"
    ),
    "image_pulls_failure_total": lambda e, n: e._labelled(
        n, "Pulls that failed, by error.", _single(e._counts.pull_failures), "error"
    ),
    "image_pulls_success_total": lambda e, n: e._total(n, "Pulls that succeeded.", lambda: e._counts.pulled),
    "image_layer_reuse_total": lambda e, n: e._labelled(
        n, "Layers that a pull found here already.", _single(e._counts.reused_layers), "name"
    ),
    "containers_events_dropped_total": lambda e, n: e._total(
        n, "Events that a slow subscriber did not get.", lambda: e._events.dropped
    ),
    "containers_oom_total": lambda e, n: e._total(
        n, "Containers that ended for want of memory.", lambda: e._counts.oom.total()
    ),
    "containers_oom_count_total": lambda e, n: e._labelled(
        n, "Ends for want of memory, by container.", _single(e._counts.oom), "name"
    ),
    "containers_seccomp_notifier_count_total": lambda e, n: e._labelled(
        n, "System calls that seccomp notified of.", dict(e._counts.forbidden_calls), "name", "syscall"
    ),
    "containers_stopped_monitor_count": lambda e, n: e._labelled(
        n, "Containers whose monitor died before them.", _single(e._counts.lost_monitors), "name"
    ),
    "resources_stalled_at_stage": lambda e, n: e._labelled(
        n, "Calls that ran out of time, by the stage that the work was in.", _single(e._counts.stalled), "stage"
    ),
    "processes_defunct": lambda e, n: e._labelled(n, "Zombies on the node.", {(): _defunct()}),
    "default_runtime": lambda e, n: e._labelled(
        n, "The default runtime handler.", {(e._config.runtime.default_runtime,): 1}, "runtime"
    ),
}


def _defunct() -> int:
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    count += file.read().rpartition(b") ")[2].startswith(b"Z")
            except OSError:
                continue
    return count


def _listeners(host: str, port: int) -> list[socket.socket]:
    """One for each of the host's addresses, of the families that the kernel has.  Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made = []
    with ExitStack() as stack:
        for family, where in {(family, where) for family, _, _, _, where in found}:
            try:
                made.append(stack.enter_context(socket.create_server(where, family=family, backlog=_BACKLOG)))
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    raise
        stack.pop_all()
    return made


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
