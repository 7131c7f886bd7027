"""Reads a JSON object from pieces of text, one array element at a time, so that memory is
bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

LARGEST_ELEMENT = 1024 * 1024
"""Largest number of characters of one element. Parsed, an element like `{"":0},` takes 28 times as
many bytes.
"""

_WHITE = " \t\n\r"


class JsonReader:
    """Reads one object, from its first key to its end. Raises ValueError if the text is not JSON,
    or is too large.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder(parse_constant=_refuse)

    def fields(self) -> Iterator[str]:
        """Yield each key of the object. The caller reads the value of a key before it takes the
        next key.
        """
        for _ in self._until("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise ValueError("it is not JSON")
            self._take(":")
            yield key
        if self._next() is not None:
            raise ValueError("text follows its JSON")

    def items(self) -> Iterator[Any]:
        """Yield each element of the array that begins here."""
        for _ in self._until("[", "]"):
            yield self.value()

    def is_array(self) -> bool:
        return self._next() == "["

    def value(self) -> Any:
        while True:
            self._next()
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:  # the value may not have been read to its end
                if not self._more():
                    raise ValueError("it is not JSON") from error
                continue
            except RecursionError as error:
                raise ValueError("its JSON is nested too deeply") from error
            except ValueError as error:  # NaN, or a number with more digits than Python accepts
                raise ValueError(
                    "a number in its JSON is not one that this service writes"
                ) from error
            # Otherwise the value may be the start of a longer number.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def _until(self, first: str, last: str) -> Iterator[None]:
        self._take(first)
        if self._next() == last:
            self._at += 1
            return
        while True:
            yield
            if self._take("," + last) == last:
                return

    def _take(self, allowed: str) -> str:
        char = self._next()
        if char is None or char not in allowed:
            raise ValueError("it is not JSON")
        self._at += 1
        return char

    def _next(self) -> str | None:
        """Skip white space, and return the character after it; None at the end of the text."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _WHITE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return None

    def _more(self) -> bool:
        """Read at least as many characters as are left over, for an incomplete element. False at
        the end.
        """
        left = len(self._text) - self._at
        if left > LARGEST_ELEMENT:
            raise ValueError(
                f"an element of its JSON is larger than {LARGEST_ELEMENT:,} characters"
            )
        pieces, size = [self._text[self._at :]], 0
        for piece in self._pieces:
            pieces.append(piece)
            size += len(piece)
            if size >= left:
                break
        self._text = "".join(pieces)
        self._at = 0
        return size > 0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
