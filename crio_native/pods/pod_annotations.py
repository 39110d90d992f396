"""The annotations by which a pod may change how it is run: CRI-O's, in their old and new names.

One takes effect only where the pod's handler, or its workload, allows it (`allowed_annotations`); all others are the
user's own data and mean nothing here (CVE-2024-3154).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import replace

from crio_native.config.tables import RuntimeHandler, Workload, WorkloadResources
from crio_native.config.values import parse_cpuset, parse_device, parse_size
from crio_native.errors import InvalidArgument
from crio_native.pods.values import Device, Resources

# The annotation's name here -> its new and its old name; those of one container have "/NAME" or ".NAME" added.
NAMES = {
    "devices": ("devices.crio.io", "io.kubernetes.cri-o.Devices"),
    "shm_size": ("shm-size.crio.io", "io.kubernetes.cri-o.ShmSize"),
    "umask": ("umask.crio.io", "io.kubernetes.cri-o.umask"),
    "unified": ("unified-cgroup.crio.io", "io.kubernetes.cri-o.UnifiedCgroup"),
    "cgroup_rw": ("cgroup2-mount-hierarchy-rw.crio.io", "io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw"),
    "platform": ("platform-runtime-path.crio.io", "io.kubernetes.cri-o.PlatformRuntimePath"),
    "skip_relabel": ("try-skip-volume-selinux-label.crio.io", "io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel"),
    "seccomp_notifier": ("seccomp-notifier-action.crio.io", "io.kubernetes.cri-o.seccompNotifierAction"),
    "link_logs": ("link-logs.crio.io", "io.kubernetes.cri-o.LinkLogs"),
    "cpu_load_balancing": ("cpu-load-balancing.crio.io",) * 2,
    "cpu_quota": ("cpu-quota.crio.io",) * 2,
    "cpu_c_states": ("cpu-c-states.crio.io",) * 2,
    "cpu_freq_governor": ("cpu-freq-governor.crio.io",) * 2,
    "cpu_shared": ("cpu-shared.crio.io",) * 2,
    "irq_load_balancing": ("irq-load-balancing.crio.io",) * 2,
}
_SHM_LEAST = 4096
_PERIOD = 100_000


class Allowed:
    """The annotations of one pod, as seen by one of its containers, that are allowed to have an effect."""

    def __init__(
        self, of_pod: Mapping[str, str], handler: RuntimeHandler, workloads: Mapping[str, Workload], container: str = ""
    ) -> None:
        self._annotations, self._container = of_pod, container
        self.workload = next((w for w in workloads.values() if w.activation_annotation in of_pod), None)
        self._allowed = (*handler.allowed_annotations, *(self.workload.allowed_annotations if self.workload else ()))

    def get(self, what: str) -> tuple[str, str]:
        """(field, value) of an annotation by its name in `NAMES`; value "" where there is none, or it is not allowed.

        The container's own wins over the pod's, the new name over the old one.
        """
        new, old = NAMES[what]
        if not any(name.startswith(allowed) for name in (new, old) for allowed in self._allowed if allowed):
            return "", ""
        own = (f"{new}/{self._container}", f"{old}/{self._container}", f"{old}.{self._container}")
        for key in (*(own if self._container else ()), new, old):
            if key in self._annotations:
                return f"config.annotations[{key!r}]", self._annotations[key]
        return "", ""

    def passed_on(self) -> dict[str, str]:
        """Those that the handler's runtime, and not this program, acts on: by a beginning that is allowed.

        Never those in CRI-O's own name: tools believe what this program says there.
        """
        return {
            key: value
            for key, value in self._annotations.items()
            if any(key.startswith(allowed) for allowed in self._allowed if allowed)
            if not key.startswith("io.kubernetes.cri-o.")
        }

    def devices(self, permitted: tuple[str, ...]) -> list[Device]:
        """permitted: `allowed_devices`.  Raises InvalidArgument."""
        field, text = self.get("devices")
        found = []
        for part in filter(None, text.split(",")):
            try:
                device = parse_device(part)
            except ValueError as error:
                raise InvalidArgument(field, part, f"is no device: {error}") from None
            if device.host not in permitted:
                raise InvalidArgument(field, part, f"is none of crio.runtime.allowed_devices: {', '.join(permitted)}")
            found.append(Device(device.container, device.host, device.permissions))
        return found

    def shm_size(self) -> int:
        """Bytes of the pod's /dev/shm, 0 for the usual.  Raises InvalidArgument."""
        field, text = self.get("shm_size")
        if not text:
            return 0
        try:
            size = parse_size(text)
        except ValueError as error:
            raise InvalidArgument(field, text, f"is no size: {error}") from None
        if size < _SHM_LEAST:
            raise InvalidArgument(field, text, f"must be at least {_SHM_LEAST} bytes")
        return size

    def umask(self) -> int | None:
        field, text = self.get("umask")
        if not text:
            return None
        if not re.fullmatch(r"0?[0-7]{3}", text, re.ASCII):
            raise InvalidArgument(field, text, "is no umask; write it as 022 or 0022")
        return int(text, 8)

    def unified(self) -> dict[str, str]:
        """cgroup v2 files and their values: "memory.high=1000;io.max=BASE64".  Raises InvalidArgument."""
        field, text = self.get("unified")
        result = {}
        for part in filter(None, text.split(";")):
            name, equals, value = part.partition("=")
            if not equals:
                raise InvalidArgument(field, part, "is not FILE=VALUE")
            result[name] = _maybe_base64(value)
        return result

    def is_set(self, what: str) -> bool:
        return self.get(what)[1] == "true"

    def resources(self, asked: Resources) -> Resources:
        """What the pod's workload makes of a container's resources.  Raises InvalidArgument."""
        if self.workload is None:
            return asked
        limits = self.workload.resources
        key = f"{self.workload.annotation_prefix}/{self._container}"
        if self.workload.annotation_prefix and key in self._annotations:
            limits = _overridden(limits, self._annotations[key], f"config.annotations[{key!r}]")
        period = limits.cpuperiod or asked.cpu_period
        quota = limits.cpuquota or asked.cpu_quota
        if limits.cpulimit:
            period = period or _PERIOD
            quota = limits.cpulimit * period // 1000
        return replace(
            asked,
            cpu_shares=limits.cpushares or asked.cpu_shares,
            cpu_quota=quota,
            cpu_period=period,
            cpuset_cpus=limits.cpuset or asked.cpuset_cpus,
        )


def _maybe_base64(value: str) -> str:
    """A value with the annotation's own separators in it comes encoded."""
    try:
        return base64.b64decode(value, validate=True).decode() if len(value) % 4 == 0 and not value.isdigit() else value
    except (binascii.Error, UnicodeDecodeError):
        return value


def _overridden(limits: WorkloadResources, text: str, field: str) -> WorkloadResources:
    try:
        given = json.loads(text)
        numbers = {
            name: int(given[name]) for name in ("cpushares", "cpuquota", "cpuperiod", "cpulimit") if given.get(name)
        }
        cpuset = parse_cpuset(str(given.get("cpuset") or "")) or limits.cpuset
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidArgument(field, text, f"is no JSON object of resources: {error}") from None
    return replace(limits, cpuset=cpuset, **numbers)
