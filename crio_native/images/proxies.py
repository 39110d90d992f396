"""Which proxy leads to a host: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, in the words that Go's programs understand.

Nodes are set up for those; the standard library's own reading knows no networks (10.0.0.0/8) in NO_PROXY.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from crio_native.errors import InvalidArgument


def proxy_for(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """The proxy's address for a URL, "" to go there directly.  Raises InvalidArgument for one that cannot be used."""
    scheme, netloc = urlsplit(url)[:2]
    host, port = urlsplit(f"//{netloc}").hostname or "", urlsplit(f"//{netloc}").port
    variable = f"{scheme.upper()}_PROXY"
    proxy = environment.get(variable) or environment.get(variable.lower()) or ""
    if not proxy or _is_local(host) or _is_excluded(host, port or {"http": 80, "https": 443}[scheme], environment):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not _is_web_address(proxy):
        raise InvalidArgument(variable, proxy.rpartition("@")[2], "not the http or https URL of a proxy")
    return proxy


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _is_excluded(host: str, port: int, environment: Mapping[str, str]) -> bool:
    listed = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    return any(_covers(item.strip().lower(), host.lower(), port) for item in listed.split(",") if item.strip())


def _covers(item: str, host: str, port: int) -> bool:
    """One word of NO_PROXY: `*`, a network, an address, or a domain with those below it; with a port or without."""
    if item == "*":
        return True
    address = _address(host)
    if address and "/" in item:
        try:
            return address in ipaddress.ip_network(item, strict=False)
        except ValueError:
            return False
    name, colon, number = item.rpartition(":")
    if colon and number.isdigit() and (":" not in name or name.startswith("[")):
        if int(number) != port:
            return False
        item = name
    item = item.strip("[]")
    if address:
        return _address(item) == address
    domain = item.removeprefix("*").removeprefix(".")
    exact = host == domain and not item.startswith((".", "*."))
    return exact or (bool(domain) and host.endswith(f".{domain}"))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
