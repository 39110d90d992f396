"""Answering a registry that asks who we are: Basic, Bearer tokens, and the exchange of an identity token.

RFC 7235 (challenges), RFC 7617 (Basic), and the token flow of Docker's registries that every other has taken over.
Which credentials to use is decided before (`credentials`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from crio_native.errors import PermissionRefused, Unavailable
from crio_native.images.model import Credentials
from crio_native.images.references import Reference

CLIENT = "crio-native"
_BEARER = re.compile(r"(?i)\bbearer\s+(.*)")
_PARAMETER = re.compile(r'([a-z]+)="([^"]{0,2048})"')


class Ask(Protocol):
    """Asks a token service: GET, or POST of a form.  Returns the body of its 200; raises otherwise."""

    def __call__(self, url: str, headers: Mapping[str, str], form: Mapping[str, str] | None) -> bytes: ...


class Login:
    """Who we are at one registry, for one repository.  header: what it accepted last, "" before it asked."""

    def __init__(self, reference: Reference, credentials: Credentials | None) -> None:
        self._reference, self._credentials = reference, credentials
        self.header = f"Bearer {credentials.registry_token}" if credentials and credentials.registry_token else ""

    def answer(self, challenge: str, scheme: str, ask: Ask) -> None:
        """Set `header` for a WWW-Authenticate challenge.  scheme: how the registry itself is spoken to.

        Raises PermissionRefused where there is nothing to answer, Unavailable for a bad token service, and what ask
        raises.
        """
        bearer = _BEARER.search(challenge)
        values = dict(reversed(_PARAMETER.findall(bearer[1]))) if bearer else {}  # the first of a name is its own
        credentials = self._credentials
        if credentials and credentials.registry_token:
            raise PermissionRefused(
                f"registry {self._reference.registry} refused the registry token that was given for "
                f"{self._reference.repository}"
            )
        if "realm" in values:
            self.header = f"Bearer {self._token(values, scheme, ask)}"
        elif "basic" in challenge.lower() and credentials and credentials.username:
            self.header = _basic(credentials)
        else:
            kind = challenge.partition(" ")[0][:20] or "some"
            raise PermissionRefused(
                f"registry {self._reference.registry} wants {kind} authentication for "
                f"{self._reference.repository}, and no credentials for it were given"
            )

    def _token(self, challenge: Mapping[str, str], scheme: str, ask: Ask) -> str:
        realm, credentials = challenge["realm"], self._credentials
        if credentials and urlsplit(realm).scheme != "https" and scheme == "https":
            raise PermissionRefused(
                f"{self._reference.registry} wants credentials sent without TLS, to {realm[:200]!r}"
            )
        query = {"scope": challenge.get("scope") or f"repository:{self._reference.repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        if credentials and credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": CLIENT}
            return self._parse(ask(realm, {}, {**query, **form}))
        headers = {"Authorization": _basic(credentials)} if credentials and credentials.username else {}
        return self._parse(ask(f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}", headers, None))

    def _parse(self, answer: bytes) -> str:
        try:
            document: dict[str, Any] = json.loads(answer)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise Unavailable(f"the token service of registry {self._reference.registry} answered without a token")
        return token


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return "Basic " + base64.b64encode(pair).decode()
