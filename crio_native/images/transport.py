"""HTTP as registries need it: TLS or not, proxies, redirects, retries, logins, and bounds on all of it.

One `Transport` speaks to one host on behalf of one pull.  What is asked for, and what the answers mean, is
`registry`'s.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from crio_native.errors import CrioError, NotFound, PermissionRefused, Unavailable
from crio_native.images import certificates, proxies, references
from crio_native.images.logins import CLIENT, Login
from crio_native.images.model import Credentials
from crio_native.images.references import DEFAULT_REGISTRY, Reference
from crio_native.images.work import Connections, Stop

if TYPE_CHECKING:
    import ssl

    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
PROBE_TIMEOUT = 5.0  # seconds, to see whether an insecure registry speaks TLS
MIN_RATE, MIN_RATE_AFTER = 1024, 60.0  # bytes a second, once so many seconds were spent waiting
ATTEMPTS = 5  # of one request
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 30.0  # seconds
MAX_TOKEN_ANSWER = 1 << 20
PIECE = 256 << 10
CONNECTIONS = 12  # kept alive to one host

_RETRIED = frozenset({429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOSTS = {DEFAULT_REGISTRY: "registry-1.docker.io"}

Result = TypeVar("Result")


class Transport:
    """Requests about one repository.  Safe to use from several threads.

    stop: ends the work at its next step.  insecure: the host's certificate is not checked, and a host without TLS is
    spoken to without.  A loopback host without certificates of its own is spoken to without TLS.  backoff: seconds
    before the first retry; it doubles each time.  connections: to which ours are to belong.
    """

    def __init__(
        self,
        reference: Reference,
        stop: Stop,
        *,
        insecure: bool = False,
        credentials: Credentials | None = None,
        certificate_directories: tuple[Path, ...] = certificates.DIRECTORIES,
        backoff: float = 0.5,
        connections: Connections | None = None,
    ) -> None:
        import urllib3  # heavy, and a node at rest pulls nothing

        self._connections = connections or Connections()
        self.errors = urllib3.exceptions
        self.reference, self.stop, self.backoff = reference, stop, backoff
        self._timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=min(READ_TIMEOUT, stop.patience))
        self._login = Login(reference, credentials)
        self._pools: dict[tuple[bool, str], PoolManager] = {}
        self._insecure = insecure
        if insecure:  # somebody has decided that; urllib3 would warn once a host
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self._host = _HOSTS.get(reference.registry, reference.registry)
        self._certificates = certificates.directory_of(reference.registry, certificate_directories)
        plain = not insecure and not self._certificates and references.is_loopback(self._host)
        self._scheme = "http" if plain else "" if insecure else "https"

    def close(self) -> None:
        for manager in self._pools.values():
            for key in manager.pools.keys():  # noqa: SIM118  (no mapping: it cannot be iterated)
                manager.pools[key].close()  # which `clear` leaves to whoever forgets them last: a traceback, say
            manager.clear()

    @property
    def origin(self) -> str:
        """SCHEME://HOST of the registry; an insecure one is asked, the first time, whether it speaks TLS."""
        if not self._scheme:
            self._scheme = "https" if self._speaks_tls() else "http"
        return f"{self._scheme}://{self._host}"

    def _speaks_tls(self) -> bool:
        try:
            self._send(f"https://{self._host}/v2/", {}, timeout=PROBE_TIMEOUT).close()
        except self.errors.HTTPError:
            return False
        return True

    def get(self, path: str, headers: Mapping[str, str], use: Callable[[BaseHTTPResponse], Result]) -> Result:
        """GET until there is an answer worth having, and what `use` makes of it; that is given 200 and 206 only.

        Raises NotFound, PermissionRefused, Unavailable; whatever stop and use raise.
        """
        return self._fetch(self.origin + path, headers, use, ATTEMPTS)

    def elsewhere(self, url: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Once, and from an address that a manifest names; it may not leave TLS.  Raises as `get`."""
        self._check_target(urlsplit(self.origin).scheme, url)
        return self._fetch(url, headers, lambda response: response, 1)

    def configured(self, url: str, use: Callable[[BaseHTTPResponse], Result]) -> Result:
        """From an address that the node's own configuration names.  Raises as `get`."""
        return self._fetch(url, {}, use, ATTEMPTS)

    def _fetch(
        self, url: str, headers: Mapping[str, str], use: Callable[[BaseHTTPResponse], Result], attempts: int
    ) -> Result:
        for attempt in range(attempts):
            wait = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = self._follow(url, headers)
                if response.status not in _RETRIED:
                    return use(self._accept(response))
            except self.errors.HTTPError as error:
                problem = cause(error)
                if isinstance(error, self.errors.SSLError):
                    problem += (
                        "; trust its authority by a file in /etc/containers/certs.d, or name it in insecure_registries"
                    )
                    break
            else:
                problem = f"HTTP {response.status}{self._complaint(response)}"
                wait = max(wait, _retry_after(response))
                response.close()
            if attempt + 1 < attempts:
                self.stop.pause(wait)
        raise Unavailable(
            f"registry {self.reference.registry} does not serve {self.reference.repository}: {problem}; "
            "check that it runs and can be reached"
        )

    def pieces(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        """A body in pieces.  Raises Unavailable for one that only drips, HTTPError for one that breaks."""
        received, waited = 0, 0.0
        while True:
            self.stop.check()
            before = time.monotonic()
            piece = response.read1(PIECE, decode_content=False)
            waited += time.monotonic() - before
            if not piece:
                return
            self.stop.progressed()
            received += len(piece)
            if waited > MIN_RATE_AFTER and received < MIN_RATE * waited:
                raise Unavailable(f"{self._host} sends less than {MIN_RATE} bytes a second; try again later")
            yield piece

    def read_all(self, response: BaseHTTPResponse, most: int) -> bytes:
        """A whole body of a bounded size.  Raises Unavailable for a larger one."""
        data = bytearray()
        with contextlib.closing(response):
            for piece in self.pieces(response):
                data += piece
                if len(data) > most:
                    raise Unavailable(f"{self._host} answered with a document larger than {most} bytes")
        return bytes(data)

    # One request

    def _follow(self, url: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """One GET with its redirects, and with a new token where the registry asks for one."""
        tried_login = False
        for _ in range(MAX_REDIRECTS + 2):
            self.stop.check()
            scheme, host = urlsplit(url)[:2]
            ours = f"{scheme}://{host}" == self.origin
            login = {"Authorization": self._login.header} if ours and self._login.header else {}
            response = self._send(url, {**headers, **login})
            if response.status == 401 and ours and not tried_login:
                tried_login = True
                challenge = response.headers.get("WWW-Authenticate", "")
                response.close()
                self._login.answer(challenge, scheme, self._ask_for_token)
            elif response.status in _REDIRECTS:
                location = response.headers.get("Location", "")
                response.close()
                if not location:
                    raise Unavailable(
                        f"registry {self.reference.registry} redirected a request for {self.reference.repository} "
                        f"without saying where to (HTTP {response.status} without Location)"
                    )
                url = self._check_target(scheme, location, url)
            else:
                return response
        raise Unavailable(
            f"registry {self.reference.registry} redirected a request for {self.reference.repository} more than "
            f"{MAX_REDIRECTS} times"
        )

    def _send(
        self,
        url: str,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> BaseHTTPResponse:
        kind = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        return self._pool(url).request(
            "POST" if form else "GET",
            url,
            headers={"User-Agent": CLIENT, **kind, **headers},
            body=urlencode(form) if form else None,
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            timeout=timeout or self._timeout,
        )

    def _pool(self, url: str) -> PoolManager:
        """The registry's certificates, and its lack of them, are for the registry alone, not for where it points."""
        import urllib3

        from crio_native.images import answers

        ours = urlsplit(url).netloc == self._host
        proxy = proxies.proxy_for(url)
        if (ours, proxy) not in self._pools:
            tls: ssl.SSLContext | None = None
            if urlsplit(url).scheme == "https" and ours:
                tls = certificates.context(self._certificates, verify=not self._insecure)
            options: dict[str, Any] = {"num_pools": 8, "maxsize": CONNECTIONS, "retries": False, "ssl_context": tls}
            made = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
            made.pool_classes_by_scheme = answers.pools(self._connections)
            self._pools[ours, proxy] = made
        return self._pools[ours, proxy]

    def _check_target(self, scheme: str, target: str, base: str = "") -> str:
        """The whole address of a target, relative to base.  Raises Unavailable for one that is not to be followed."""
        try:
            whole = urljoin(base, target)
            new = urlsplit(whole)
            usable = new.scheme in ("http", "https") and bool(new.hostname) and new.port != 0
        except ValueError:
            usable = False
        if not usable or (scheme == "https" and new.scheme == "http"):
            raise Unavailable(
                f"registry {self.reference.registry} points to {target[:200]!r}, which is not followed: it is no "
                "web address, or leaves TLS"
            )
        return whole

    def _ask_for_token(self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None) -> bytes:
        self._check_target(self._scheme, url)
        try:
            response = self._send(url, headers, form)
        except self.errors.HTTPError as error:
            raise self.errors.HTTPError(f"its token service {url[:200]} does not answer: {cause(error)}") from None
        with contextlib.closing(response):
            if response.status in _RETRIED:
                raise self.errors.HTTPError(f"the token service {url[:200]} answered HTTP {response.status}")
            if response.status != 200:
                complaint = f"HTTP {response.status} by its token service{self._complaint(response)}"
                raise self._refusal(403, complaint)
            return self.read_all(response, MAX_TOKEN_ANSWER)

    # Refusals

    def _accept(self, response: BaseHTTPResponse) -> BaseHTTPResponse:
        status = response.status
        if status in (200, 206):
            return response
        complaint = f"HTTP {status}{self._complaint(response)}"
        response.close()
        raise self._refusal(status, complaint)

    def _refusal(self, status: int, complaint: str) -> CrioError:
        registry, repository = self.reference.registry, self.reference.repository
        if status == 404:
            return NotFound("image", str(self.reference), f"registry {registry} answered {complaint}")
        if status in (401, 403):
            return PermissionRefused(
                f"registry {registry} refused access to {repository} ({complaint}): the repository does not exist "
                "or needs other credentials"
            )
        return Unavailable(f"registry {registry} answered a request for {self.reference} with {complaint}")

    def _complaint(self, response: BaseHTTPResponse) -> str:
        """The registry's own words, if it sent any in the form of the specification."""
        try:
            first = json.loads(response.read1(8192, decode_content=False) or b"null")["errors"][0]
            return f" {first['code']}: {first['message']}"[:300].encode("ascii", "backslashreplace").decode()
        except (ValueError, KeyError, IndexError, TypeError, RecursionError, self.errors.HTTPError):
            return ""


def _retry_after(response: BaseHTTPResponse) -> float:
    """Seconds of a Retry-After header (RFC 9110), which has a number of them or a date."""
    import email.utils  # as rarely needed as a registry says when

    value = response.headers.get("Retry-After", "")
    try:
        date = None if value.isdigit() else email.utils.parsedate_to_datetime(value)
        seconds = date.timestamp() - time.time() if date else float(value)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, min(seconds, MAX_RETRY_AFTER))


def cause(error: Exception) -> str:
    """What really happened, without the names of the libraries' own objects."""
    import http.client
    import ssl

    inner: BaseException = getattr(error, "reason", None) or error
    inner = inner if isinstance(inner, BaseException) else error
    inner = inner.__cause__ or inner
    inner = next((part for part in inner.args if isinstance(part, BaseException)), inner)
    if isinstance(inner, http.client.RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(inner, http.client.IncompleteRead):
        return "it closed the connection in the middle of its answer"
    if isinstance(inner, http.client.HTTPException):
        return "what it answers is no HTTP"
    if isinstance(inner, OSError) and inner.strerror and not isinstance(inner, ssl.SSLError):
        return inner.strerror
    return (str(inner).rpartition(">: ")[2] or type(inner).__name__)[:300]
