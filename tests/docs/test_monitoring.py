"""The files in docs/monitoring/ and the page about them: a running service shows each metric that
they name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from batch_system.batch.ledger.states import IncidentKind
from batch_system.metrics.process import Fate, LedgerWork
from batch_system.operations.asking.actor import ROLES
from batch_system.verbs.run_changes import StartRun
from batch_system.verbs.runs import ShowRun
from batch_system.web import exposition
from tests.batch.ledger_world import until
from tests.docs_blocks import read, rows, section
from tests.web.conftest import Served, served
from tools.reference import metrics

__all__ = ["served"]

FOLDER = Path(__file__).parent.parent.parent / "docs/monitoring"
PAGE = "docs/monitoring.md"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
IN_GRAFANA = {"$__rate_interval": "5m", "$job": "batch"}


@cache
def rules() -> list[dict[str, Any]]:
    return [
        rule
        for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]


@cache
def panels() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    return [panel for panel in shown if panel["type"] != "row"]


OF_PROMETHEUS = {"up"}
"""What Prometheus itself knows of each process that it asks."""


def in_dashboard() -> list[str]:
    """The queries of the dashboard, with values for the variables of Grafana."""
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    for variable, value in IN_GRAFANA.items():
        queries = [query.replace(variable, value) for query in queries]
    return queries


def on_page() -> list[str]:
    return re.findall(r"`([^`]*batch_[^`]*)`", section(PAGE, "## What to look at first"))


def queries() -> list[str]:
    return [*(rule["expr"] for rule in rules()), *in_dashboard(), *on_page()]


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """The metrics that a query selects. Raises ValueError if Prometheus could not read it."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def metrics_of_the_reference() -> dict[str, tuple[str, set[str]]]:
    """The type and the labels of each metric, by its name."""
    named = {
        re.fullmatch(r"(\w+)(?:\{(.+)\})?", name): cells for name, cells in rows(metrics()).items()
    }
    return {
        found[1]: (cells[0], set((found[2] or "").split(",")) - {""})
        for found, cells in named.items()
        if found
    }


async def families(served: Served) -> dict[str, tuple[str, set[str]]]:
    """The type and the labels of each metric of a real scrape, by its name. One without a sample
    has no labels here.
    """
    text = (await served.nobody.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
    return found


def series(found: dict[str, tuple[str, set[str]]]) -> set[str]:
    suffixes = SUFFIXES | {"counter": ("",)}  # their names have it already
    return {f"{name}{suffix}" for name, (kind, _) in found.items() for suffix in suffixes[kind]}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_reference_the_rules_and_the_dashboard_name_the_metrics_of_a_real_scrape(
    served: Served,
) -> None:
    run = await served.operations(StartRun(name="report", parameters={}))

    async def has_ended() -> bool:
        return (await served.operations(ShowRun(run=run.id))).state == "succeeded"

    await until(has_ended)
    found, page = await families(served), metrics_of_the_reference()
    assert found.keys() == page.keys()
    assert {name: kind for name, (kind, _) in found.items()} == {
        name: kind for name, (kind, _) in page.items()
    }
    labels = {name: labels for name, (_, labels) in found.items() if labels}
    assert labels == {name: page[name][1] for name in labels} and len(labels) > 10
    used = {str(selector.name) for query in queries() for selector in selectors(query)}
    assert len(used) > 20 and used <= series(found) | OF_PROMETHEUS


def test_each_query_selects_by_labels_that_its_metric_has() -> None:
    page = {
        f"{name}{suffix}": labels | ({"le"} if suffix == "_bucket" else set())
        for name, (kind, labels) in metrics_of_the_reference().items()
        for suffix in (SUFFIXES | {"counter": ("",)})[kind]
    }
    for query in queries():
        for selector in selectors(query):
            if str(selector.name) in OF_PROMETHEUS:
                continue
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched - {"job"} <= page[str(selector.name)], query


def test_gauges_of_the_ledger_are_never_added_up_over_processes() -> None:
    gauges = {family.name for family in exposition.families()[1]}
    named = "|".join(sorted(gauges))
    for query in queries():
        for used in re.finditer(rf"\b({named})\b(?!_)", query):
            before = query[: used.start()]
            assert re.search(r"\bmax(?: by \([\w, ]+\))? ?\($", before), query


def test_a_wrong_query_would_be_seen() -> None:
    for wrong in (
        "max by (task batch_runs",
        "rate(batch_runs_total)",
        "histogram_quantile(batch_runs)",
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - each has another text
            selectors(wrong)
    assert [
        str(found.name) for found in selectors('sum(rate(a_total{x="y"}[5m])) > on (b) max(c)')
    ] == ["a_total", "c"]


def test_each_rule_says_how_bad_it_is_and_what_it_means() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 10 and all(
        re.fullmatch(r"Batch[A-Za-z]+", name) for name in names
    )
    for rule in rules():
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert re.fullmatch(r"\d+[ms]", rule.get("for", "1m"))
        templates = re.findall(r"\{\{(.*?)\}\}", " ".join(rule["annotations"].values()))
        assert all(
            re.fullmatch(r" \$(value|labels\.\w+)( \| humanizeDuration)? ", each)
            for each in templates
        )


def test_the_runbook_has_a_section_of_each_kind_of_incident_and_of_each_rule() -> None:
    page = (FOLDER.parent / "runbook.md").read_text()
    of_kinds, of_rules = (
        re.findall(r"^### (\w+)$", part, re.MULTILINE) for part in page.split("\n## Rules\n")
    )
    assert of_kinds == list(IncidentKind)
    assert of_rules == [rule["alert"] for rule in rules()]


def test_the_tests_of_the_rules_are_about_rules_that_are_there() -> None:
    tests = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())
    assert tests["rule_files"] == ["rules.yaml"]
    by_name = {rule["alert"]: rule for rule in rules()}
    for case in (case for test in tests["tests"] for case in test["alert_rule_test"]):
        rule = by_name[case["alertname"]]
        for expected in case["exp_alerts"]:
            assert expected["exp_labels"]["severity"] == rule["labels"]["severity"]
            for name in ("summary", "runbook"):
                assert expected["exp_annotations"][name] == rule["annotations"][name]


PROMTOOL = (
    ("check", "rules", "rules.yaml"),
    ("check", "config", "--syntax-only", "prometheus.yaml"),
    ("test", "rules", "rules.test.yaml"),
)


@pytest.mark.nightly
def test_promtool_agrees_where_it_is_found() -> None:
    """Prometheus' own tool is not in a Python package. The tests above read the files without
    it.
    """
    promtool = shutil.which("promtool")
    for command in PROMTOOL if promtool is not None else ():
        ran = subprocess.run([str(promtool), *command], cwd=FOLDER, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


# The dashboard.


def overlaps(panels: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    places = [(panel["title"], panel["gridPos"]) for panel in panels]
    for number, (title, at) in enumerate(places):
        for other, there in places[:number]:
            beside = at["x"] + at["w"] <= there["x"] or there["x"] + there["w"] <= at["x"]
            if not beside and at["y"] < there["y"] + there["h"] and there["y"] < at["y"] + at["h"]:
                yield other, title


def test_the_panels_of_the_dashboard_have_a_place_and_a_source_of_their_own() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"source", "job"}
    shown = dashboard["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    assert list(overlaps(shown)) == []
    for panel in panels():
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"]["uid"] == "${source}" and panel["title"]
        assert all(target["datasource"]["uid"] == "${source}" for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_shows_one_ledger_and_most_of_the_metrics() -> None:
    chosen = [selector for query in in_dashboard() for selector in selectors(query)]
    assert all('job="batch"' in str(selector) for selector in chosen)
    shown = {re.sub(r"_bucket$", "", str(selector.name)) for selector in chosen}
    assert {name for name in metrics_of_the_reference() if name not in shown} == set()


# The page.


def test_the_page_has_each_fate_of_a_slot_and_each_work_on_the_ledger() -> None:
    labels = rows(section(PAGE, "## Labels"))
    for name, words in (("fate", Fate), ("statement", LedgerWork)):
        assert {str(word) for word in words} <= set(re.findall(r"`(\w+)`", labels[name][0])), name


def test_the_scrape_of_the_example_asks_for_the_path_of_the_service_with_a_token() -> None:
    [job] = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["authorization"]["type"] == "Bearer"
    assert len(job["static_configs"][0]["targets"]) > 1
    assert f"--role {ROLES[0]}" in read(PAGE)
