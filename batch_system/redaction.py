"""Which values are shown as `***`, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

MASK = "***"
ORDINARY_KEYS = {"partition", "primary", "foreign", "sort", "group"}
"""A `key` after one of these words names a part of the data, such as `partition_key`, and is
shown.
"""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class Redaction:
    """Masks values whose names have one of these words, as a whole word: `api_key` and `apiKey`,
    but not `monkey`.
    """

    def __init__(self, words: Collection[str]) -> None:
        self._words = {word.lower() for word in words}

    @classmethod
    def of(cls, setting: str) -> Redaction:
        """`setting`: the words, separated by commas."""
        return cls([word.strip() for word in setting.split(",") if word.strip()])

    def is_secret(self, name: str) -> bool:
        """Whether a value of this name is masked."""
        words = [word.lower() for word in _WORDS.findall(name)]
        before = ["", *words]
        return any(
            word in self._words and not (word == "key" and previous in ORDINARY_KEYS)
            for previous, word in zip(before, words, strict=False)
        )

    def masked(self, value: Any) -> Any:
        """A JSON value with `***` in place of each secret, at any depth."""
        if isinstance(value, Mapping):
            return {
                name: MASK if self.is_secret(str(name)) and item is not None else self.masked(item)
                for name, item in value.items()
            }
        return [self.masked(item) for item in value] if isinstance(value, list) else value
