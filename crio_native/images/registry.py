"""A registry as a source of images: the OCI Distribution API over HTTP, reading only.

Here belongs what the protocol needs: tokens, redirects, retries, time limits.  Which mirror to ask, and whom to trust,
is decided before; what the documents mean is `manifests`'s.  Content is checked against its digest by whoever consumes
it (`manifests.verified`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from crio_native.errors import CrioError, NotFound, PermissionRefused, Unavailable
from crio_native.images.manifests import ACCEPTED, MAX_DOCUMENT, Descriptor
from crio_native.images.model import Credentials
from crio_native.images.references import DEFAULT_REGISTRY, DIGEST_LENGTHS, Reference
from crio_native.images.work import Stop

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
MIN_RATE, MIN_RATE_AFTER = 1024, 60.0  # bytes a second, once so many seconds were spent waiting
ATTEMPTS = 5  # of one request
RESUMES = 4  # of one blob
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 30.0  # seconds
MAX_TOKEN_ANSWER = 1 << 20
PIECE = 256 << 10

_RETRIED = frozenset({429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOSTS = {DEFAULT_REGISTRY: "registry-1.docker.io"}
_BEARER = re.compile(r"(?i)\bbearer\s+(.*)")
_PARAMETER = re.compile(r'([a-z]+)="([^"]{0,2048})"')

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Repository:
    """One repository of a registry, for the time of one pull.  Safe to use from several threads.

    stop: ends the work at its next step.  plain_http: speak HTTP without TLS.  backoff: seconds before the first
    retry; it doubles each time.
    """

    def __init__(
        self,
        reference: Reference,
        stop: Stop,
        *,
        plain_http: bool = False,
        credentials: Credentials | None = None,
        backoff: float = 0.5,
    ) -> None:
        import urllib3  # heavy, and a node at rest pulls nothing

        self._errors = urllib3.exceptions
        self._timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        self._pool = urllib3.PoolManager(num_pools=8, maxsize=8, retries=False)
        self._reference, self._credentials, self._backoff = reference, credentials, backoff
        self._stop = stop
        host = _HOSTS.get(reference.registry, reference.registry)
        self._origin = ("http" if plain_http else "https", host)
        self._base = f"{self._origin[0]}://{host}/v2/{reference.repository}"
        self._authorization = ""  # what the registry accepted last

    def close(self) -> None:
        self._pool.clear()

    def manifest(self, wanted: str) -> tuple[bytes, str, str]:
        """The document of a tag or a digest: (bytes, media type, the digest that the registry states, or "")."""
        url = f"{self._base}/manifests/{wanted}"
        return self._get(url, {"Accept": ", ".join(ACCEPTED)}, self._read_manifest)

    def _read_manifest(self, response: BaseHTTPResponse) -> tuple[bytes, str, str]:
        raw = self._read_all(response, MAX_DOCUMENT)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        stated = response.headers.get("Docker-Content-Digest", "")
        return raw, media_type, stated if stated.partition(":")[0] in DIGEST_LENGTHS else ""

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes, unchecked.  A connection that breaks is taken up where it broke."""
        done = 0
        for resume in range(RESUMES + 1):
            try:
                for piece in self._blob_from(descriptor, done):
                    yield piece
                    done += len(piece)
            except self._errors.HTTPError as error:
                cause = _cause(error)
            else:
                if done >= descriptor.size:
                    return
                cause = "the connection was closed"
            log.info("blob %s of %s broke after %d bytes: %s", descriptor.digest, self._reference.name, done, cause)
            self._stop.pause(self._backoff * min(2**resume, 16))
        raise Unavailable(
            f"registry {self._reference.registry} cut {descriptor.digest} of {self._reference.repository} short at "
            f"{done} of {descriptor.size} bytes, {RESUMES + 1} times ({cause}); try again later"
        )

    def _blob_from(self, descriptor: Descriptor, start: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._get(f"{self._base}/blobs/{descriptor.digest}", headers, lambda response: response)
        try:
            skip = 0 if response.status == 206 else start  # a server may answer a range with the whole
            if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Unavailable(f"{self._origin[1]} answered another range than asked for of {descriptor.digest}")
            self._check_length(response, descriptor.size - (start - skip), descriptor)
            for piece in self._stream(response):
                dropped = min(skip, len(piece))
                skip -= dropped
                if dropped < len(piece):
                    yield piece[dropped:]
        finally:
            response.close()

    def _check_length(self, response: BaseHTTPResponse, expected: int, descriptor: Descriptor) -> None:
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) != expected:
            raise Unavailable(
                f"registry {self._reference.registry} announces {announced} bytes for {descriptor.digest} of "
                f"{self._reference.repository}, whose manifest says {expected}: the image is damaged there"
            )

    def _stream(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        received, waited = 0, 0.0
        while True:
            self._stop.check()
            before = time.monotonic()
            piece = response.read1(PIECE, decode_content=False)
            waited += time.monotonic() - before
            if not piece:
                return
            received += len(piece)
            if waited > MIN_RATE_AFTER and received < MIN_RATE * waited:
                raise Unavailable(f"{self._origin[1]} sends less than {MIN_RATE} bytes a second; try again later")
            yield piece

    def _read_all(self, response: BaseHTTPResponse, most: int) -> bytes:
        data = bytearray()
        with contextlib.closing(response):
            for piece in self._stream(response):
                data += piece
                if len(data) > most:
                    raise Unavailable(f"{self._origin[1]} answered with a document larger than {most} bytes")
        return bytes(data)

    # Requests

    def _get(self, url: str, headers: dict[str, str], use: Callable[[BaseHTTPResponse], Result]) -> Result:
        """GET until there is an answer worth having, and what `use` makes of it; that is given 200 and 206 only."""
        for attempt in range(ATTEMPTS):
            wait = self._backoff * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = self._follow(url, headers)
                if response.status not in _RETRIED:
                    return use(self._accept(response))
            except self._errors.HTTPError as error:
                problem = _cause(error)
                if isinstance(error, self._errors.SSLError):
                    problem += "; if this registry has no valid certificate, name it in insecure_registries"
                    break
            else:
                problem = f"HTTP {response.status}{self._complaint(response)}"
                wait = max(wait, _retry_after(response))
                response.close()
            if attempt + 1 < ATTEMPTS:
                self._stop.pause(wait)
        raise Unavailable(
            f"registry {self._reference.registry} does not serve {self._reference.repository}: {problem}; "
            "check that it runs and can be reached"
        )

    def _follow(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """One GET with its redirects, and with a new token where the registry asks for one."""
        tried_login = False
        for _ in range(MAX_REDIRECTS + 2):
            self._stop.check()
            scheme, host = urlsplit(url)[:2]
            ours = (scheme, host) == self._origin
            login = {"Authorization": self._authorization} if ours and self._authorization else {}
            response = self._send(url, {**headers, **login})
            if response.status == 401 and ours and not tried_login:
                tried_login = True
                challenge = response.headers.get("WWW-Authenticate", "")
                response.close()
                self._log_in(challenge)
            elif response.status in _REDIRECTS:
                target = urljoin(url, response.headers.get("Location", ""))
                response.close()
                self._check_redirect(scheme, target)
                url = target
            else:
                return response
        raise Unavailable(
            f"registry {self._reference.registry} redirected a request for {self._reference.repository} more than "
            f"{MAX_REDIRECTS} times"
        )

    def _send(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        return self._pool.request(
            "GET",
            url,
            headers={"User-Agent": "crio-native", **headers},
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            timeout=self._timeout,
        )

    def _check_redirect(self, scheme: str, target: str) -> None:
        new = urlsplit(target)
        if new.scheme not in ("http", "https") or not new.netloc or (scheme == "https" and new.scheme == "http"):
            raise Unavailable(
                f"registry {self._reference.registry} points to {target[:200]!r}, which is not followed: it is no "
                "web address, or leaves TLS"
            )

    def _accept(self, response: BaseHTTPResponse) -> BaseHTTPResponse:
        status = response.status
        if status in (200, 206):
            return response
        reference = self._reference
        complaint = f"HTTP {status}{self._complaint(response)}"
        response.close()
        raise self._refusal(reference, status, complaint)

    @staticmethod
    def _refusal(reference: Reference, status: int, complaint: str) -> CrioError:
        registry, repository = reference.registry, reference.repository
        if status == 404:
            return NotFound("image", str(reference), f"registry {registry} answered {complaint}")
        if status in (401, 403):
            return PermissionRefused(
                f"registry {registry} refused access to {repository} ({complaint}): the repository does not exist "
                "or needs other credentials"
            )
        return Unavailable(f"registry {registry} answered a request for {reference} with {complaint}")

    def _complaint(self, response: BaseHTTPResponse) -> str:
        """The registry's own words, if it sent any in the form of the specification."""
        try:
            first = json.loads(response.read1(8192, decode_content=False) or b"null")["errors"][0]
            return f" {first['code']}: {first['message']}"[:300].encode("ascii", "backslashreplace").decode()
        except (ValueError, KeyError, IndexError, TypeError, RecursionError, self._errors.HTTPError):
            return ""

    # Authentication

    def _log_in(self, challenge: str) -> None:
        """Answer a WWW-Authenticate challenge (RFC 7235; the token flow of Docker's registries)."""
        bearer = _BEARER.search(challenge)
        values = dict(reversed(_PARAMETER.findall(bearer[1]))) if bearer else {}  # the first of a name is its own
        if "realm" in values:
            self._authorization = f"Bearer {self._token(values)}"
        elif "basic" in challenge.lower() and self._credentials:
            self._authorization = self._basic(self._credentials)
        else:
            scheme = challenge.partition(" ")[0][:20] or "some"
            raise PermissionRefused(
                f"registry {self._reference.registry} wants {scheme} authentication for "
                f"{self._reference.repository}, and no credentials for it were given"
            )

    def _token(self, challenge: dict[str, str]) -> str:
        realm = challenge["realm"]
        if self._credentials and urlsplit(realm).scheme != "https" and self._origin[0] == "https":
            raise PermissionRefused(f"{self._origin[1]} wants credentials sent without TLS, to {realm[:200]!r}")
        self._check_redirect(self._origin[0], realm)
        query = {"scope": challenge.get("scope") or f"repository:{self._reference.repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        headers = {"Authorization": self._basic(self._credentials)} if self._credentials else {}
        response = self._send(f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}", headers)
        with contextlib.closing(response):
            if response.status in _RETRIED:
                raise self._errors.HTTPError(f"the token service {realm[:200]} answered HTTP {response.status}")
            if response.status != 200:
                complaint = f"HTTP {response.status} by its token service{self._complaint(response)}"
                raise self._refusal(self._reference, 403, complaint)
            return self._parse_token(self._read_all(response, MAX_TOKEN_ANSWER))

    def _parse_token(self, answer: bytes) -> str:
        try:
            document: dict[str, Any] = json.loads(answer)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise Unavailable(f"the token service of registry {self._reference.registry} answered without a token")
        return token

    @staticmethod
    def _basic(credentials: Credentials) -> str:
        pair = f"{credentials.username}:{credentials.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


def _retry_after(response: BaseHTTPResponse) -> float:
    """Seconds of a Retry-After header (RFC 9110); dates are not worth a parser here."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER) if value.isdigit() else 0.0


def _cause(error: Exception) -> str:
    """What really happened, without the names of the library's own objects."""
    inner: BaseException = getattr(error, "reason", None) or error
    inner = inner if isinstance(inner, BaseException) else error
    return (str(inner.__cause__ or inner).rpartition(">: ")[2] or type(inner).__name__)[:300]
