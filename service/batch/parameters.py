"""The parameters of a task: the signature of `run` is the schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError, create_model

from service.errors import InvalidParameters, InvalidTask

SLOT = "slot"


class Parameters:
    """What `run` takes after `self`. A parameter named `slot` is filled with the run's slot when it is not given."""

    def __init__(self, task: str, run: Callable[..., Any]) -> None:
        self._task = task
        self._model = _model_of(task, run)
        self.takes_slot = SLOT in self._model.model_fields

    @property
    def names(self) -> list[str]:
        return list(self._model.model_fields)

    @property
    def required(self) -> list[str]:
        """Those without a default: a scheduled run can't fill them."""
        fields = self._model.model_fields.items()
        return [name for name, field in fields if field.is_required() and name != SLOT]

    def to_json(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check `given` (values or their text forms) and return what the ledger stores: only what was given.

        Raises InvalidParameters naming the task, the parameter, and what is allowed.
        """
        checked = self._check(given, check_slot=False)
        return checked.model_dump(mode="json", include=set(given))

    def to_call(self, stored: Mapping[str, Any], slot: datetime) -> dict[str, Any]:
        """The keyword arguments for one attempt."""
        filled = {**stored, SLOT: slot} if self.takes_slot and SLOT not in stored else stored
        checked = self._check(filled, check_slot=True)
        return {name: getattr(checked, name) for name in filled}

    def _check(self, given: Mapping[str, Any], check_slot: bool) -> BaseModel:
        try:
            return self._model.model_validate(dict(given))
        except ValidationError as error:
            wrong = [e for e in error.errors() if check_slot or SLOT not in e["loc"] or e["type"] != "missing"]
            if not wrong:
                return self._model.model_construct(**given)
            allowed = f"it takes {', '.join(self.names)}" if self.names else "it takes none"
            sentences = "; ".join(_sentence(e) for e in wrong)
            raise InvalidParameters(f"parameters of task {self._task}: {sentences} ({allowed})") from None


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no parameter {name!r}"
    if error["type"] == "missing":
        return f"{name} is required"
    return f"{name} is {error['input']!r}: {error['msg']}"


def _model_of(task: str, run: Callable[..., Any]) -> type[BaseModel]:
    try:
        signature = inspect.signature(run, eval_str=True)
    except (NameError, TypeError, ValueError) as error:
        raise InvalidTask(f"the signature of run() can't be read: {error}") from error
    fields: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InvalidTask(f"run() takes {parameter.name!r} by position only; parameters are passed by name")
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[parameter.name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    try:
        return create_model(f"{task}.run", __config__=ConfigDict(extra="forbid"), **fields)
    except (PydanticUserError, NameError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidTask(f"the parameters of run() can't be checked: {reason}") from error
