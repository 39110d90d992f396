"""The files that we make for a pod: hosts, resolv.conf, hostname, its pause program; and the checks of what goes into
them.

These formats are lines: a newline in a name is another line (the class of CVE-2022-4318), so every part is checked
against what its format may hold, before anything is written.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from crio_native.errors import InvalidArgument
from crio_native.pods.libselinux import bindings
from crio_native.pods.values import DNSConfig

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", re.ASCII)
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]{1,253}", re.ASCII)
_OPTION = re.compile(r"[A-Za-z0-9_-]{1,64}(:[A-Za-z0-9_.-]{1,64})?", re.ASCII)
_HOST_FILE_MAX = 1 << 20


def check_hostname(name: str) -> None:
    if name and _HOSTNAME.fullmatch(name) is None:
        raise InvalidArgument("config.hostname", name, "must be at most 64 letters, digits, '-' and '.'")


def check_dns(config: DNSConfig | None) -> None:
    if config is None:
        return
    for index, server in enumerate(config.servers):
        try:
            ipaddress.ip_address(server.partition("%")[0])
        except ValueError:
            raise InvalidArgument(f"config.dns_config.servers[{index}]", server, "must be an IP address") from None
    for name, pattern in (("searches", _DOMAIN), ("options", _OPTION)):
        for index, text in enumerate(getattr(config, name)):
            if pattern.fullmatch(text) is None:
                raise InvalidArgument(
                    f"config.dns_config.{name}[{index}]", text, "holds a character that is not allowed"
                )


def write(
    directory: Path,
    *,
    hostname: str,
    dns: DNSConfig | None,
    host_network: bool,
    ips: Sequence[str],
    owner: tuple[int, int],
    label: str = "",
) -> None:
    """Write all three.  A pod on the host's network gets copies of the host's files where it brings none.

    owner: the host's (uid, gid) of the pod's root.  label: SELinux's, "" for none.
    """
    files = {
        "hostname": f"{hostname}\n",
        "resolv.conf": _resolv_conf(dns) if dns is not None else _of_host("/etc/resolv.conf"),
        "hosts": _of_host("/etc/hosts") if host_network else _hosts(hostname, ips),
    }
    for name, text in files.items():
        _write(directory / name, text, owner)
        if label:
            bindings().setfilecon_raw(str(directory / name), label)


def copy_program(program: Path, target: str, label: str) -> None:
    """A copy of a program of ours that SELinux lets a container's process begin with: it has a container's label."""
    shutil.copyfile(program, target)
    os.chmod(target, 0o755)
    bindings().setfilecon_raw(target, label)


def _resolv_conf(dns: DNSConfig) -> str:
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines)


def _hosts(hostname: str, ips: Sequence[str]) -> str:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{ip}\t{hostname}" for ip in ips]
    return "".join(f"{line}\n" for line in lines)


def _of_host(path: str) -> str:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read(_HOST_FILE_MAX)
    except OSError:
        return ""


def _write(path: Path, text: str, owner: tuple[int, int]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "w", errors="surrogateescape") as file:
        os.fchown(fd, *owner)
        os.fchmod(fd, 0o644)  # whatever the umask: the pod's programs read it
        file.write(text)
