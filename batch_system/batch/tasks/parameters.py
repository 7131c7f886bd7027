"""The parameters of a task, whose schema is the signature of `run`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, NotRequired

from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.types import SecretBytes, SecretStr
from pydantic_core import PydanticSerializationError, to_jsonable_python
from typing_extensions import TypedDict

from batch_system import failures
from batch_system.batch.context.upstream import Upstream
from batch_system.errors import InvalidParameters, InvalidTask
from batch_system.escaping import MOST_LEVELS, echoed, is_deep
from batch_system.redaction import Redaction
from batch_system.settings.reading import get_settings

SLOT = "slot"
TOO_DEEP = f"lists and objects may be nested on {MOST_LEVELS} levels at most"
OF_PARAMETERS = "parameters."
"""The place of a parameter of a task in a request begins with it."""
_NO_FIELDS: Mapping[str, str] = MappingProxyType({})
NOTHING_WRITTEN: Mapping[str, inspect.Parameter] = MappingProxyType({})


class Parameters:
    """The parameters of the bound method `run` of a task. A parameter named `slot` has the run's
    slot as its default.

    A parameter with the annotation Upstream receives what the run has waited for. No caller gives
    it, so it does not count as a parameter.

    `others`: bound methods to which `run` passes the values of its `**parameters`; their parameters
    count as those of `run`. Raises InvalidTask for a signature that can't be read, or with types
    that pydantic can't check.
    """

    __slots__ = (
        "_schema",
        "_task",
        "_upstream",
        "names",
        "required",
        "takes_slot",
        "takes_upstream",
        "written",
    )

    def __init__(self, task: str, run: Callable[..., Any], *others: Callable[..., Any]) -> None:
        self._task = task
        signature = {} if _takes_nothing(run) else _signature(run, others)
        self._upstream = tuple(name for name, p in signature.items() if p.annotation is Upstream)
        signature = {name: p for name, p in signature.items() if name not in self._upstream}
        self.names = tuple(signature)
        self.written = _written(self.names, (*others, run)) if signature else NOTHING_WRITTEN
        """The parameters by name, with their annotations as they are written."""
        self.takes_slot = SLOT in signature
        self.takes_upstream = bool(self._upstream)
        """Whether `run` has a parameter that receives what the run has waited for."""
        self.required = tuple(
            name for name, p in signature.items() if p.default is p.empty and name != SLOT
        )
        """The parameters without a default, for which a scheduled run has no value."""
        self._schema = _schema(signature, self.required)

    def to_json(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check the values in `given`, which may be texts, and return them as the ledger stores
        them, without defaults.

        Raises InvalidParameters, which names the task, the parameter, and what is allowed.
        """
        checked = self._check(given)
        if secrets := sorted(
            name for name, value in checked.items() if isinstance(value, SecretStr | SecretBytes)
        ):
            reason = (
                f"{', '.join(secrets)} is a secret, and the ledger stores no secrets: give the "
                "name of a setting instead, and read the setting in run()"
            )
            raise self._refused(reason, dict.fromkeys(secrets, reason))
        slot = checked.get(SLOT)
        if isinstance(slot, datetime) and slot.utcoffset() is None:
            raise self._refused(
                f"slot is {echoed(given[SLOT])}: it needs an offset, as in 2026-11-25T02:00+09:00"
            )
        try:
            stored = dict(self._schema.adapter.dump_python(checked, mode="json"))
        except (
            PydanticSerializationError,
            ValueError,
            RecursionError,
        ) as error:  # such as a list that contains itself
            raise self._refused(f"the ledger can't store them: {error}") from None
        if deep := next((name for name, value in stored.items() if is_deep(value)), None):
            raise self._refused(f"{deep}: {TOO_DEEP}", {deep: f"{deep}: {TOO_DEEP}"})
        return stored

    def defaults(self) -> dict[str, Any]:
        """The defaults as JSON values, by name; without those that JSON can't say."""
        found: dict[str, Any] = {}
        for name, written in self.written.items():
            if name == SLOT or written.default is written.empty:
                continue
            with contextlib.suppress(PydanticSerializationError, ValueError, RecursionError):
                found[name] = to_jsonable_python(written.default)
        return found

    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the parameters that a person may give; None if pydantic can't make one
        for their types.

        Tasks with the same parameters share it, so it must not be changed.
        """
        return self._schema.json

    def to_call(
        self, stored: Mapping[str, Any], slot: datetime, upstream: Upstream | None = None
    ) -> dict[str, Any]:
        """The keyword arguments of `run` for one attempt, from stored parameters. Raises
        InvalidParameters.
        """
        given = {SLOT: slot, **stored} if self.takes_slot else stored
        checked = self._check(given) if given or self.required else {}
        if self._upstream:
            checked |= self.filled(Upstream() if upstream is None else upstream)
        return checked

    def filled(self, upstream: Upstream) -> dict[str, Upstream]:
        """The arguments of `run` that receive what the run has waited for."""
        return dict.fromkeys(self._upstream, upstream)

    def _check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._schema.adapter.validate_python(dict(given)))
        except ValidationError as error:
            problems = error.errors()
            sentences = [_sentence(each) for each in problems]
            fields: dict[str, str] = {}
            for each, sentence in zip(problems, sentences, strict=True):
                name = str(each["loc"][0]) if each["loc"] else ""
                fields[name] = f"{fields[name]}; {sentence}" if name in fields else sentence
            raise self._refused("; ".join(sentences), fields) from None

    def _refused(self, reason: str, fields: Mapping[str, str] = _NO_FIELDS) -> InvalidParameters:
        return refused(self._task, reason, fields, self.names)


def refused(
    task: str, reason: str, fields: Mapping[str, str], names: Collection[str]
) -> InvalidParameters:
    """The error about parameters of a task, which takes those with these `names`. `fields`: what is
    wrong with each, by name.
    """
    allowed = f"it takes {', '.join(names)}" if names else "it takes none"
    places = {f"{OF_PARAMETERS}{name}": sentence for name, sentence in fields.items()}
    return InvalidParameters(f"parameters of task {task}: {reason} ({allowed})", places)


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no parameter {echoed(name)}"
    if error["type"] == "missing":
        return f"{name} is required"
    redaction = Redaction.of(get_settings().BATCH_SECRET_WORDS)
    if redaction.is_secret(name) or redaction.masked(error["input"]) != error["input"]:
        return f"{name} has a value that is not allowed"
    return f"{name} is {echoed(error['input'])}: {error['msg']}"


def _signature(
    run: Callable[..., Any], others: Sequence[Callable[..., Any]]
) -> dict[str, inspect.Parameter]:
    parameters, passes_on = _named("run", run)
    for other in others if passes_on else ():
        if not inspect.signature(other).parameters:
            continue  # its annotations may be only for type checkers
        more, _ = _named(other.__name__, other)
        if both := sorted(parameters.keys() & more.keys()):
            raise InvalidTask(
                f"{other.__name__}() has the parameter {both[0]}, which run() has already: "
                "rename it"
            )
        parameters |= more
    return parameters


def _named(method: str, function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that have a name, and whether the function takes others, too."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # an annotation in quotes is evaluated, and may raise anything
        raise InvalidTask(
            f"the signature of {method}() can't be read: {failures.message_of(error)}"
        ) from error
    parameters, takes_others = {}, False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InvalidTask(
                f"{method}() takes {name!r} by position only; parameters are passed by name: "
                "remove the `/`"
            )
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            parameters[name] = parameter
        takes_others |= parameter.kind is parameter.VAR_KEYWORD
    return parameters, takes_others


def _takes_nothing(run: Callable[..., Any]) -> bool:
    """Whether the signature is `run(self)`, without anything to evaluate. This check is quick."""
    function = getattr(run, "__func__", None)
    if type(run) is not MethodType or type(function) is not FunctionType:
        return False
    if hasattr(function, "__wrapped__") or hasattr(function, "__signature__"):
        return False
    code, annotations = function.__code__, function.__annotations__
    takes_others = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    is_plain = code.co_argcount == 1 and code.co_kwonlyargcount == 0 and not takes_others
    return is_plain and (
        not annotations
        or (len(annotations) == 1 and annotations.get("return", "") in (None, "None"))
    )


def _written(
    names: Iterable[str], methods: Iterable[Callable[..., Any]]
) -> Mapping[str, inspect.Parameter]:
    written = {
        name: p for method in methods for name, p in inspect.signature(method).parameters.items()
    }
    return {name: written[name] for name in names}


class _Schema:
    """Checks the parameters with `adapter`. `json`: the JSON schema, without the slot; None if
    there is none.
    """

    def __init__(self, shape: Any) -> None:
        self.adapter: TypeAdapter[Any] = TypeAdapter(shape)

    @functools.cached_property
    def json(self) -> dict[str, Any] | None:
        try:
            schema = self.adapter.json_schema()
        except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
            return None
        schema.get("properties", {}).pop(SLOT, None)
        return schema


def _schema(parameters: Mapping[str, inspect.Parameter], required: Collection[str]) -> _Schema:
    kinds = tuple(
        (name, Any if p.annotation is p.empty else p.annotation) for name, p in parameters.items()
    )
    # Only plain classes are surely the same if they are equal. Literal[1], for example, equals
    # Literal[True].
    is_shared = all(kind is Any or type(kind) is type for _, kind in kinds)
    return (_shared_schema if is_shared else _new_schema)(kinds, tuple(required))


def _new_schema(kinds: tuple[tuple[str, Any], ...], required: tuple[str, ...]) -> _Schema:
    fields = {name: kind if name in required else NotRequired[kind] for name, kind in kinds}
    # A TypedDict, because a pydantic model can't have fields named `copy`, `json` or `schema`.
    shape = TypedDict("run", fields)  # type: ignore[misc] # made at run time
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    shape.__pydantic_config__ = config  # type: ignore[attr-defined]
    try:
        if SLOT in (by_name := dict(kinds)):
            TypeAdapter(by_name[SLOT]).validate_python(datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC))
        return _Schema(shape)
    except ValidationError:
        raise InvalidTask(
            "the parameter slot of run() is filled with a datetime: write `slot: datetime`"
        ) from None
    except (PydanticUserError, NameError) as error:
        # The rest is advice about pydantic's own settings.
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InvalidTask(
            f"the parameters of run() can't be checked: {reason}; allowed: types that pydantic "
            "reads from JSON, "
            "such as str, int, date, list[str] or a model"
        ) from error


_shared_schema = functools.lru_cache(maxsize=1_000)(_new_schema)
