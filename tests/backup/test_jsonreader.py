"""JSON that is read in pieces, compared with the standard library, which takes it whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_system.backup.file import json_reader
from batch_system.backup.file.json_reader import JsonReader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def in_pieces(text: str, sizes: list[int]) -> Iterator[str]:
    at = turn = 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        yield text[at : at + size]
        at, turn = at + size, turn + 1


def read(text: str, sizes: list[int]) -> dict[str, Any]:
    reader = JsonReader(in_pieces(text, sizes))
    return {
        key: list(reader.items()) if reader.is_array() else reader.value()
        for key in reader.fields()
    }


@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=4),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_any_json_is_read_whatever_pieces_it_comes_in(
    value: dict[str, Any], sizes: list[int], indent: int | None, is_ascii: bool
) -> None:
    assert read(json.dumps(value, indent=indent, ensure_ascii=is_ascii), sizes) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "7", "[]", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,', '{"a":1,}', '{"a":[1,]}',
        '{"a":[1 2]}', '{"a" 1}', '{7:1}', '{"a":1}}', '{"a":1} x', '{"a":"x}', "{'a':1}",
        '{"a":[', '{"a":NaN}', '{"a":[-Infinity]}', '{"a":' + "9" * 5_000 + "}",
        '{"a":' + "[" * 100_000 + "}",
        '{"a":[' + "[" * 100_000 + "]" * 100_000 + "]}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_text_that_is_not_json_is_refused(text: str, size: int) -> None:
    with pytest.raises(ValueError, match="JSON"):
        read(text, [max(size, len(text) // 50)])


def test_an_element_that_is_too_large_is_refused_before_it_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_reader, "LARGEST_ELEMENT", 1_000)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        yield '{"a": ["'
        while True:
            taken += 100
            yield "x" * 100

    reader = JsonReader(endless())
    assert next(reader.fields()) == "a"
    with pytest.raises(ValueError, match="larger than 1,000 characters"):
        list(reader.items())
    assert taken < 5_000
