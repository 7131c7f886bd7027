"""The files in docs/deployment/: their numbers fit each other, the code, and the page that explains
them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from configparser import RawConfigParser
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.batch.execution import engine
from batch_system.batch.nodes import loop_watchdog
from batch_system.config import Settings, get_settings
from batch_system.operations.backups.restore import RestoreRequest, check_by_restoring, restore
from batch_system.operations.system.gauges import FRESH_SECONDS, PoolGauges
from batch_system.settings.urls import async_url
from batch_system.testing.postgres import PostgresServer
from batch_system.web import api, exposition
from batch_system.web.access import _hosts
from tests.asking import access
from tests.backup.here import make_backups_here
from tests.databases import migrated
from tests.web.conftest import Served, client_of, served
from tests.web.test_access import with_settings

__all__ = ["served"]

ROOT = Path(__file__).parent.parent.parent
FILES = ROOT / "docs/deployment"
PAGE = (ROOT / "docs/deployment.md").read_text()

DRAIN = Settings.model_fields["DRAIN_SECONDS"].default
ENDED = loop_watchdog.GRACE_SECONDS + loop_watchdog.LAST_SECONDS
"""How long after DRAIN_SECONDS the watchdog has ended the process."""
BUSY = 5
"""For servers that look for signals now and then, and for a machine that is busy."""


class Unit(RawConfigParser):
    """A systemd unit: names with capitals, and some of them several times."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, dict_type=dict)
        self.lines = [
            line.partition("=") for line in path.read_text().splitlines() if re.match(r"\w+=", line)
        ]
        self.read(path)

    def optionxform(self, optionstr: str) -> str:
        return optionstr

    def all(self, name: str) -> list[str]:
        return [value for key, _, value in self.lines if key == name]


@cache
def unit() -> Unit:
    return Unit(FILES / "batch.service")


@cache
def dockerfile() -> dict[str, list[str]]:
    """The arguments of each instruction, with continued lines joined."""
    found: dict[str, list[str]] = {}
    text = (FILES / "Dockerfile").read_text().replace("\\\n", "")
    for word, rest in re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE):
        found.setdefault(word, []).append(rest)
    return found


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load((FILES / "compose.yaml").read_text())  # type: ignore[no-any-return]


@cache
def kubernetes() -> dict[str, dict[str, Any]]:
    return {
        document["kind"]: document
        for document in yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    }


def pod() -> dict[str, Any]:
    return kubernetes()["Deployment"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only  # type: ignore[no-any-return]


def keda() -> dict[str, Any]:
    return {
        document["kind"]: document
        for document in yaml.safe_load_all((FILES / "keda.yaml").read_text())
    }


def image_settings() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in dockerfile()["ENV"] for pair in shlex.split(line))


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


GRACE = {
    "batch.service": lambda: seconds(unit()["Service"]["TimeoutStopSec"]),
    "compose.yaml": lambda: seconds(compose()["services"]["batch"]["stop_grace_period"]),
    "kubernetes.yaml": lambda: pod()["terminationGracePeriodSeconds"],
    "keda.yaml": lambda: keda()["Deployment"]["spec"]["template"]["spec"][
        "terminationGracePeriodSeconds"
    ],
    "docker run": lambda: int(re.findall(r"--stop-timeout (\d+) --", PAGE)[0]),
}


@pytest.mark.parametrize("file", GRACE)
def test_the_supervisor_waits_longer_than_the_longest_drain(file: str) -> None:
    assert GRACE[file]() >= DRAIN + ENDED + BUSY


def test_a_drain_that_goes_well_is_over_before_the_watchdog_ends_it() -> None:
    assert engine.REACT_SECONDS + engine.WRITE_SECONDS < loop_watchdog.GRACE_SECONDS
    assert f"gone after {DRAIN + ENDED:g} seconds" in PAGE
    assert DRAIN + ENDED < 30  # what Kubernetes grants


def test_the_page_names_the_same_numbers() -> None:
    (grace,) = {find() for find in GRACE.values()}
    assert f"is **{grace}** in all three files" in PAGE
    assert f"`DRAIN_SECONDS` ({DRAIN:g})" in PAGE
    text = " ".join(PAGE.split())
    assert f"difference of {grace - DRAIN:g} seconds" in text
    assert f"default of 30, set `DRAIN_SECONDS` to {30 - (grace - DRAIN):g}" in text
    assert f"| `DRAIN_SECONDS` | {grace - DRAIN:g} less than" in PAGE


def test_no_file_names_a_registry() -> None:
    """A host has a dot before the first slash of an image's name."""
    images = [*dockerfile()["FROM"], container()["image"]]
    images += [service["image"] for service in compose()["services"].values() if "image" in service]
    assert len(images) == 3 and not any(
        "." in image.partition("/")[0] for image in images if "/" in image
    )


# Settings.


def settings_of_files() -> list[tuple[str, str, str]]:
    own = {"TMPDIR", "PYTHONUNBUFFERED", "PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK"}
    found = [("Dockerfile", *pair) for pair in image_settings().items()]
    found += [("batch.service", *line.split("=", 1)) for line in unit().all("Environment")]
    found += [
        ("compose.yaml", *pair) for pair in compose()["services"]["batch"]["environment"].items()
    ]
    found += [("kubernetes.yaml", e["name"], e["value"]) for e in container()["env"]]
    found += [("kubernetes.yaml", *pair) for pair in kubernetes()["Secret"]["stringData"].items()]
    return [(file, name, value) for file, name, value in found if name not in own]


@pytest.mark.parametrize(("file", "name", "value"), settings_of_files(), ids=lambda part: part[:20])
def test_each_setting_of_a_file_is_one_of_ours_and_its_value_is_allowed(
    file: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in Settings.model_fields
    value = re.sub(r"\$\{.*?\}", "secret", value)
    monkeypatch.setenv(name, value)
    assert str(getattr(Settings(), name)) in (
        value,
        async_url(value) if name.endswith("_URL") else value,
        f"{value}.0",
    )


def test_what_is_written_to_lies_where_the_service_may_write() -> None:
    (state,) = unit().all("StateDirectory")
    folders = [f"/var/lib/{folder}" for folder in state.split()]
    written = dict(line.split("=", 1) for line in unit().all("Environment"))
    assert unit()["Service"]["ProtectSystem"] == "strict"
    assert written["BACKUP_DIR"] in folders and written["TMPDIR"] in folders
    assert str(Path(written["DATABASE_URL"].removeprefix("sqlite:///")).parent) in folders

    (volume,) = dockerfile()["VOLUME"]
    image = image_settings()
    assert image["DATABASE_URL"].startswith(f"sqlite:///{volume}/")
    assert all(
        f"{image[name]} " in f"{dockerfile()['RUN'][-1]} " for name in ("BACKUP_DIR", "TMPDIR")
    )
    assert image["BACKUP_DIR"].startswith(f"{volume}/") and image["TMPDIR"].startswith(f"{volume}/")
    assert [v.split(":")[1] for v in compose()["services"]["batch"]["volumes"]] == [volume]

    mounted = {mount["mountPath"] for mount in container()["volumeMounts"]}
    env = {e["name"]: e["value"] for e in container()["env"]}
    assert mounted == {env["BACKUP_DIR"], env["TMPDIR"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod()["volumes"]
    }


def test_only_a_container_listens_on_every_address_and_is_published_to_few() -> None:
    assert image_settings()["HOST"] == "0.0.0.0"
    assert Settings().HOST == "127.0.0.1" and "HOST=" not in str(unit().all("Environment"))
    assert all(port.startswith("127.0.0.1:") for port in compose()["services"]["batch"]["ports"])
    assert re.findall(r"--publish (\S+)", PAGE) == ["127.0.0.1:8000:8000"]
    assert kubernetes()["Service"]["spec"]["type"] == "ClusterIP"


def test_the_service_answers_to_its_names_in_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = next(
        e["value"] for e in container()["env"] if e["name"] == "BATCH_ALLOWED_HOSTS"
    ).split(",")
    service = kubernetes()["Service"]["metadata"]["name"]
    ends = ("", ".default", ".default.svc", ".default.svc.cluster.local")
    assert set(names) == {*(f"{service}{end}" for end in ends), "localhost", "batch.example.com"}
    assert (
        compose()["services"]["batch"]["environment"]["BATCH_ALLOWED_HOSTS"]
        == "${BATCH_ALLOWED_HOSTS:-}"
    )
    assert "# - { name: BATCH_TRUSTED_PROXIES, value: " in (FILES / "kubernetes.yaml").read_text()
    monkeypatch.setenv("HOST", image_settings()["HOST"])
    monkeypatch.setenv("BATCH_ALLOWED_HOSTS", "")
    assert {"localhost", "127.0.0.1"} < (_hosts(Settings()) or set())
    assert "server_name batch.example.com;" in PAGE


@pytest.mark.parametrize("file", ["compose.yaml", "kubernetes.yaml"])
def test_the_command_for_the_first_token_is_that_of_the_page(file: str) -> None:
    [command] = re.findall(
        r"^#.*?((?:docker|kubectl) .*batch token create .*)$",
        (FILES / file).read_text(),
        re.MULTILINE,
    )
    assert f"| `{command}` |" in PAGE


async def test_a_browser_and_a_program_get_through_the_proxy_of_the_page(served: Served) -> None:
    """With the headers that nginx would set."""
    settings = dict(re.findall(r"`(BATCH_\w+)=(\S+)`", PAGE.split("```nginx")[0]))
    values = {"$host": "batch.example.com", "$scheme": "https", "$remote_addr": "203.0.113.5"}
    sent = {
        name: values[value] for name, value in re.findall(r"proxy_set_header (\S+) (\S+);", PAGE)
    }
    assert settings.keys() == {"BATCH_ALLOWED_HOSTS", "BATCH_TRUSTED_PROXIES"}
    assert sent.keys() == {"Host", "X-Forwarded-Proto", "X-Forwarded-For"}
    client = client_of(with_settings(served, **settings))
    body = {"secret": served.secrets["operator"]}
    origin = {"Origin": "https://batch.example.com", "Sec-Fetch-Site": "same-origin"}
    begun = await client.post("/api/v1/session", json=body, headers={**sent, **origin})
    assert begun.status_code == 201, begun.text
    assert (
        begun.headers["set-cookie"].startswith("__Host-batch_session=")
        and "Secure" in begun.headers["set-cookie"]
    )
    cookie, csrf = begun.headers["set-cookie"].split(";")[0], begun.json()["csrf_token"]
    changed = {**sent, **origin, "Cookie": cookie, "X-CSRF-Token": csrf}
    assert (await client.post("/api/v1/tasks/report/pause", headers=changed)).status_code == 200
    with_token = {**sent, "Authorization": f"Bearer {served.secrets['viewer']}"}
    assert (await client.get("/api/v1/tasks", headers=with_token)).status_code == 200
    assert (await client.get("/scheduler/jobs", headers=sent)).status_code == 401
    changes = (
        await served.viewer.get("/api/v1/changes?action=task.pause", headers={"Host": "localhost"})
    ).json()
    assert changes["changes"][0]["address"] == "203.0.113.5"


# Each file.


async def test_the_role_of_the_compose_file_is_an_ordinary_one_and_has_what_the_service_needs(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mounted,) = compose()["services"]["database"]["configs"]
    script = (FILES / compose()["configs"][mounted["source"]]["file"]).read_text()
    assert mounted["target"].startswith("/docker-entrypoint-initdb.d/")
    made, ours = (
        make_url(compose()["services"]["batch"]["environment"]["DATABASE_URL"].replace(":?", "")),
        "batch_ours",
    )
    assert (made.username, made.database) == (
        "batch",
        "batch",
    ) and "ALTER ROLE postgres PASSWORD NULL" in script
    statements = re.findall(r"^CREATE .*;$", script, re.MULTILINE)
    for statement in statements:
        await postgres_server._execute(
            re.sub(r"\bbatch\b", ours, statement.replace(":'password'", "'secret'"))
        )
    url = make_url(postgres_server.url).set(username=ours, password="secret", database=ours)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    make_backups_here(monkeypatch)
    try:
        settings = get_settings()
        await migrated(settings.DATABASE_URL, *access(settings).histories)
        path = str(await create_backup(settings.BACKUP_DIR))
        assert len((await check_by_restoring(access(settings), path)).tables) == 7
        assert len((await restore(access(settings), RestoreRequest(path))).report.tables) == 7
    finally:
        await postgres_server.drop_database(str(url))
        await postgres_server._execute(f"DROP ROLE {ours}")


def test_the_unit_stops_the_service_alone_and_starts_it_again_for_ever() -> None:
    service = unit()["Service"]
    assert (service["Type"], service["KillMode"], service["Restart"]) == ("exec", "mixed", "always")
    assert unit()["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["ExecStart"].endswith("/.venv/bin/batch serve")
    assert service["ExecStart"].startswith(service["WorkingDirectory"])
    assert "git clone URL /opt/batch" in PAGE and service["WorkingDirectory"] == "/opt/batch"
    assert service["EnvironmentFile"] in PAGE


def test_a_signal_reaches_python_in_the_container() -> None:
    (command,), (stop,) = dockerfile()["CMD"], dockerfile()["STOPSIGNAL"]
    assert json.loads(command) == ["batch", "serve"] and stop == "SIGTERM"
    assert compose()["services"]["batch"]["init"] is True


def test_the_image_installs_what_is_locked_and_is_not_root() -> None:
    assert any("--require-hashes -r requirements-image" in line for line in dockerfile()["RUN"])
    assert dockerfile()["USER"] == [str(pod()["securityContext"]["runAsUser"])]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    copied = {source for line in dockerfile()["COPY"] for source in line.split()[:-1]}
    allowed = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied - {"dist/*.whl"})


def test_what_is_installed_can_send_to_people_and_compose_passes_on_the_settings_for_it() -> None:
    """Without Apprise, a service with BATCH_ALERT_URLS does not start."""
    assert re.search(r"^apprise==", (ROOT / "requirements-image.lock").read_text(), re.MULTILINE)
    assert compose()["services"]["batch"]["env_file"] == [{"path": "batch.env", "required": False}]
    assert "docs/deployment/batch.env" in (ROOT / ".gitignore").read_text().splitlines()
    table = PAGE.split("## Settings for production")[1].split("\n\n")[1]
    assert {"BATCH_ALERT_URLS", "BATCH_PING_URL", "BATCH_PUBLIC_URL"} <= set(
        re.findall(r"`(BATCH_\w+)`", table)
    )


def test_one_replica_stays_while_nodes_of_the_cluster_are_drained_or_lost() -> None:
    labels = kubernetes()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    budget, (spread,) = (
        kubernetes()["PodDisruptionBudget"]["spec"],
        pod()["topologySpreadConstraints"],
    )
    assert budget["selector"]["matchLabels"] == spread["labelSelector"]["matchLabels"] == labels
    assert budget["maxUnavailable"] < kubernetes()["Deployment"]["spec"]["replicas"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == (
        "kubernetes.io/hostname",
        "ScheduleAnyway",
    )


def test_the_migration_runs_once_by_the_image_of_the_replicas_and_as_the_same_user() -> None:
    job = yaml.safe_load((FILES / "migrate.yaml").read_text())
    (migrate,) = job["spec"]["template"]["spec"]["containers"]
    assert migrate["args"] == ["batch", "migrate"]
    for name in ("image", "envFrom", "securityContext"):
        assert migrate[name] == container()[name]
    kept = {k: v for k, v in pod()["securityContext"].items() if k != "fsGroup"}
    assert job["spec"]["template"]["spec"]["securityContext"] == kept
    selected = kubernetes()["Service"]["spec"]["selector"].items()
    assert not selected <= job["spec"]["template"]["metadata"]["labels"].items()
    whole = yaml.safe_load((FILES / "kustomization.yaml").read_text())
    documents = [
        document
        for name in whole["resources"]
        for document in yaml.safe_load_all((FILES / name).read_text())
    ]
    steps = {document["kind"]: document["metadata"]["labels"]["step"] for document in documents}
    before = {kind for kind, step in steps.items() if step == "migrate"}
    assert before == {"Secret", "Job"} and set(steps.values()) == {"migrate", "serve"}
    assert [image["name"] for image in whole["images"]] == [migrate["image"].partition(":")[0]]


def test_the_base_image_has_a_python_that_the_project_runs_on() -> None:
    version = re.fullmatch(r"python:3\.(\d+)-slim", dockerfile()["FROM"][0])
    assert version is not None and int(version[1]) >= 11


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_of_the_image_says_what_healthz_says(status: int) -> None:
    """Exactly this command, against a real server."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    check = re.search(r"CMD (\[.*\])$", dockerfile()["HEALTHCHECK"][0])
    assert check is not None
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.handle_request).start()
        _, *rest = json.loads(check[1])
        environment = {**os.environ, "PORT": str(server.server_port)}
        done = subprocess.run([sys.executable, *rest], env=environment, timeout=20)
    assert done.returncode == (status != 200)


def test_the_probes_ask_what_is_there_and_wait_as_long_as_it_may_take() -> None:
    paths = {route.path for route in api.routes}
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {"/healthz", "/readyz"} <= paths
    assert probes["readiness"]["timeoutSeconds"] > api.READY_SECONDS
    assert all(probe["timeoutSeconds"] <= probe["periodSeconds"] for probe in probes.values())
    patience = probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"]
    assert (
        patience > Settings().MAX_LOOP_BLOCK
        and f"`MAX_LOOP_BLOCK` ({Settings().MAX_LOOP_BLOCK:g})" in PAGE
    )
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 300
    check = re.match(r"--interval=(\d+)s --timeout=(\d+)s", dockerfile()["HEALTHCHECK"][0])
    assert check is not None and int(check[2]) > 5


def test_ports_names_and_labels_of_kubernetes_lead_to_each_other() -> None:
    (port,) = container()["ports"]
    service, deployment = kubernetes()["Service"]["spec"], kubernetes()["Deployment"]["spec"]
    assert str(port["containerPort"]) == image_settings()["PORT"] == dockerfile()["EXPOSE"][0]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert (
        service["selector"]
        == deployment["selector"]["matchLabels"]
        == deployment["template"]["metadata"]["labels"]
    )
    assert container()["envFrom"] == [
        {"secretRef": {"name": kubernetes()["Secret"]["metadata"]["name"]}}
    ]
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for v in pod()["volumes"]
        if "persistentVolumeClaim" in v
    ]
    assert claims == [kubernetes()["PersistentVolumeClaim"]["metadata"]["name"]]


def test_replicas_share_postgresql_and_its_connections_are_enough_for_an_update() -> None:
    deployment = kubernetes()["Deployment"]["spec"]
    assert kubernetes()["Secret"]["stringData"]["DATABASE_URL"].startswith("postgresql://")
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    each = Settings().DATABASE_POOL_SIZE + 5 + 1
    assert f"so {each};" in PAGE
    assert (deployment["replicas"] + 1) * each <= 100 - 3  # three are the server's own


def test_the_drain_still_has_its_database() -> None:
    batch, database = compose()["services"]["batch"], compose()["services"]["database"]
    assert batch["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert "@database/" in batch["environment"]["DATABASE_URL"]
    assert seconds(database["stop_grace_period"]) >= seconds(batch["stop_grace_period"])
    named = {volume.split(":")[0] for service in (batch, database) for volume in service["volumes"]}
    assert named == set(compose()["volumes"])


def test_links_of_the_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert len(targets) > 5 and [t for t in targets if not (ROOT / "docs" / t).exists()] == []


def test_the_autoscaler_asks_for_an_existing_metric_and_knows_the_places_of_a_worker() -> None:
    (worker,) = keda()["Deployment"]["spec"]["template"]["spec"]["containers"]
    scaled = keda()["ScaledObject"]["spec"]
    (trigger,) = scaled["triggers"]
    gauges = {family.name for family in exposition._pool_gauges({"cpu": PoolGauges(3, 2, 4)})}
    assert re.fullmatch(r'max\((\w+)\{pool="cpu"\}\)', trigger["metadata"]["query"])[1] in gauges  # type: ignore[index]
    args = worker["args"]
    assert args[args.index("--max-running") + 1] == trigger["metadata"]["threshold"]
    assert {"name": "DRAIN_SECONDS", "value": f"{DRAIN:g}"} in worker["env"]
    assert scaled["scaleTargetRef"]["name"] == keda()["Deployment"]["metadata"]["name"]
    assert scaled["pollingInterval"] >= FRESH_SECONDS
