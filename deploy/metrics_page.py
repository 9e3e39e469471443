"""Every figure that a service exports, as the table in docs/metrics.md: `python -m deploy.metrics_page`.

Read from the registries themselves, so that the page cannot say what is not there; a test holds it against them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

import drafter.metrics
import gateway.metrics
import router.metrics
import worker.metrics
from shared.bus_metrics import BusMetrics
from shared.messages import WorkerStatus

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


class Figure(NamedTuple):
    """One metric. `name` as Prometheus asks for it: of a counter with `_total`, of a histogram without `_bucket`."""

    service: str
    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class _NoBus:
    reconnects = refused = healed = client_errors = handler_errors = 0
    connected = False


def figures() -> list[Figure]:
    """All of them, services in the order of a request."""
    fleet = gateway.metrics.Metrics(lambda: [WorkerStatus("w", 1, "m", "ready", zone="local")])
    registries = {
        "gateway": fleet.registry,
        "router": router.metrics.Metrics().registry,
        "worker": worker.metrics.Metrics(lambda: defaultdict(float)).registry,
        "drafter": drafter.metrics.Metrics().registry,
        "every process": BusMetrics(_NoBus()).registry,
    }
    return [figure for service, registry in registries.items() for figure in _of(service, registry)]


def table(rows: Iterable[Figure]) -> list[str]:
    """Lines of Markdown, a heading and a table for each service."""
    lines: list[str] = []
    service = ""
    for row in rows:
        if row.service != service:
            service = row.service
            lines += ["", f"### {service}", "", "| name | kind | labels | what |", "|---|---|---|---|"]
        lines.append(f"| `{row.name}` | {row.kind} | {', '.join(row.labels)} | {row.text} |")
    return lines[1:]


def written(page: str) -> str:
    """`page` with its table as it must be."""
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN, *table(figures()), END + rest.partition(END)[2]])


def _of(service: str, registry: CollectorRegistry) -> Iterator[Figure]:
    collectors: Iterable[Collector] = registry._collector_to_names
    for collector in collectors:
        declared = getattr(collector, "_labelnames", None)
        for metric in collector.collect():
            found = {label for sample in metric.samples for label in sample.labels} - {"le"}
            labels = tuple(declared) if declared is not None else tuple(sorted(found))
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            yield Figure(service, name, metric.type, labels, metric.documentation)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
