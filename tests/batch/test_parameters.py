from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr

from batch_system.batch.tasks.parameters import Parameters
from batch_system.errors import InvalidParameters, InvalidTask

SLOT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)
JAPAN = timezone(timedelta(hours=9))


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0


def called(run: Callable[..., Any], slot: datetime = SLOT, /, **given: Any) -> dict[str, Any]:
    """What `run` is called with, after the parameters were stored in the ledger as JSON."""
    parameters = Parameters("job", run)
    return parameters.to_call(json.loads(json.dumps(parameters.to_json(given))), slot)


def refusal(run: Callable[..., Any], **given: Any) -> str:
    with pytest.raises(InvalidParameters) as caught:
        Parameters("job", run).to_json(given)
    return caught.value.message


def not_a_task(run: Callable[..., Any]) -> str:
    with pytest.raises(InvalidTask) as caught:
        Parameters("job", run)
    return caught.value.message


def report(day: date, dry_run: bool = False) -> None: ...


def at_slot(slot: datetime, n: int = 1) -> None: ...


def test_the_signature_names_the_parameters_and_the_required_ones() -> None:
    parameters = Parameters("job", report)
    assert (parameters.names, parameters.required, parameters.takes_slot) == (
        ("day", "dry_run"),
        ("day",),
        False,
    )


def test_a_text_is_converted_to_the_annotated_type() -> None:
    assert called(report, day="2026-11-24", dry_run="true") == {
        "day": date(2026, 11, 24),
        "dry_run": True,
    }


def test_defaults_are_not_stored() -> None:
    assert Parameters("job", report).to_json({"day": date(2026, 11, 24)}) == {"day": "2026-11-24"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 5),
        (float, 0.1),
        (bool, False),
        (str, "ä\n"),
        (Decimal, Decimal("1.10")),
        (UUID, UUID(int=7)),
        (Path, Path("a/b")),
        (time, time(2, 30)),
        (timedelta, timedelta(seconds=90.5)),
        (datetime, datetime(2026, 1, 1, tzinfo=JAPAN)),
        (list[date], [date(2026, 1, 1)]),
        (set[int], {1, 2}),
        (tuple[int, str], (1, "a")),
        (dict[str, list[int]], {"a": [1]}),
        (int | None, None),
        (Literal["full", "fast"], "fast"),
        (Colour, Colour.RED),
        (Point, Point(x=1)),
        (bytes, b"abc"),
    ],
)
def test_a_value_comes_back_from_the_ledger_as_it_was(kind: Any, value: Any) -> None:
    def run(value: Any) -> None: ...

    run.__annotations__["value"] = kind
    assert called(run, value=value) == {"value": value}


def test_an_unknown_parameter_is_refused_with_the_known_names() -> None:
    assert refusal(report, day="2026-01-01", date="2026-01-01") == (
        "parameters of task job: there is no parameter 'date' (it takes day, dry_run)"
    )
    assert (
        refusal(lambda: None, x=1)
        == "parameters of task job: there is no parameter 'x' (it takes none)"
    )


def test_a_missing_and_a_wrong_parameter_are_named_together() -> None:
    message = refusal(report, dry_run="maybe")
    assert (
        "day is required" in message
        and "dry_run is 'maybe': Input should be a valid boolean" in message
    )


def test_limits_in_the_annotation_are_checked() -> None:
    def run(n: Annotated[int, Field(ge=1)] = 1) -> None: ...

    assert called(run, n="2") == {"n": 2}
    assert "n is '0': Input should be greater than or equal to 1" in refusal(run, n="0")


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_a_number_that_json_can_not_hold_is_refused(text: str) -> None:
    def run(rate: float) -> None: ...

    assert f"rate is '{text}'" in refusal(run, rate=text)


def test_parameters_are_nested_at_most_64_levels_deep() -> None:
    def run(thing: Any) -> None: ...

    nested: Any = 1
    for level in range(64):
        nested = [nested] if level % 2 else {"in": nested}
    assert Parameters("job", run).to_json({"thing": nested}) == {"thing": nested}
    assert "thing: lists and objects may be nested on 64 levels at most" in refusal(
        run, thing=[nested]
    )


def test_a_value_that_json_can_not_hold_is_refused() -> None:
    def run(thing: Any) -> None: ...

    assert "the ledger can't store them" in refusal(run, thing=object())


@pytest.mark.parametrize(
    "name", ["copy", "json", "schema", "model_config", "model_dump", "_private", "given", "cls"]
)
def test_a_parameter_may_have_any_name(name: str) -> None:
    run = eval(f"lambda {name}=1: None")
    assert Parameters("job", run).names == (name,)
    assert called(run, **{name: 5}) == {name: 5}


def test_the_parameter_slot_is_the_slot_of_the_run() -> None:
    assert called(at_slot) == {"slot": SLOT}
    assert called(at_slot, n="7") == {"slot": SLOT, "n": 7}
    assert Parameters("job", at_slot).required == ()


def test_parameters_besides_slot_are_checked_and_stored() -> None:
    def run(slot: datetime, day: date) -> None: ...

    assert Parameters("job", run).to_json({"day": "2026-01-01"}) == {"day": "2026-01-01"}
    assert called(run, day="2026-01-01") == {"slot": SLOT, "day": date(2026, 1, 1)}
    assert "day is 'x'" in refusal(run, day="x")
    assert "day is required" in refusal(run)


def test_a_given_slot_replaces_that_of_the_run_and_needs_an_offset() -> None:
    assert called(at_slot, slot="2026-01-01T00:00+09:00") == {
        "slot": datetime(2026, 1, 1, tzinfo=JAPAN)
    }
    assert "slot is '2026-01-01': it needs an offset" in refusal(at_slot, slot="2026-01-01")


@pytest.mark.parametrize("kind", [date, str, int, bool])
def test_a_parameter_slot_whose_type_is_not_datetime_is_refused(kind: type[Any]) -> None:
    def run(slot: Any) -> None: ...

    run.__annotations__["slot"] = kind
    assert (
        not_a_task(run)
        == "the parameter slot of run() is filled with a datetime: write `slot: datetime`"
    )


@pytest.mark.parametrize("kind", [datetime, datetime | None, Any, object])
def test_a_slot_may_be_optional_or_without_a_type(kind: Any) -> None:
    def run(slot: Any = None) -> None: ...

    run.__annotations__["slot"] = kind
    assert called(run) == {"slot": SLOT}


def test_a_parameter_without_a_type_accepts_any_value() -> None:
    assert called(lambda x: None, x=["a", 1]) == {"x": ["a", 1]}


def test_args_and_kwargs_are_not_parameters() -> None:
    def run(a: int = 1, *args: Any, **kwargs: Any) -> None: ...

    assert Parameters("job", run).names == ("a",)
    assert "there is no parameter 'b' (it takes a)" in refusal(run, b=1)


def test_a_signature_without_a_schema_is_refused() -> None:
    def positional(a: int, /) -> None: ...
    def foreign(a: pytest.FixtureRequest) -> None: ...
    def unknown(a: NoSuchType) -> None: ...  # type: ignore[name-defined] # noqa: F821
    def misspelled(a: date.Date) -> None: ...  # type: ignore[name-defined]

    assert (
        not_a_task(positional)
        == "run() takes 'a' by position only; parameters are passed by name: remove the `/`"
    )
    refused = not_a_task(foreign)
    assert (
        "the parameters of run() can't be checked: " in refused
        and "types that pydantic reads" in refused
    )
    assert "arbitrary_types_allowed" not in refused
    assert "the signature of run() can't be read: name 'NoSuchType' is not defined" in not_a_task(
        unknown
    )
    assert "the signature of run() can't be read: " in not_a_task(misspelled)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]), st.text() | st.integers() | st.none() | st.booleans()
    )
)
def test_bad_values_only_ever_raise_invalid_parameters(values: dict[str, Any]) -> None:
    def run(a: int = 1, b: date | None = None) -> None: ...

    try:
        stored = Parameters("job", run).to_json(values)
    except InvalidParameters:
        return
    assert stored.keys() == values.keys() <= {"a", "b"}


def test_a_secret_parameter_is_never_stored() -> None:
    def run(key: SecretStr) -> None: ...

    with pytest.raises(
        InvalidParameters, match=r"key is a secret.*give the name of a setting"
    ) as refused:
        Parameters("pays", run).to_json({"key": "hush"})
    assert "hush" not in str(refused.value)
