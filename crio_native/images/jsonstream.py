"""JSON that comes in pieces, read value by value.

Parsed at once, a hostile document takes many bytes of memory for each of its own, and all that time no other thread
runs.  Read so, neither is ever needed for more than one value.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # typeshed does not know it
from typing import Any

_decoder = json.JSONDecoder()


class Document:
    """One document; what is read next is where the last read ended.

    pieces: of UTF-8.  longest: characters that the longest value may have.  most: members and elements that may be
    passed on the way.  All that reads raises ValueError or RecursionError for what is no JSON or exceeds these, and
    what `pieces` raises.
    """

    def __init__(self, pieces: Iterable[bytes], longest: int, most: int) -> None:
        self._texts = codecs.iterdecode(pieces, "utf-8")
        self._longest, self._left = longest, most
        self._text, self._at = "", 0

    def members(self) -> Iterator[str]:
        """The names of an object's members; whoever takes one reads its value."""
        for _ in self._items("{", "}"):
            name = self.value()
            if not isinstance(name, str):
                raise ValueError("the name of a member is no string")
            self._take(":")
            yield name

    def elements(self) -> Iterator[Any]:
        """The elements of a list."""
        for _ in self._items("[", "]"):
            yield self.value()

    def value(self) -> Any:
        """A whole value."""
        self._next()
        value, self._at = _decoder.raw_decode(self._text, self._at)
        return value

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each item."""
        self._take(opening)
        if self._next() != closing:
            while True:
                if not self._left:
                    raise ValueError("too many members and elements")
                self._left -= 1
                yield
                if self._next() == closing:
                    break
                self._take(",")
        self._take(closing)

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"no {character!r} where one belongs")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no white space, "" at the end; a whole value fits into what is here after it."""
        self._fill()
        self._at = WHITESPACE.match(self._text, self._at).end()
        self._fill()
        return self._text[self._at : self._at + 1]

    def _fill(self) -> None:
        while len(self._text) - self._at < self._longest and (text := next(self._texts, "")):
            self._text, self._at = self._text[self._at :] + text, 0
