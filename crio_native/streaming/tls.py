"""The server's certificate, read again whenever its files have changed: a new one needs no restart."""

from __future__ import annotations

import logging
import os
import ssl

from crio_native.errors import InvalidArgument
from crio_native.streaming.settings import TlsFiles

log = logging.getLogger(__name__)

_VERSIONS = {
    "VersionTLS10": ssl.TLSVersion.TLSv1,
    "VersionTLS11": ssl.TLSVersion.TLSv1_1,
    "VersionTLS12": ssl.TLSVersion.TLSv1_2,
    "VersionTLS13": ssl.TLSVersion.TLSv1_3,
}


class Tls:
    """Raises InvalidArgument when the files cannot be used."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamp()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """That of the files as they are now; the last good one while they cannot be used."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._context = self._load()
                log.info("read the certificate %s again", self._files.certificate)
            except InvalidArgument as error:
                log.error("the certificate before goes on: %s", error)
        return self._context

    def _stamp(self) -> tuple[object, ...]:
        paths = (self._files.certificate, self._files.key, self._files.authority)
        return tuple(_identity(path) for path in paths if path)

    def _load(self) -> ssl.SSLContext:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[files.min_version]
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        if files.ciphers:
            _set(context.set_ciphers, "crio.api.tls_cipher_suites", ":".join(files.ciphers))
        _set(lambda path: context.load_cert_chain(path, files.key), "crio.api.stream_tls_cert", files.certificate)
        if files.authority:
            _set(lambda path: context.load_verify_locations(path), "crio.api.stream_tls_ca", files.authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _set(function: object, field: str, value: str) -> None:
    assert callable(function)
    try:
        function(value)
    except (OSError, ssl.SSLError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise InvalidArgument(field, value, f"cannot be used: {(reason or str(error)).lower()}") from None


def _identity(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
