"""Usage as the CRI's messages: statistics and metrics.  What is unknown is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.translate import to_message
from crio_native.oci.runtime import Stats
from crio_native.pods.metrics import Sample
from crio_native.pods.records import Container, Pod
from crio_native.pods.stats import ContainerUsage, Interface, PodUsage

_DEFAULT_INTERFACE = "eth0"
_MICROSECOND = 1000  # the kernel's unit of stall times, in the CRI's


def container_stats(usage: ContainerUsage, mountpoint: str) -> Any:
    """A ContainerStats.  mountpoint: where the writable layers are."""
    result = pb.ContainerStats()
    _attributes(result.attributes, usage.container)
    if usage.reading is not None:
        _common(result, usage.reading, usage.nano_cores)
        _swap(result.swap, usage.reading)
    if usage.layer is not None:
        layer = result.writable_layer
        layer.timestamp, layer.fs_id.mountpoint = usage.layer.at, mountpoint
        layer.used_bytes.value, layer.inodes_used.value = usage.layer.used, usage.layer.inodes
    return result


def pod_stats(usage: PodUsage, mountpoint: str) -> Any:
    """A PodSandboxStats."""
    result = pb.PodSandboxStats()
    _attributes(result.attributes, usage.pod)
    linux = result.linux
    if usage.reading is not None:
        _common(linux, usage.reading, usage.nano_cores)
        if usage.reading.pids is not None:
            linux.process.timestamp, linux.process.process_count.value = usage.reading.timestamp, usage.reading.pids
    if usage.interfaces:
        linux.network.timestamp = usage.at
        default = next((i for i in usage.interfaces if i.name == _DEFAULT_INTERFACE), usage.interfaces[0])
        _interface(linux.network.default_interface, default)
        for interface in usage.interfaces:
            if interface is not default:
                _interface(linux.network.interfaces.add(), interface)
    linux.containers.extend(container_stats(container, mountpoint) for container in usage.containers)
    return result


def _attributes(message: Any, record: Pod | Container) -> None:
    message.id = record.id
    to_message(message.metadata, record.config.metadata)
    message.labels.update(record.config.labels)
    message.annotations.update(record.config.annotations)


def _common(message: Any, reading: Stats, nano_cores: int | None) -> None:
    """cpu, memory and io, which a ContainerStats and a LinuxPodSandboxStats both have."""
    message.cpu.timestamp = message.memory.timestamp = reading.timestamp
    _wrap(message.cpu.usage_core_nano_seconds, reading.cpu_usage)
    _wrap(message.cpu.usage_nano_cores, nano_cores)
    memory = message.memory
    _wrap(memory.usage_bytes, reading.memory_usage)
    _wrap(memory.working_set_bytes, reading.memory_working_set)
    _wrap(memory.rss_bytes, reading.memory_rss)
    _wrap(memory.page_faults, reading.page_faults)
    _wrap(memory.major_page_faults, reading.major_page_faults)
    if reading.memory_limit and reading.memory_working_set is not None:
        _wrap(memory.available_bytes, max(reading.memory_limit - reading.memory_working_set, 0))
    pressure = reading.extra.get("pressure") or {}
    if "io" in pressure:
        message.io.timestamp = reading.timestamp
    for resource, part in (("cpu", "cpu"), ("memory", "memory"), ("io", "io")):
        if resource in pressure:
            _pressure(getattr(message, part).psi, pressure[resource])


def _pressure(psi: Any, pressure: Mapping[str, Mapping[str, float]]) -> None:
    for kind, message in (("full", psi.Full), ("some", psi.Some)):
        if kind in pressure:
            read = pressure[kind]
            message.SetInParent()
            message.Total = int(read["total"]) * _MICROSECOND
            message.Avg10, message.Avg60, message.Avg300 = read["avg10"], read["avg60"], read["avg300"]


def _swap(swap: Any, reading: Stats) -> None:
    if reading.swap_usage is not None:
        swap.timestamp = reading.timestamp
        _wrap(swap.swap_usage_bytes, reading.swap_usage)
        limit = reading.extra.get("swap_limit")
        if limit is not None:
            _wrap(swap.swap_available_bytes, max(limit - reading.swap_usage, 0))


def _interface(message: Any, interface: Interface) -> None:
    message.name = interface.name
    message.rx_bytes.value, message.rx_errors.value = interface.rx_bytes, interface.rx_errors
    message.tx_bytes.value, message.tx_errors.value = interface.tx_bytes, interface.tx_errors


def _wrap(wrapper: Any, number: int | None) -> None:
    if number is not None:
        wrapper.value = number


def metrics(messages: Any, samples: Iterable[Sample], labels: tuple[str, ...], at: int) -> None:
    """Add Metric messages.  labels: the values that all of them begin with.  at: ns since the epoch."""
    for sample in samples:
        message = messages.add(
            name=sample.descriptor.name,
            timestamp=at,
            metric_type=pb.COUNTER if sample.descriptor.counter else pb.GAUGE,
            label_values=labels + sample.labels,
        )
        message.value.value = sample.value
