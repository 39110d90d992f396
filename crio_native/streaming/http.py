"""HTTP/1.1 before the upgrade: one request, and the answer that turns its connection into streams or refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import h11

from crio_native.streaming.wires import Buffer, Wire

_REQUEST_MAX = 64 * 1024  # bytes of request line and headers
PROTOCOL_HEADER = "X-Stream-Protocol-Version"

Headers = Sequence[tuple[str, str]]


class Refused(Exception):
    """The request gets an HTTP error and the connection ends.  text: for the client's user."""

    def __init__(self, status: int, text: str, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


@dataclass(frozen=True, slots=True)
class Request:
    """headers: names in lower case, in their order.  rest: bytes that came behind the request."""

    method: str
    path: str
    headers: Headers
    rest: bytes

    def values(self, name: str) -> list[str]:
        """The values of a header that may be repeated or comma-separated."""
        found = (value for key, value in self.headers if key == name.lower())
        return [part.strip() for value in found for part in value.split(",") if part.strip()]

    def wants(self, protocol: str) -> bool:
        upgrade = "upgrade" in (word.lower() for word in self.values("connection"))
        return upgrade and protocol.lower() in (word.lower() for word in self.values("upgrade"))


class Door:
    """A connection that has just been made."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_REQUEST_MAX)

    async def request(self) -> Request | None:
        """The request; None from a client that leaves without one.  Raises Refused for what is not HTTP/1.1."""
        buffer = Buffer(_REQUEST_MAX)
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(bytes(await self.wire.receive(buffer)))
            if not isinstance(event, h11.Request):
                return None
            after = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, f"not an HTTP/1.1 request: {error}") from None
        if not isinstance(after, h11.EndOfMessage):
            raise Refused(400, "the request has a body; none is expected")
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
        rest, _ = self._http.trailing_data
        return Request(event.method.decode("latin-1"), event.target.decode("latin-1"), headers, rest)

    async def switch(self, headers: Headers) -> None:
        """101: from now on the connection speaks another protocol."""
        answer = self._http.send(h11.InformationalResponse(status_code=101, headers=list(headers)))
        await self.wire.send(answer or b"")

    async def refuse(self, refusal: Refused) -> None:
        text = refusal.text.encode() + b"\n"
        headers = [
            *refusal.headers,
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(text))),
            ("Connection", "close"),
        ]
        answer = self._http.send(h11.Response(status_code=refusal.status, headers=headers)) or b""
        await self.wire.send(answer, self._http.send(h11.Data(data=text)) or b"")


def agree(request: Request, known: Sequence[str]) -> str:
    """The first of the client's protocols that we know too.  Raises Refused."""
    offered = request.values(PROTOCOL_HEADER)
    if not offered:
        raise Refused(400, f"the header {PROTOCOL_HEADER} is missing; known are: {', '.join(known)}")
    for protocol in offered:
        if protocol in known:
            return protocol
    accepted = [("X-Accepted-Stream-Protocol-Versions", protocol) for protocol in known]
    raise Refused(
        403, f"none of the protocols {', '.join(offered)} is known here; known are: {', '.join(known)}", accepted
    )
