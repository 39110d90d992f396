"""What holds between options: deprecated ones moved to their successors, inherited values, contradictions refused.

Everything here works on a built Config and knows nothing of files.  Nothing here looks at the host: a configuration
may be checked on another machine than the one it is for (`crio-native check` looks at the host).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from crio_native.config.render import inert
from crio_native.config.tables import METRICS, Config, MetricsTable, NetworkTable, RuntimeHandler, RuntimeTable
from crio_native.errors import InvalidArgument

PREDEFINED = ("crun", "runc")  # CRI-O has these without a table

Where = Callable[[str], str]  # dotted key -> "FILE: KEY"
Warn = Callable[[str], None]


def settle(config: Config, where: Where, warn: Warn) -> Config:
    """The configuration as it is used.  Raises InvalidArgument; settling twice changes nothing."""
    config = replace(config, runtime=_runtime(config.runtime, where), network=_network(config.network))
    if config.stats.stats_collection_period and not config.stats.collection_period:
        stats = replace(config.stats, collection_period=config.stats.stats_collection_period, stats_collection_period=0)
        config = replace(config, stats=stats)
    config = replace(config, metrics=_metrics(config.metrics, where, warn))
    if not config.runtime.enable_criu_support:
        config = replace(config, checkpoint_restore=replace(config.checkpoint_restore, container_level_enabled="none"))
    _check_state(config, where)
    _check_tls(config, where)
    _check_handlers(config.runtime, where, warn)
    for key, value, reason in inert(config):
        warn(f"{where(key)}: {value!r} has no effect: {reason}")
    return config


def _network(network: NetworkTable) -> NetworkTable:
    if not network.plugin_dir:
        return network
    dirs = network.plugin_dirs
    if network.plugin_dir not in dirs:
        dirs = (*dirs, network.plugin_dir)
    return replace(network, plugin_dirs=dirs, plugin_dir="")


def _metrics(metrics: MetricsTable, where: Where, warn: Warn) -> MetricsTable:
    """Names without prefixes; those of other versions' metrics are left out, as the files of OpenShift have some."""
    names = []
    for written in metrics.metrics_collectors:
        name = written.removeprefix("container_runtime_").removeprefix("crio_")
        if name in METRICS:
            names.append(name)
        else:
            warn(f"{where('crio.metrics.metrics_collectors')}: {written!r} is no metric here, ignored")
    return replace(metrics, metrics_collectors=tuple(dict.fromkeys(names)))


def _runtime(runtime: RuntimeTable, where: Where) -> RuntimeTable:
    if runtime.default_runtime in PREDEFINED:
        runtimes = {runtime.default_runtime: RuntimeHandler(), **runtime.runtimes}
        runtime = replace(runtime, runtimes=MappingProxyType(runtimes))
    # The default handler first: others may inherit what was settled for it.
    default = _handler(runtime.default_runtime, _default_handler(runtime, where), None, runtime)
    runtimes = {name: _handler(name, handler, default, runtime) for name, handler in runtime.runtimes.items()}
    return replace(runtime, runtimes=MappingProxyType(runtimes), conmon="", conmon_cgroup="", conmon_env=())


def _default_handler(runtime: RuntimeTable, where: Where) -> RuntimeHandler:
    name = runtime.default_runtime
    if name not in runtime.runtimes:
        raise InvalidArgument(
            where("crio.runtime.default_runtime"),
            name,
            f"must be a handler of crio.runtime.runtimes{_hint(name, runtime.runtimes)}",
        )
    return runtime.runtimes[name]


def _hint(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ": " + ", ".join(sorted(known)[:20])


def _handler(
    name: str, handler: RuntimeHandler, default: RuntimeHandler | None, runtime: RuntimeTable
) -> RuntimeHandler:
    if handler.inherit_default_runtime and default:
        handler = replace(
            handler,
            runtime_type=default.runtime_type,
            runtime_path=default.runtime_path,
            runtime_root=default.runtime_root,
        )
    handler = replace(handler, runtime_type=handler.runtime_type or "oci")
    if handler.runtime_type != "oci":
        return handler
    return replace(
        handler,
        runtime_root=handler.runtime_root or f"/run/{name}",
        monitor_path=handler.monitor_path or runtime.conmon,
        monitor_cgroup=handler.monitor_cgroup or runtime.conmon_cgroup,
        monitor_env=handler.monitor_env or runtime.conmon_env,
    )


def _check_state(config: Config, where: Where) -> None:
    if config.crio.root.rstrip("/") == config.crio.runroot.rstrip("/"):
        raise InvalidArgument(where("crio.runroot"), config.crio.runroot, "must differ from crio.root")


def _check_tls(config: Config, where: Where) -> None:
    api, metrics = config.api, config.metrics
    if api.stream_enable_tls and not (api.stream_tls_cert and api.stream_tls_key):
        raise InvalidArgument(
            where("crio.api.stream_enable_tls"), True, "must come with stream_tls_cert and stream_tls_key"
        )
    if bool(metrics.metrics_cert) != bool(metrics.metrics_key):
        given = "metrics_cert" if metrics.metrics_cert else "metrics_key"
        raise InvalidArgument(
            where(f"crio.metrics.{given}"), getattr(metrics, given), "must come with both metrics_cert and metrics_key"
        )


_WITHOUT_EFFECT = (
    ("builtin", "runtime_path", "the daemon makes the containers itself"),
    ("builtin", "monitor_env", "the monitor reads no environment"),
    ("vm", "monitor_env", "a shim runs the container, with the daemon's PATH"),
    ("vm", "monitor_cgroup", "a shim runs the container, in the group that it chooses"),
)


def _check_handlers(runtime: RuntimeTable, where: Where, warn: Warn) -> None:
    for name, handler in runtime.runtimes.items():
        at = f"crio.runtime.runtimes.{name}"
        if handler.runtime_type == "pod":
            raise InvalidArgument(
                where(f"{at}.runtime_type"),
                "pod",
                'must be builtin, oci or vm; use "builtin", which needs no conmon-rs',
            )
        for runtime_type, key, why in _WITHOUT_EFFECT:
            if handler.runtime_type == runtime_type and getattr(handler, key):
                warn(f"{where(f'{at}.{key}')}: has no effect with runtime_type {runtime_type}: {why}")
        if handler.runtime_type != "vm" and handler.runtime_config_path:
            raise InvalidArgument(
                where(f"{at}.runtime_config_path"),
                handler.runtime_config_path,
                "must not be set unless runtime_type is vm",
            )
        _check_monitor_cgroup(runtime, handler, where(f"{at}.monitor_cgroup"))


def _check_monitor_cgroup(runtime: RuntimeTable, handler: RuntimeHandler, where: str) -> None:
    cgroup = handler.monitor_cgroup
    if cgroup in ("", "pod"):
        return
    if runtime.cgroup_manager != "systemd":
        raise InvalidArgument(where, cgroup, 'must be "pod" or empty with cgroup_manager cgroupfs')
    if not cgroup.endswith(".slice") or "/" in cgroup:
        raise InvalidArgument(where, cgroup, 'must be "pod", the name of a systemd slice, or empty')
