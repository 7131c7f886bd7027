"""The policies of a task as sentences. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from batch_system.batch.tasks.limit import MOST
from batch_system.pages.frame.formatting import counted, duration


class Says(NamedTuple):
    """A policy: its icon, the sentence, and what is declared in the file of the task."""

    icon: str
    sentence: str
    declared: str


def policies_in_words(changed: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Says]:
    """What the policies mean. `changed`: those that differ from the `defaults`, by dotted name."""
    values = {**defaults, **changed}
    found = [
        Says("skip-forward", _missed(values), _declared("missed", changed, defaults)),
        *(
            _limits(changed, defaults)
            or [Says("hourglass", _overlap(values), _declared("overlap", changed, defaults))]
        ),
        Says("rotate-cw", _retry(values), _declared("retry", changed, defaults)),
        Says("timer", _timeout(values), _declared("timeout", changed, defaults)),
    ]
    more = {
        "rerun": ("ban", _rerun),
        "priority": ("arrow-right", _priority),
        "deadline": ("calendar-clock", _deadline),
        "expect_every": ("calendar-check", _expect_every),
        "each_slot_counts": ("calendar-check", _each_slot),
    }
    for name, (icon, sentence) in more.items():
        if name in changed:
            found.append(Says(icon, sentence(values), _declared(name, changed, defaults)))
    return found


def _time(seconds: float | None) -> str:
    """A declared time, such as 2 days, 4 h or 90 s."""
    whole = round(seconds or 0)
    if whole and whole % 86_400 == 0:
        return counted(whole // 86_400, "day")
    return f"{whole // 3_600} h" if whole and whole % 3_600 == 0 else duration(seconds)


def _declared(name: str, changed: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Such as `overlap = "wait" (default)`, or `missed.policy = "skip"`."""
    own = {key: value for key, value in changed.items() if key.partition(".")[0] == name}
    if own:
        return ", ".join(f"{key} = {json.dumps(value)}" for key, value in own.items())
    first = next((key for key in defaults if key.partition(".")[0] == name), name)
    return f"{first} = {json.dumps(defaults.get(first))} (default)"


def _missed(values: Mapping[str, Any]) -> str:
    policy = values.get("missed.policy")
    age = _time(values.get("missed.max_age"))
    if policy == "skip":
        return "Slots that are missed are skipped."
    if policy == "once":
        return f"Of slots that are missed, the newest one runs, if it is at most {age} old."
    most = values.get("missed.max_count")
    at_most = f", {counted(most, 'slot')} at most" if most else ""
    return f"Slots that are missed all run, the oldest first, from {age} back{at_most}."


def _overlap(values: Mapping[str, Any]) -> str:
    running = values.get("max_running")
    at_a_time = f"At most {running:,} runs at a time" if running else "One run at a time"
    overlap = values.get("overlap")
    if overlap == "allow":
        return f"{at_a_time}." if running else "Runs may overlap: each slot runs when it is due."
    if overlap == "replace":
        return f"{at_a_time}; a slot that comes while it runs replaces it."
    if overlap == "wait":
        most = values.get("max_waiting") or 1
        waits = "the next slot waits for it" if most == 1 else f"up to {most:,} slots wait for it"
        return f"{at_a_time}; {waits}."
    return f"{at_a_time}; a slot that comes while it runs is skipped."


def _limits(changed: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Says]:
    """The limit and the rate of a task. A rate without a limit has the largest limit there is."""
    found = []
    if (number := changed.get("limit.number")) not in (None, MOST):
        is_dynamic = changed.get("limit.default") is not None
        most = f"as many runs as a function says ({number:,} at first)"
        sentence = f"At most {most if is_dynamic else counted(number, 'run')} at a time"
        total = f", {changed['limit.total']:,} in all" if changed.get("limit.total") else ""
        declared = _declared("limit", changed, defaults)
        found.append(Says("hourglass", f"{sentence}{_of(changed, 'limit')}{total}.", declared))
    if (number := changed.get("rate.number")) is not None:
        sentence = f"At most {counted(number, 'run')} begin within {_time(changed['rate.per'])}"
        declared = _declared("rate", changed, defaults)
        found.append(Says("timer", f"{sentence}{_of(changed, 'rate')}.", declared))
    return found


def _of(changed: Mapping[str, Any], name: str) -> str:
    key = changed.get(f"{name}.key")
    return f" for each value of {key}" if key is not None else ""


def _retry(values: Mapping[str, Any]) -> str:
    attempts = values.get("retry.attempts") or 1
    if attempts <= 1:
        return "A failure is final at once: no retries."
    on = values.get("retry.on") or ["Exception"]
    only = "" if list(on) == ["Exception"] else f" for {', '.join(map(str, on))}"
    wait, longest = (_time(values.get(f"retry.{each}")) for each in ("wait", "max_wait"))
    again = counted(attempts - 1, "more time")
    return f"A run that fails is tried {again}{only}, first after {wait}, at most after {longest}."


def _timeout(values: Mapping[str, Any]) -> str:
    seconds = values.get("timeout")
    if seconds is None:
        return "A run may take as long as it needs."
    return f"A run may take {_time(seconds)}, then it is stopped."


def _rerun(_: Mapping[str, Any]) -> str:
    return "A run that is interrupted is not run again."


def _priority(values: Mapping[str, Any]) -> str:
    side = "before" if values["priority"] > 0 else "after"
    return f"Its runs go {side} those of other tasks that wait."


def _deadline(values: Mapping[str, Any]) -> str:
    deadline = values["deadline"]
    if isinstance(deadline, str):
        return f"A slot has to have succeeded by {deadline}."
    return f"A slot has to have succeeded within {_time(deadline)}."


def _expect_every(values: Mapping[str, Any]) -> str:
    return f"There has to be a success every {_time(values['expect_every'])}."


def _each_slot(values: Mapping[str, Any]) -> str:
    if values["each_slot_counts"]:
        return "Each slot counts: a later success makes none good."
    return "A later success makes a failed slot good."
