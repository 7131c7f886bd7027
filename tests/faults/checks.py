"""What must hold when the services have come to rest."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from math import inf

from tests.faults import parts, waiting
from tests.faults.evidence import Evidence, Row
from tests.faults.world import LEASE, OF_POOL, World

ATTEMPTS = {"flaky": 3, "failing": 2, "letter": 2, "sums": 2, "pooled_sums": 2}
"""How often the tasks with a retry are tried; all others once."""
WAITS = {"flaky": 0.3, "failing": 0.2, "letter": 0.2, "sums": 0.2, "pooled_sums": 0.2}
"""How long before that, in seconds, at least."""
OUTCOMES = {"succeeded": ("succeeded",), "failed": ("failed", "timed out", "lost", "interrupted")}
NEVER_STOPPED = ("sync", "failing")
"""Their bodies are in threads, which nobody can stop. What they write is refused."""
SLACK_SECONDS = LEASE / 3
"""How much later than it should a node's body may end: two cores are shared by many processes."""

FORGOTTEN_SECONDS = 4 * LEASE
"""Nothing keeps a node so long from what it has claimed, but that it knows nothing of it."""


def two_runs_of_a_slot(evidence: Evidence) -> Iterator[str]:
    no_slots = ("manual", "part")
    scheduled = Counter(
        (run["task"], str(run["slot"])) for run in evidence.runs if run["origin"] not in no_slots
    )
    yield from (
        f"slot {slot} of {task} has {n} runs in the ledger"
        for (task, slot), n in scheduled.items()
        if n > 1
    )
    ran: dict[tuple[str, str], set[str]] = defaultdict(set)
    started = {
        run["id"] for run in evidence.runs if run["origin"] == "manual"
    } | evidence.parents.keys()
    for line in (line for line in evidence.told if line["run"] not in started):
        ran[line["task"], line["slot"]].add(line["run"])
    yield from (
        f"slot {slot} of {task} ran as {sorted(ids)}"
        for (task, slot), ids in ran.items()
        if len(ids) > 1
    )


def attempts_without_an_end(evidence: Evidence) -> Iterator[str]:
    """A run has as many attempts as it was claimed, and the last one says what became of it."""
    ended: dict[str, dict[int, Row]] = defaultdict(dict)
    for attempt in evidence.attempts:
        ended[attempt["run"]][attempt["fence"]] = attempt
    for run in evidence.runs:
        own = ended[run["id"]]
        if sorted(own) != list(range(1, run["fence"] + 1)):
            yield (
                f"run {run['id']} of {run['task']} was claimed {run['fence']} times, and these "
                f"ended: {sorted(own)}"
            )
        elif run["state"] in ("succeeded", "failed"):
            outcome = own[run["fence"]]["outcome"]
            allowed = (
                ("split", "resumed")
                if parts.PARTS_FAILED.search(run["reason"] or "")
                else OUTCOMES[run["state"]]
            )
            if outcome not in allowed:
                yield (
                    f"run {run['id']} of {run['task']} has {run['state']}, and its last attempt "
                    f"{outcome}"
                )
    known = {run["id"] for run in evidence.runs}
    for line in evidence.of("start"):
        if parts.is_deleted(evidence, line["run"], known):
            continue
        if line["run"] not in known or line["fence"] not in ended[line["run"]]:
            yield (
                f"the attempt of {line['task']}, run {line['run']}, fence {line['fence']}, is in "
                "no ledger"
            )


def starts_under_one_fence(evidence: Evidence) -> Iterator[str]:
    times = Counter((line["run"], line["fence"]) for line in evidence.of("start"))
    yield from (
        f"run {run} began {n} times under fence {fence}"
        for (run, fence), n in times.items()
        if n > 1
    )


def runs_without_a_reason(evidence: Evidence) -> Iterator[str]:
    for run in evidence.runs:
        if run["state"] != "succeeded" and not run["reason"]:
            yield f"run {run['id']} of {run['task']} is {run['state']}, and nobody says why"


def attempts_used_up(evidence: Evidence) -> Iterator[str]:
    """An interruption uses up none, and a loss neither: after one that the run pays for, another
    attempt is allowed.
    """
    for run in evidence.runs:
        allowed = ATTEMPTS.get(run["task"], 1) * (1 + evidence.asked(run["id"]))
        used = run["attempt"] - run["attempts_before"]
        if used > allowed:
            yield f"run {run['id']} of {run['task']} has used {used} attempts, allowed: {allowed}"


def begun_again(evidence: Evidence) -> Iterator[str]:
    for run, fences in evidence.starts().items():
        task = next(iter(fences.values()))["task"]
        if task == "once" and len(fences) > 1 + evidence.reopened[run]:
            yield (
                f"run {run} of {task} has rerun = False, and began under the fences "
                f"{sorted(fences)}"
            )


def changes_of_final_states(evidence: Evidence) -> Iterator[str]:
    awaited = waiting.awaited(evidence)
    known = {run["id"] for run in evidence.runs}
    for run, states in evidence.finals.items():
        if run in known and len(states) > 1 + waiting.asked_again(evidence, awaited, run):
            yield (
                f"run {run} was over in more than one way, and reopened {evidence.asked(run)} "
                f"times: {states}"
            )


def late_commits(evidence: Evidence) -> Iterator[str]:
    """What an older attempt committed, a newer one has seen when it began; and each part once,
    under rising fences.
    """
    by_run: dict[str, list[Row]] = defaultdict(list)
    for row in evidence.rows:
        by_run[row["run"]].append(row)
    for run, own in by_run.items():
        written = [(row["fence"], row["part"]) for row in own]
        if written != sorted(set(written)):
            yield f"run {run} of {own[0]['task']} committed (fence, part) in this order: {written}"
    for line in evidence.of("seen"):
        before = {row["number"] for row in by_run[line["run"]] if row["fence"] < line["fence"]}
        if late := before - set(line["numbers"]):
            yield (
                f"run {line['run']} of {line['task']}: rows {sorted(late)} came after fence "
                f"{line['fence']} began"
            )
    yield from _commits_after_the_next_start(
        evidence, {(r["run"], r["fence"], r["part"]) for r in evidence.rows}
    )


def _commits_after_the_next_start(
    evidence: Evidence, committed: set[tuple[str, int, int]]
) -> Iterator[str]:
    starts = evidence.starts()
    for line in evidence.of("committing"):
        if (line["run"], line["fence"], line["part"]) not in committed:
            continue
        for fence, start in starts[line["run"]].items():
            if fence > line["fence"] and start["at"] < line["at"]:
                late = line["at"] - start["at"]
                yield (
                    f"run {line['run']} of {line['task']}, fence {line['fence']}: came {late:.3f} "
                    f"s after {fence}"
                )


def commits_that_are_missing(evidence: Evidence) -> Iterator[str]:
    """The result of a run is how often its body commits."""
    written = Counter((row["run"], row["fence"]) for row in evidence.rows)
    for run in evidence.runs:
        if run["task"] in parts.TASKS:
            continue
        if (
            run["state"] == "succeeded"
            and (there := written[run["id"], run["fence"]]) != run["result"]
        ):
            yield (
                f"run {run['id']} of {run['task']} has succeeded with {there} commits of "
                f"{run['result']}"
            )


def bodies_beyond_the_lease(evidence: Evidence) -> Iterator[str]:
    """A body that is not frozen has ended before the next attempt of its run begins: its node gave
    it up in time.
    """
    last: dict[tuple[str, int], Row] = {
        (line["run"], line["fence"]): line for line in evidence.told
    }
    for run, fences in evidence.starts().items():
        for fence, start in fences.items():
            later = [each["at"] for other, each in fences.items() if other > fence]
            end = last[run, fence]
            if (
                not later
                or start["task"] in NEVER_STOPPED
                or _was_frozen(evidence, start, min(later))
            ):
                continue
            if (over := end["at"] - min(later)) > SLACK_SECONDS:
                yield (
                    f"run {run} of {start['task']}: fence {fence} went on for {over:.2f} s beside "
                    "the next one"
                )


def _was_frozen(evidence: Evidence, start: Row, until: float) -> bool:
    return any(
        pid == start["pid"] and since < until + LEASE and start["at"] < to
        for pid, since, to in evidence.frozen
    )


def losses_without_a_cause(evidence: Evidence) -> Iterator[str]:
    """A node that lives and reaches the ledger is not taken for dead."""
    starts = evidence.starts()
    for attempt in evidence.attempts:
        start = starts[attempt["run"]].get(attempt["fence"])
        if attempt["outcome"] != "lost" or start is None:
            continue
        until = min(
            (s["at"] for fence, s in starts[attempt["run"]].items() if fence > attempt["fence"]),
            default=inf,
        )
        if not any(
            pid == start["pid"] and since < until and start["at"] < to
            for pid, since, to in evidence.disturbed
        ):
            yield (
                f"run {attempt['run']} of {start['task']}: fence {attempt['fence']} lost while "
                f"{start['pid']} lived"
            )


def retries_too_early(evidence: Evidence) -> Iterator[str]:
    """Also on a node whose clock is behind."""
    starts = evidence.starts()
    failed = {
        (attempt["run"], attempt["fence"])
        for attempt in evidence.attempts
        if attempt["outcome"] == "failed"
    }
    for line in evidence.of("end") if evidence.has_one_clock else []:
        run, fence = line["run"], line["fence"]
        again = starts[run].get(fence + 1)
        if (run, fence) in failed and again and not evidence.asked(run):
            waited = again["at"] - line["at"]
            if waited < 0.9 * WAITS.get(line["task"], 0.0):
                yield (
                    f"run {run} of {line['task']}: fence {fence + 1} began {waited:.2f} s after "
                    f"{fence} had failed"
                )


def claimed_and_forgotten(evidence: Evidence) -> Iterator[str]:
    """What a node that lives has claimed, it begins, or gives back: also when the reply to its
    claim was lost.
    """
    starts = evidence.starts()
    for attempt in evidence.attempts if evidence.has_one_clock else []:
        if attempt["fence"] in starts[attempt["run"]]:
            continue
        claimed, ended = (
            attempt[name].timestamp() - evidence.boot for name in ("started_at", "ended_at")
        )
        stops = (
            since for pid, since, _ in evidence.stopped if pid == attempt["pid"] and since > claimed
        )
        if (seconds := min([ended, *stops]) - claimed) > FORGOTTEN_SECONDS:
            yield (
                f"run {attempt['run']}, fence {attempt['fence']}: claimed for {seconds:.1f} s, "
                "and never begun"
            )


def in_the_wrong_pool(evidence: Evidence) -> Iterator[str]:
    for line in evidence.of("start"):
        if (line["task"] in OF_POOL) != (line["pid"] in evidence.workers):
            kind = "worker" if line["pid"] in evidence.workers else "service"
            yield f"run {line['run']} of {line['task']} began in the {kind} {line['pid']}"


def hardly_anything(evidence: Evidence) -> Iterator[str]:
    if not any(run["state"] == "succeeded" for run in evidence.runs):
        yield "no run has succeeded: whatever was done to the services, it shows nothing"


CHECKS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    two_runs_of_a_slot,
    attempts_without_an_end,
    starts_under_one_fence,
    runs_without_a_reason,
    attempts_used_up,
    begun_again,
    changes_of_final_states,
    late_commits,
    commits_that_are_missing,
    bodies_beyond_the_lease,
    losses_without_a_cause,
    claimed_and_forgotten,
    retries_too_early,
    in_the_wrong_pool,
    hardly_anything,
    *waiting.CHECKS,
    *parts.CHECKS,
)


def wrong(world: World, evidence: Evidence) -> list[str]:
    """Sentences about everything that does not hold; an empty list if all is well."""
    violations = [sentence for check in CHECKS for sentence in check(evidence)]
    strange = [
        said
        for file in sorted(world.folder.glob("*.stderr"))
        for said in strange_errors(file.read_text())
    ]
    return [
        *world.wrong,
        *_of_the_account(world),
        *violations,
        *strange,
        *_stories(evidence, violations),
    ]


def strange_errors(stderr: str) -> Iterator[str]:
    """Tracebacks that are not of a task's own error: what is foreseen is told in one line."""
    last = ""
    lines = stderr.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\d{4}-\d\d-\d\dT", line):
            last = line
        elif line.startswith("Traceback (most") and " task=" not in last:
            yield "\n".join(
                ["an error that nobody has foreseen:", last, *lines[number : number + 60]]
            )
            return


def _of_the_account(world: World) -> Iterator[str]:
    done = world.batch("account", "--since", "7d")
    if done.returncode != 0:
        yield f"the account is not complete:\n{done.stdout}{done.stderr}"


def _stories(evidence: Evidence, violations: list[str]) -> Iterator[str]:
    """Everything that is known about the first five runs that `violations` name."""
    named = dict.fromkeys(re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", " ".join(violations)))
    for run in list(named)[:5]:
        lines = [
            *(str(row) for row in evidence.runs if row["id"] == run),
            *(str(row) for row in evidence.attempts if row["run"] == run),
            *(str(row) for row in evidence.rows if row["run"] == run),
            *(str(line) for line in evidence.told if line["run"] == run),
            *(f"seen: {state}" for state in evidence.finals.get(run, [])),
        ]
        yield "\n    ".join([f"all about run {run}:", *lines])
