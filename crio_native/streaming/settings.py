"""How the streaming server is to serve.  Apart from `server` and `tls`: who only names files need not import ssl."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files.  authority: clients must show a certificate that it signed; "" lets everybody in."""

    certificate: str
    key: str
    authority: str = ""
    min_version: str = "VersionTLS12"
    ciphers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """address: an IP address or a host name; "" for the loopback.  port: 0 for any free one.  idle_timeout: seconds
    without payload until a session is closed; 0 for never."""

    address: str = "127.0.0.1"
    port: int = 0
    idle_timeout: float = 0.0
    tls: TlsFiles | None = None
