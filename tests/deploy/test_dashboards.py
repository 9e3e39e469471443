"""Every panel of every dashboard draws something: its query is put to a real Prometheus that reads a real mesh."""

import asyncio
import math
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
import yaml

from deploy import broker
from deploy.dashboards import COLUMNS, FOLDER, SOURCE, TRACED, WIDTH, Dashboard, dashboards, encoded
from deploy.local_mesh import LocalMesh, Options
from deploy.metrics_page import figures
from gateway.model_files import load_card
from shared.errors import CODES
from tests.mesh.streams import chat, read
from tests.models import default_folder
from tests.otlp_receiver import OtlpReceiver

GRAFANA = FOLDER.parent
LOAD_S = 12.0
UNITS = {"reqps", "s", "none", "percentunit", "ops", "bytes", "currencyUSD"}  # ids that Grafana knows
MISSING = "no prometheus here: install the Debian package `prometheus` (apt-get install prometheus)"


def _file(dashboard: Dashboard) -> Path:
    return FOLDER / f"{dashboard.uid}.json"


def queries() -> Iterator[tuple[str, str]]:
    for dashboard in dashboards():
        for panel in dashboard.panels:
            for target in panel.targets:
                yield f"{dashboard.uid}: {panel.title}: {target.legend_format}", target.expr


def alerts() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((GRAFANA / "alerts.yml").read_text())
    return found


# --- what lies in the files ------------------------------------------------------------------------------------------


def test_the_files_are_what_the_code_writes() -> None:
    wanted = {_file(dashboard): encoded(dashboard) for dashboard in dashboards()}
    assert {path: path.read_bytes() for path in FOLDER.glob("*.json")} == wanted, "run `python -m deploy.dashboards`"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_dashboard_has_what_grafana_needs_and_nothing_it_does_not_know(path: Path) -> None:
    found = msgspec.json.decode(path.read_bytes(), type=Dashboard)  # refuses unknown fields
    assert found.uid == path.stem and len(found.uid) <= 40 and found.schema_version >= 39
    assert len({panel.id for panel in found.panels}) == len(found.panels)
    taken: set[tuple[int, int]] = set()
    for panel in found.panels:
        assert panel.type in ("timeseries", "stat") and panel.field_config.defaults.unit in UNITS
        assert panel.description.endswith(".") and panel.datasource == SOURCE
        place = panel.grid_pos
        assert 0 <= place.x and place.x + place.w <= COLUMNS * WIDTH == 24
        cells = {(x, y) for x in range(place.x, place.x + place.w) for y in range(place.y, place.y + place.h)}
        assert not cells & taken, f"{panel.title} covers another panel"
        taken |= cells
        assert len({target.ref_id for target in panel.targets}) == len(panel.targets) > 0
        assert all(target.datasource == SOURCE for target in panel.targets)


def test_the_data_source_that_the_dashboards_name_is_provisioned() -> None:
    [folder] = (GRAFANA / "provisioning" / "datasources").glob("*.yaml")
    sources = yaml.safe_load(folder.read_text())["datasources"]
    assert {"type": SOURCE["type"], "uid": SOURCE["uid"]} in [{"type": s["type"], "uid": s["uid"]} for s in sources]
    [provider] = (GRAFANA / "provisioning" / "dashboards").glob("*.yaml")
    assert yaml.safe_load(provider.read_text())["providers"][0]["type"] == "file"


def test_queries_and_alerts_ask_only_for_figures_that_there_are() -> None:
    names = {figure.name for figure in figures()}
    names |= {name + ending for name in names for ending in ("_bucket", "_sum", "_count")}
    rules = [rule for group in alerts()["groups"] for rule in group["rules"]]
    asked = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]
    for what, expr in [*queries(), *asked]:
        for name in re.findall(r"\b(?:mill|gen_ai|vllm)_\w+\b(?!:)", expr):
            if not name.startswith("gen_ai_request"):  # a label
                assert name in names, f"{what} asks for {name}"


def test_errors_that_burn_the_budget_are_codes_that_exist() -> None:
    text = (GRAFANA / "alerts.yml").read_text() + "".join(expr for _, expr in queries())
    for codes in set(re.findall(r'error_type=~"([^"]+)"', text)):
        assert set(codes.split("|")) <= set(CODES)


def test_the_promise_for_first_tokens_is_a_bucket() -> None:
    from shared.trace_names import TIME_TO_FIRST_TOKEN_BUCKETS

    for bound in re.findall(r'le="([^"]+)"', "".join(expr for _, expr in queries())):
        assert float(bound) in TIME_TO_FIRST_TOKEN_BUCKETS


def test_every_alert_has_a_severity_and_a_paragraph_in_the_runbook() -> None:
    page = (FOLDER.parents[2] / "docs" / "operations.md").read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
                for line in page.splitlines() if line.startswith("#")}
    for group in alerts()["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
                name, _, anchor = rule["annotations"]["runbook_url"].partition("#")
                assert name == "docs/operations.md" and anchor in headings, rule["alert"]


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(MISSING)
    rules = Path(__file__).with_name("alerts_test.yml")
    done = subprocess.run([promtool, "test", "rules", str(rules)], capture_output=True, text=True, cwd=rules.parent)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what Prometheus says --------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """A Prometheus that has read a mesh under a little load."""

    url: str
    collector: OtlpReceiver

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The samples now. Raises AssertionError with what Prometheus has against the query."""
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10, trust_env=False)
        assert response.status_code == 200, response.text
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return result


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reading(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Reading]:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("prometheus")
    figures_at = broker.free_port()
    collector = OtlpReceiver()
    collector.start()
    options = Options(model=default_folder(), data=folder / "mesh", port=broker.free_port(), engine="mock",
                      drain_s=1.0, metrics_port=figures_at, otlp=collector.endpoint,
                      settings={"worker": {"price_usd_per_hour": 2.0, "sku": "test"}})
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(GRAFANA / "alerts.yml")]
    ports = {"gateway": options.port, "router": figures_at, "drafter": figures_at + 1, "worker": figures_at + 2}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = broker.free_port()
    async with LocalMesh(options) as mesh:
        await mesh.until_ready()
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            await _load(mesh)
            yield Reading(f"http://127.0.0.1:{port}", collector)
        finally:
            process.terminate()
            process.wait(20)
            collector.stop()


async def _load(mesh: LocalMesh) -> None:
    """A few streams that share a beginning, for `LOAD_S`."""
    name = load_card(mesh.options.model).name
    until = time.monotonic() + LOAD_S
    prefix = " ".join(f"{i} is a number." for i in range(60))
    number = 0
    while time.monotonic() < until:
        number += 1
        await asyncio.gather(*(read(mesh.url, chat(name, f"{prefix} And {number}?", max_tokens=30)) for _ in range(2)))
        await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_every_panel_and_every_rule_gets_data_from_a_mesh_under_load(reading: Reading) -> None:
    empty = []
    for what, expr in queries():
        samples = reading.ask(expr.replace("$__rate_interval", "10s"))
        numbers = [float(sample["value"][1]) for sample in samples]
        if not any(math.isfinite(number) for number in numbers):
            empty.append(f"{what}: {expr}: {numbers}")
    assert not empty, "\n".join(empty)
    response = httpx.get(f"{reading.url}/api/v1/rules", timeout=10, trust_env=False).json()
    rules = [rule for group in response["data"]["groups"] for rule in group["rules"]]
    assert len(rules) == 19 and {rule["health"] for rule in rules} == {"ok"}, rules
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert {sample["value"][1] for sample in reading.ask("up")} == {"1"} and len(reading.ask("up")) == 4
    # the load went where the panels say it did
    assert float(reading.ask("sum(mill_gateway_completion_tokens_total)")[0]["value"][1]) > 100
    assert 0 < float(reading.ask("histogram_quantile(0.5, sum by (le) (rate(mill_inter_token_latency_seconds_bucket"
                                 "[10s])))")[0]["value"][1]) < 1


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_every_traced_histogram_leads_to_a_trace_that_was_sent(reading: Reading) -> None:
    received = {span.trace_id for span in reading.collector.spans}
    for name in TRACED:
        response = httpx.get(f"{reading.url}/api/v1/query_exemplars", timeout=10, trust_env=False, params={
            "query": f"{name}_bucket", "start": time.time() - 120, "end": time.time()})
        found = [exemplar["labels"]["trace_id"] for series in response.json()["data"] for exemplar in
                 series["exemplars"]]
        assert found, f"no exemplar of {name}"
        assert set(found) & received, f"{name} names traces that nobody sent: {found}"
