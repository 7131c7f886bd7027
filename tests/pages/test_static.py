"""The files of the pages: names that change with their content, what is sent, and whether its
colours can be read.
"""

from __future__ import annotations

import gzip
import re

import pytest

from batch_system.pages.frame.assets import STATIC, assets
from tests.pages.conftest import People

TINTS = (
    "succeeded",
    "failed",
    "running",
    "retrying",
    "interrupted",
    "queued",
    "cancelled",
    "skipped",
    "missed",
)
PAIRS = [
    *(
        (ink, ground, 4.5)
        for ink in ("text", "text2", "text3", "link")
        for ground in ("bg", "surface", "sunken")
    ),
    *((name, ground, 4.5) for name in TINTS for ground in ("surface", f"{name}-t")),
    *((f"{name}-f", "surface", 3.0) for name in TINTS),
    *(
        (ink, f"{name}-t", 4.5)
        for ink in ("text", "text2", "text3")
        for name in ("running", "retrying", "failed")
    ),
    ("control", "surface", 3.0),
    ("onprimary", "primary", 4.5),
]
"""Ink, ground, and the contrast that WCAG AA asks for."""


def tokens(scheme: int) -> dict[str, str]:
    """The colours by name. `scheme`: 0 is light, 1 is dark."""
    found = {}
    for name, value in re.findall(r"--([\w-]+): ([^;]+);", (STATIC / "tokens.css").read_text()):
        both = re.findall(r"#[0-9a-f]{3,8}", value)
        found[name] = both[scheme if len(both) > 1 else 0]
    return found


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) > 4 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_ink_can_be_read_on_its_ground(scheme: int) -> None:
    colours = tokens(scheme)
    wrong = []
    for ink, ground, least in PAIRS:
        brighter, darker = sorted(
            (luminance(colours[ink]), luminance(colours[ground])), reverse=True
        )
        if (contrast := (brighter + 0.05) / (darker + 0.05)) < least:
            wrong.append(f"{ink} on {ground}: {contrast:.2f}")
    assert wrong == []


async def test_files_are_kept_for_ever_and_packed(people: People) -> None:
    for plain, named in assets().names.items():
        assert re.fullmatch(r"[\w.-]+\.[0-9a-f]{12}\.\w+", named), plain
        answer = await people.nobody.get(
            f"/static/{named}", headers={"Accept-Encoding": "identity"}
        )
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        packed = await people.nobody.get(f"/static/{named}", headers={"Accept-Encoding": "gzip"})
        assert packed.content == answer.content  # httpx unpacks it
        assert (packed.headers.get("content-encoding") == "gzip") == (not named.endswith("woff2"))
    assert (await people.nobody.get("/static/nothing.css")).status_code == 404
    assert (await people.nobody.get("/static/..%2f..%2fpyproject.toml")).status_code == 404


async def test_pages_are_packed_and_their_forms_have_another_token_each_time(
    people: People,
) -> None:
    plain = await people.operator.client.get("/tasks", headers={"Accept-Encoding": "identity"})
    packed = await people.operator.client.get("/tasks", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in packed.headers["vary"]
    assert int(packed.headers["content-length"]) < len(packed.content) / 3
    tokens = {await people.operator.csrf() for _ in range(3)}
    assert len(tokens) == 3
    for token in tokens:
        answer = await people.operator.client.post("/tasks/report/pause", data={"csrf": token})
        assert answer.status_code == 303


def test_all_files_together_are_small() -> None:
    sent = sum(len(asset.packed or asset.content) for asset in assets().by_name.values())
    assert sent < 150_000, sent


def test_a_style_sheet_names_no_other_site() -> None:
    style = assets().by_name[assets().names["pages.css"]]
    assert style.packed is not None
    text = gzip.decompress(style.packed).decode()
    assert "http" not in text and "@import" not in text
    for name in re.findall(r"url\(([^)]+)\)", text):
        assert name in assets().by_name


def test_what_is_vendored_has_its_licence() -> None:
    for name in (
        "vendor/htmx.LICENSE",
        "fonts/inter.LICENSE",
        "fonts/mono.LICENSE",
        "icons/LICENSE",
    ):
        assert (STATIC / name).read_text()
