"""Values that a server would repeat in an error are bounded, wherever the parts of a row are
cut.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_system.backup.file.reader import SavedTable
from batch_system.backup.restoring import loading
from batch_system.backup.restoring.loading import _ValueSizes
from batch_system.errors import BackupError

TABLE = SavedTable("public", "t", ("a", "b"), ("bigint", "character varying(255)"), (), 0, 0)
ROWS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=4)


@given(ROWS, st.integers(1, 7))
def test_a_value_that_is_too_large_is_refused_in_columns_whose_errors_repeat_it(
    rows: list[tuple[int, int]], size: int
) -> None:
    """The value is refused whatever parts the row comes in."""
    data = b"".join(b"x" * first + b"\t" + b"y" * second + b"\n" for first, second in rows)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    sizes = _ValueSizes(TABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "LARGEST_ECHO", 8)
        if any(first > 8 for first, _ in rows):
            with pytest.raises(
                BackupError, match=r"public.t is larger than .* type bigint.*by hand"
            ):
                list(map(sizes.add, parts))
        else:
            list(map(sizes.add, parts))
