"""Linux capabilities: their names, and setting a thread's five sets."""

from __future__ import annotations

import errno

from crio_native.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
NAMES: tuple[str, ...] = tuple(f"CAP_{name}" for name in _NAMES.split())  # the position is the number
NUMBER: dict[str, int] = {name: number for number, name in enumerate(NAMES)}


def mask(names: Iterable[str]) -> int:
    """The 64-bit mask of capability names; KeyError for a name that does not exist."""
    result = 0
    for name in names:
        result |= 1 << NUMBER[name]
    return result


def names(bits: int) -> list[str]:
    """The names in a mask, in the kernel's order; an unknown bit is shown by its number."""
    return [NAMES[n] if n < len(NAMES) else f"CAP_{n}" for n in range(64) if bits >> n & 1]


def last_known() -> int:
    """The highest capability that this kernel has."""
    with open("/proc/sys/kernel/cap_last_cap", "rb", buffering=0) as file:
        return int(file.read())


def limit_bounding(keep: int, last: int) -> None:
    """Drop from the bounding set all that `keep` has not; `last` is the kernel's highest capability."""
    for number in range(last + 1):
        if not keep >> number & 1:
            try:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise


def set_ambient(bits: int) -> None:
    """Make the ambient set exactly `bits` (each must be permitted and inheritable)."""
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(64):
        if bits >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)
