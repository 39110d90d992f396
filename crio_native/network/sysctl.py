"""The few kernel settings that the pod network needs on the node: announced, recorded, and restorable.

`net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding` let packets pass between bridge and world.  The second makes
the kernel stop hearing router advertisements on links that had `accept_ra` 1, and the node would lose its IPv6 default
route: such links get 2, "even when forwarding".  Settings of the bridge itself vanish with it and are not recorded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from crio_native.errors import StepFailed
from crio_native.network.config import BridgeConfig
from crio_native.network.records import Records

log = logging.getLogger(__name__)

_ROOT = Path("/proc/sys/net")
_IPV4_FORWARD = "ipv4/ip_forward"
_IPV6_FORWARD = "ipv6/conf/all/forwarding"


class Sysctls:
    """Changes settings below /proc/sys/net, which belong to the caller's network namespace."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def prepare(self, config: BridgeConfig) -> None:
        """Set what `config`'s bridge needs; the bridge exists.  Raises StepFailed with the setting's path."""
        if config.has_ipv4:
            self._change(_IPV4_FORWARD, "1")
            # For 127.0.0.1:PORT on the node; nftables.py guards what else it would open.
            _write(f"ipv4/conf/{config.bridge}/route_localnet", "1")
        if config.has_ipv6:
            # A pod must not configure the node by router advertisements (CVE-2020-10749).
            _write(f"ipv6/conf/{config.bridge}/accept_ra", "0")
            # Nor does the bridge's link-local address have a rival to look for; until it had looked, a second or two,
            # the node could not ask for the pods' link addresses and nothing from outside would reach them.
            _write(f"ipv6/conf/{config.bridge}/accept_dad", "0")
            if _read(_IPV6_FORWARD) != "1":
                for link in _links_that_hear_routers():
                    self._change(f"ipv6/conf/{link}/accept_ra", "2")
            self._change(_IPV6_FORWARD, "1")

    @staticmethod
    def let_loopback_out(link: str) -> None:
        """Let the node reach pods behind the link from 127.0.0.1, by its ports; nftables.py guards the rest."""
        _write(f"ipv4/conf/{link}/route_localnet", "1")

    def restore(self) -> None:
        """Give every changed setting its previous value, the last changed first."""
        for name, previous in reversed(self._records.changes("sysctl")):
            try:
                _write(name, previous)
                log.info("restored net/%s to %s", name, previous)
            except StepFailed as error:
                log.warning("not restored: %s", error)
            self._records.forget_change("sysctl", name)

    def forget(self, users: str) -> None:
        """Leave the settings as they are, for `users`."""
        for name, previous in self._records.changes("sysctl"):
            log.info("net/%s was %s, and stays changed for %s", name, previous, users)
            self._records.forget_change("sysctl", name)

    def _change(self, name: str, value: str) -> None:
        previous = _read(name)
        if previous == value:
            return
        self._records.note_change("sysctl", name, previous)
        _write(name, value)
        log.info("changed net/%s from %s to %s, which the pod network needs", name, previous, value)


def _links_that_hear_routers() -> list[str]:
    """Links with accept_ra 1 ("all" and "default" are no links)."""
    names = sorted(os.listdir(_ROOT / "ipv6/conf"))
    return [name for name in names if name not in ("all", "default", "lo") and _hears_routers(name)]


def _hears_routers(link: str) -> bool:
    try:
        return _read(f"ipv6/conf/{link}/accept_ra") == "1"
    except StepFailed:  # the link went away meanwhile
        return False


def _read(name: str) -> str:
    try:
        return (_ROOT / name).read_text().strip()
    except OSError as error:
        raise StepFailed("read-sysctl", error.errno or 0, f"net/{name}") from error


def _write(name: str, value: str) -> None:
    try:
        (_ROOT / name).write_text(value)
    except OSError as error:
        raise StepFailed("write-sysctl", error.errno or 0, f"net/{name}", f"value {value!r}") from error
