"""What latency-sensitive containers change on the node while they run, and its putting back when they have ended.

The interrupts' default affinity (with irqbalance's list of banned CPUs), each CPU's longest wake-up and its frequency
governor.  A record in the run directory says, before anything is changed, whose change it is and what was there before:
a daemon that is killed leaves the next one all that it needs, and a reboot loses the records together with the changes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, StepFailed
from crio_native.linux.cgroup import Cgroup, hierarchy
from crio_native.pods.high_performance import Wishes

log = logging.getLogger(__name__)

_STEP = "tune_cpus"
_CPU = "/sys/devices/system/cpu/cpu{}/{}"
_LATENCY, _GOVERNOR = "power/pm_qos_resume_latency_us", "cpufreq/scaling_governor"
_BANNED = re.compile(r'^[ \t]*IRQBALANCE_BANNED_CPUS=["\']?([0-9a-fA-F,]*)["\']?[ \t]*$', re.MULTILINE)
_RESTART_SECONDS = 20.0


class Tuning:
    """Thread-safe.

    directory: of the records.  irqbalance, saved: `irqbalance_config_file` and `irqbalance_config_restore_file`.
    affinity: the kernel's file.
    """

    def __init__(
        self, directory: Path, irqbalance: str, saved: str, affinity: Path = Path("/proc/irq/default_smp_affinity")
    ) -> None:
        self._directory, self._irqbalance, self._affinity = directory, Path(irqbalance), affinity
        self._saved = Path(saved) if saved not in ("", "disable") else None
        self._lock = threading.Lock()

    def apply(self, container_id: str, wishes: Wishes) -> None:
        """Change what a container wishes, all or nothing of it.  Raises FailedPrecondition where the node lacks it,
        StepFailed."""
        files = dict(_files(wishes))
        if not files and not wishes.interrupt_free:
            return
        with self._lock:
            others = self._others(container_id)
            before = {path: text for record in others for path, text in record["files"].items()}
            record = {
                "files": {path: before.get(path) or _read(path) for path in files},
                "interrupts": wishes.interrupt_free,
            }
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._path(container_id).write_text(json.dumps(record))
            try:
                for path, value in files.items():
                    _write(path, value)
                if wishes.interrupt_free:
                    self._direct(away=wishes.interrupt_free)
            except BaseException:
                self._undo(container_id)
                raise

    def release(self, container_id: str) -> None:
        """Put back what no other container wants changed.  What the kernel refuses is logged: the container has ended
        all the same."""
        if self._path(container_id).exists():
            with self._lock:
                self._undo(container_id)

    def restore_irqbalance(self) -> None:
        """At the start: after a reboot no CPU is spared, so irqbalance shall ban what it did before the first container
        wished anything."""
        try:
            mask, _ = self._mask()
            now = self._banned()
        except (OSError, StepFailed):
            return  # no interrupts here, or no irqbalance
        if self._saved is None or now is None or mask != _all_cpus():
            return
        if not self._saved.exists():
            self._saved.write_text(now + "\n")
        elif (first := self._saved.read_text().strip()) != now:
            log.info("irqbalance bans the CPUs %r again", first)
            self._ban(first)

    def _undo(self, container_id: str) -> None:
        path = self._path(container_id)
        try:
            record, others = json.loads(path.read_bytes()), self._others(container_id)
        except FileNotFoundError:
            return
        kept = {name for other in others for name in other["files"]}
        spared = {cpu for other in others for cpu in other["interrupts"]}
        acts: list[Any] = [lambda n=n, v=v: _write(n, v) for n, v in record["files"].items() if n not in kept]
        back = [cpu for cpu in record["interrupts"] if cpu not in spared]
        for act in (*acts, *([lambda: self._direct(back=back)] if back else ())):
            try:
                act()
            except (StepFailed, OSError) as error:
                log.error("after container %s: %s", container_id, error)
        path.unlink()

    def _path(self, container_id: str) -> Path:
        return self._directory / f"{container_id}.json"

    def _others(self, container_id: str) -> list[dict[str, Any]]:
        own = self._path(container_id)
        return [json.loads(path.read_bytes()) for path in self._directory.glob("*.json") if path != own]

    def _mask(self) -> tuple[int, int]:
        """The CPUs that interrupts go to, as bits, and how many hexadecimal digits the kernel writes."""
        digits = _read(str(self._affinity)).replace(",", "")
        return int(digits, 16), len(digits)

    def _direct(self, *, away: Iterable[int] = (), back: Iterable[int] = ()) -> None:
        """Keep interrupts from some CPUs, or let them come back."""
        old, digits = self._mask()
        mask = (old | _bits(back)) & ~_bits(away)
        if not mask & _all_cpus():
            raise FailedPrecondition("irq-load-balancing.crio.io: no CPU would be left for interrupts")
        _write(str(self._affinity), _hexadecimal(mask, digits))
        self._ban(_hexadecimal(_all_cpus() & ~mask, digits))

    def _banned(self) -> str | None:
        """What irqbalance's configuration bans; None without one."""
        if not self._irqbalance.is_file():
            return None
        found = _BANNED.search(self._irqbalance.read_text())
        return found[1] if found else ""

    def _ban(self, mask: str) -> None:
        """Tell irqbalance, in its configuration and by a restart; a node may well be without it."""
        if self._banned() is not None:
            text, line = self._irqbalance.read_text(), f'IRQBALANCE_BANNED_CPUS="{mask}"'
            text = _BANNED.sub(line, text) if _BANNED.search(text) else f"{text.rstrip()}\n{line}\n".lstrip()
            aside = self._irqbalance.with_name(f".{self._irqbalance.name}.crio")
            aside.write_text(text)
            aside.chmod(self._irqbalance.stat().st_mode & 0o777)
            aside.replace(self._irqbalance)
        _restart(mask)


def unbind(group: Cgroup, *, quota: bool, balancing: bool) -> None:
    """Take the quota of CPU time from the group's parent, the pod, whose limit would count for all; and keep the
    scheduler from moving others' work to the group's CPUs (cgroup v1).  Both go with the groups.  Raises StepFailed."""
    if quota:
        Cgroup(os.path.dirname(group.path)).apply({"cpu": {"quota": -1}})
    if balancing:
        _write(f"{hierarchy().mount_of('cpuset')}{group.path}/cpuset.sched_load_balance", "0")


def _files(wishes: Wishes) -> Iterable[tuple[str, str]]:
    for cpu in wishes.cpus:
        if wishes.latency:
            yield _CPU.format(cpu, _LATENCY), wishes.latency
        if wishes.governor:
            path = _CPU.format(cpu, _GOVERNOR)
            if not os.path.exists(path):
                raise FailedPrecondition(f"cpu-freq-governor.crio.io: CPU {cpu} has no governors here ({path})")
            yield path, wishes.governor


def _restart(mask: str) -> None:
    if os.path.isdir("/run/systemd/system") and (systemctl := shutil.which("systemctl")):
        line, variables = [systemctl, "try-restart", "irqbalance.service"], {}
    elif irqbalance := shutil.which("irqbalance"):
        line, variables = [irqbalance, "--oneshot"], {"IRQBALANCE_BANNED_CPUS": mask}
    else:
        return
    try:
        subprocess.run(
            line, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=_RESTART_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("irqbalance was not told of the CPUs %s: %s", mask, error)


def _bits(cpus: Iterable[int]) -> int:
    return sum(1 << cpu for cpu in set(cpus))


def _all_cpus() -> int:
    return (1 << os.sysconf("SC_NPROCESSORS_CONF")) - 1


def _hexadecimal(mask: int, digits: int) -> str:
    """As the kernel writes it: words of 32 bits with commas between."""
    text = f"{mask:0{digits}x}"
    head = len(text) % 8
    words = [text[:head], *(text[place : place + 8] for place in range(head, len(text), 8))]
    return ",".join(filter(None, words))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise StepFailed(_STEP, error.errno or 0, path, "cannot be read") from None


def _write(path: str, value: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError as error:
        raise StepFailed(_STEP, error.errno or 0, path, f"the kernel refused {value!r}") from None
