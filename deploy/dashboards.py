"""The Grafana dashboards as code: `python -m deploy.dashboards` writes deploy/grafana/dashboards/*.json.

Rules: a panel asks for rates, never for sums since the start; quantiles come from buckets summed by `le`; panels stand
in the order in which a request meets the services. The structs are Grafana's dashboard model as far as we use it
(schema version 39, Grafana 10 and newer); tests run every query against a real Prometheus.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, field

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}  # as provisioned
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
SLO_FIRST_TOKEN_S = "1.0"  # a bucket of gen_ai_server_time_to_first_token_seconds
SLO = 0.99  # of requests, both for being answered and for the first token in time

# histograms whose observations name their traces
TRACED = ("gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds",
          "gen_ai_server_time_per_output_token_seconds", "mill_time_to_first_token_seconds",
          "mill_time_per_output_token_seconds", "mill_router_estimate_seconds", "mill_worker_queue_seconds",
          "mill_worker_prefill_seconds", "mill_worker_time_per_output_token_seconds")


class GridPos(Struct, forbid_unknown_fields=True):
    x: int
    y: int
    w: int
    h: int


class Target(Struct, forbid_unknown_fields=True, rename="camel"):
    """One query of a panel."""

    ref_id: str
    expr: str
    legend_format: str
    datasource: dict[str, str] = field(default_factory=lambda: dict(SOURCE))
    exemplar: bool = False


class Defaults(Struct, forbid_unknown_fields=True):
    unit: str
    min: float | None = None
    max: float | None = None


class FieldConfig(Struct, forbid_unknown_fields=True):
    defaults: Defaults
    overrides: list[dict[str, Any]] = field(default_factory=list)


class Panel(Struct, forbid_unknown_fields=True, rename="camel"):
    id: int
    title: str
    description: str
    type: str
    grid_pos: GridPos
    field_config: FieldConfig
    targets: list[Target]
    datasource: dict[str, str] = field(default_factory=lambda: dict(SOURCE))
    options: dict[str, Any] = field(default_factory=dict)


class Link(Struct, forbid_unknown_fields=True, rename="camel"):
    title: str
    type: str
    url: str = ""
    tags: list[str] = field(default_factory=list)
    icon: str = "external link"
    as_dropdown: bool = False
    target_blank: bool = False
    keep_time: bool = True


class Span(Struct, forbid_unknown_fields=True, rename={"since": "from"}):
    since: str
    to: str


class Dashboard(Struct, forbid_unknown_fields=True, rename="camel"):
    uid: str
    title: str
    description: str
    tags: list[str]
    panels: list[Panel]
    links: list[Link]
    time: Span
    refresh: str = "10s"
    schema_version: int = 39
    timezone: str = "browser"
    editable: bool = True
    version: int = 1


class Ask(NamedTuple):
    """A panel before it has a place: its queries by the legend they get."""

    title: str
    text: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"


def dashboards() -> list[Dashboard]:
    """All of them."""
    return [
        _placed("tokenmill-fleet", "Fleet", "What users feel, then what services do, as a request meets them.", FLEET),
        _placed("tokenmill-request", "One request", "Where its time goes: wait, prefill, decode.", REQUEST),
        _placed("tokenmill-drafters", "Drafters", "What drafts bring and cost.", DRAFTERS),
        _placed("tokenmill-slo", "SLO burn", "Error budgets, and how fast they burn.", BURN),
        _placed("tokenmill-economics", "Economics", "What tokens cost.", ECONOMICS),
    ]


def encoded(dashboard: Dashboard) -> bytes:
    """As it lies in the file."""
    return msgspec.json.format(msgspec.json.encode(dashboard), indent=1) + b"\n"


def _rate(counter: str, by: str = "", match: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({counter}{match}[$__rate_interval]))"


def _share(part: str, whole: str) -> str:
    """A ratio of two rates that is 0, and not nothing, while there is no traffic."""
    return f"{_rate(part)} / clamp_min({_rate(whole)}, 1e-9)"


def _quantiles(histogram: str, *quantiles: float) -> dict[str, str]:
    return {f"p{q * 100:g}": f"histogram_quantile({q}, {_rate(f'{histogram}_bucket', 'le')})" for q in quantiles}


def _mean(histogram: str, by: str = "") -> str:
    return f"{_rate(f'{histogram}_sum', by)} / clamp_min({_rate(f'{histogram}_count', by)}, 1e-9)"


def _bad(window: str) -> str:
    """The share of requests that ended with an error of ours, over `window`."""
    failed = f'sum(rate(gen_ai_server_request_duration_seconds_count{{error_type=~"{OURS}"}}[{window}]))'
    all_of_them = f"sum(rate(gen_ai_server_request_duration_seconds_count[{window}]))"
    return f"({failed} or vector(0)) / clamp_min({all_of_them}, 1e-9)"


def _slow(window: str) -> str:
    """The share of streams whose first token came later than promised, over `window`."""
    name = "gen_ai_server_time_to_first_token_seconds"
    in_time = f'sum(rate({name}_bucket{{le="{SLO_FIRST_TOKEN_S}"}}[{window}]))'
    return f"1 - {in_time} / clamp_min(sum(rate({name}_count[{window}])), 1e-9)"


# codes of shared/errors.py that are no fault of the client
OURS = "internal_error|no_eligible_worker|overloaded|mesh_unavailable|deadline_exceeded|worker_failed"

FLEET = [
    Ask("Requests", "HTTP requests by status.", "reqps",
        {"{{status}}": _rate("mill_gateway_requests_total", "status", '{route=~"/v1/.*"}')}),
    Ask("Time to first token", "TTFT as clients see it.", "s",
        _quantiles("mill_time_to_first_token_seconds", .5, .95, .99)),
    Ask("Latency between tokens", "ITL: between messages with tokens of one stream.", "s",
        _quantiles("mill_inter_token_latency_seconds", .5, .95, .99)),
    Ask("Time per output token", "TPOT: mean of a stream behind its first token.", "s",
        _quantiles("mill_time_per_output_token_seconds", .5, .99)),
    Ask("Whole requests", "End to end.", "s", _quantiles("gen_ai_server_request_duration_seconds", .5, .99)),
    Ask("Active streams", "Under way at gateways.", "none", {"{{instance}}": "mill_gateway_active_streams"}),
    Ask("Refusals", "Answered with an error at once, by code. overloaded: the mesh is full.", "reqps",
        {"{{code}}": _rate("mill_gateway_refused_total", "code")}),
    Ask("Turned away by routers", "Why a full mesh had no place.", "reqps",
        {"{{reason}}": _rate("mill_router_turned_away_total", "reason")}),
    Ask("Held by routers", "Requests that wait for room, by tier.", "none",
        {"{{tier}}": "sum by (tier) (mill_router_held_requests)"}),
    Ask("Running and waiting", "Streams at workers.", "none",
        {"running": "sum(mill_worker_running)", "waiting": "sum(mill_worker_waiting)"}),
    Ask("KV cache use", "Blocks held by streams.", "percentunit",
        {"{{instance}}": "mill_worker_blocks_held / mill_worker_blocks"}),
    Ask("Cache hit rate", "Prompt tokens that were cached.", "percentunit",
        {"hit rate": _share("mill_gateway_cached_tokens_total", "mill_gateway_prompt_tokens_total")}),
    Ask("Preemptions", "Sequences that gave their blocks back to older ones.", "ops",
        {"{{instance}}": _rate("mill_worker_preemptions_total", "instance")}),
    Ask("Tokens", "Prompt tokens taken in, tokens delivered.", "none",
        {"prompt": _rate("mill_gateway_prompt_tokens_total"),
         "delivered": _rate("mill_gateway_completion_tokens_total")}),
    Ask("Tokens by tenant", "Delivered.", "none",
        {"{{tenant}}": _rate("mill_gateway_tenant_tokens_total", "tenant", '{kind="completion"}')}),
    Ask("Bus round trip", "From a service to NATS and back.", "s", _quantiles("mill_bus_round_trip_seconds", .5, .99)),
    Ask("Loop lag", "How late event loops woke; from 50 ms on streams stutter.", "s",
        _quantiles("mill_loop_lag_seconds", .5, .99)),
    Ask("Memory", "Of each process.", "bytes", {"{{instance}}": "process_resident_memory_bytes"}),
]
REQUEST = [
    Ask("1 Deciding", "A router's time to place a request.", "s", _quantiles("mill_router_decision_seconds", .5, .99)),
    Ask("2 Waiting for room", "Mean time that placed requests had waited at a router, by tier.", "s",
        {"{{tier}}": _mean("mill_router_held_seconds", "tier")}),
    Ask("3 Expected first token", "What routers expected when they placed.", "s",
        _quantiles("mill_router_estimate_seconds", .5, .99)),
    Ask("4 Waiting at the worker", "From arrival to admission.", "s", _quantiles("mill_worker_queue_seconds", .5, .99)),
    Ask("5 Prefill", "From admission to the first token.", "s", _quantiles("mill_worker_prefill_seconds", .5, .99)),
    Ask("6 Decode", "Per token at the worker.", "s", _quantiles("mill_worker_time_per_output_token_seconds", .5, .99)),
    Ask("Time to first token, taken apart", "Means. What the parts leave over are gateway and bus.", "s",
        {"at the gateway": _mean("mill_time_to_first_token_seconds"),
         "worker queue": _mean("mill_worker_queue_seconds"),
         "worker prefill": _mean("mill_worker_prefill_seconds")}),
    Ask("Cache: expected and found", "Cached tokens that routers said, and that were there.", "none",
        {"expected": _rate("mill_gateway_predicted_cached_tokens_total"),
         "found": _rate("mill_gateway_found_cached_tokens_total")}),
    Ask("Why not cached", "Placements by class of miss; `tokenmill explain ID` says it of one.", "ops",
        {"{{miss}}": _rate("mill_gateway_placements_total", "miss")}),
    Ask("Sent again", "Attempts after the first, all causes.", "ops",
        {"resubmissions": f"{_rate('mill_gateway_resubmissions_total')} or vector(0)"}),
    Ask("Ended with", "Requests by error; empty: none.", "reqps",
        {"{{error_type}}": _rate("gen_ai_server_request_duration_seconds_count", "error_type")}),
    Ask("Lost messages", "Gaps in the numbering of replies, and what could not leave.", "ops",
        {"gateways": _rate("mill_gateway_lost_messages_total"), "workers": _rate("mill_worker_lost_messages_total")}),
]
DRAFTERS = [
    Ask("Acceptance", "Drafted tokens that agreed.", "percentunit",
        {"accepted": _share("mill_worker_accepted_draft_tokens_total", "mill_worker_draft_tokens_total")}),
    Ask("Tokens per verification", "What a stream gains in a step with drafts, its own token counted.", "none",
        {"tokens": f"1 + {_share('mill_worker_accepted_draft_tokens_total', 'mill_worker_verified_drafts_total')}"}),
    Ask("Drafts there in time", "Of the times that a stream could take drafts.", "percentunit",
        {"ready": _share("mill_worker_drafts_ready_total", "mill_worker_drafts_wanted_total"),
         "foreseen": _share("mill_worker_drafts_foreseen_total", "mill_worker_drafts_wanted_total")}),
    Ask("Verified and accepted", "Tokens a second.", "none",
        {"verified": _rate("mill_worker_draft_tokens_total"),
         "accepted": _rate("mill_worker_accepted_draft_tokens_total"),
         "too late": _rate("mill_worker_late_draft_tokens_total")}),
    Ask("Stream time saved", "Verification and waits taken off; below 0 when drafts lost.", "none",
        {"{{instance}}": "rate(mill_worker_draft_saved_seconds[$__rate_interval])"}),
    Ask("Speed with drafts over without", "As workers measured last; 0 while unknown.", "none",
        {"{{instance}}": "mill_worker_drafter_gain"}),
    Ask("Waiting for drafts", "Time a second that steps were held back.", "s",
        {"{{instance}}": _rate("mill_worker_draft_hold_seconds_total", "instance")}),
    Ask("Latency of drafts", "From telling the drafter to its drafts.", "s",
        {"{{instance}}": "mill_worker_draft_latency_seconds"}),
    Ask("Busy", "Share of a drafter's time.", "percentunit", {"{{instance}}": "mill_drafter_busy"}),
    Ask("Followed", "Streams that drafters follow.", "none", {"{{instance}}": "mill_drafter_following"}),
    Ask("Drafters' own count of right tokens", "Guessed tokens that met the real one.", "percentunit",
        {"right": _share("mill_drafter_right_tokens_total", "mill_drafter_judged_tokens_total")}),
    Ask("Left alone", "Workers whose drafter does not pay.", "none",
        {"left alone": "sum(mill_worker_drafter_left_alone)"}),
]
BURN = [
    Ask("Answered, 1 h", f"Promise: {SLO:.0%} of requests without an error of ours.", "percentunit",
        {"answered": f"1 - {_bad('1h')}"}, "stat"),
    Ask("First token in time, 1 h", f"Promise: {SLO:.0%} within {SLO_FIRST_TOKEN_S} s.", "percentunit",
        {"in time": f"1 - ({_slow('1h')})"}, "stat"),
    Ask("Error budget left, 3 d", "1: untouched; 0: used up.", "percentunit",
        {"answered": f"1 - ({_bad('3d')}) / {1 - SLO:.2f}",
         "first token": f"1 - ({_slow('3d')}) / {1 - SLO:.2f}"}, "stat"),
    Ask("Burn: errors", "1: the budget lasts exactly as long as its period. Pages above 14.4 over 5 m and 1 h.", "none",
        {window: f"({_bad(window)}) / {1 - SLO:.2f}" for window in ("5m", "1h", "6h")}),
    Ask("Burn: first token", "The same for the first token.", "none",
        {window: f"({_slow(window)}) / {1 - SLO:.2f}" for window in ("5m", "1h", "6h")}),
    Ask("Errors of ours", "By code.", "reqps",
        {"all": f'sum(rate(gen_ai_server_request_duration_seconds_count{{error_type=~"{OURS}"}}[$__rate_interval]))'
                " or vector(0)"}),
]
ECONOMICS = [
    Ask("Price of the fleet", "What workers say they cost an hour.", "currencyUSD",
        {"{{sku}}": "sum by (sku) (max by (worker, sku) (mill_fleet_price_usd_per_hour))"}),
    Ask("Price of a million tokens", "Price of the fleet over tokens delivered, right now: idle workers make it dear.",
        "currencyUSD", {"delivered": "sum(max by (worker) (mill_fleet_price_usd_per_hour)) / clamp_min(3600 * "
                        f"{_rate('mill_gateway_completion_tokens_total')}, 1e-9) * 1e6"}),
    Ask("Tokens per dollar", "Delivered.", "none",
        {"tokens": f"3600 * {_rate('mill_gateway_completion_tokens_total')} / "
                   "clamp_min(sum(max by (worker) (mill_fleet_price_usd_per_hour)), 1e-9)"}),
    Ask("Drafters' cost", "Of the time they worked on finished streams, an hour.", "currencyUSD",
        {"drafters": f"3600 * {_rate('mill_gateway_drafter_usd_total')}"}),
    Ask("Prompt tokens not computed", "Cached ones, by tenant.", "none",
        {"{{tenant}}": _rate("mill_gateway_tenant_tokens_total", "tenant", '{kind="cached"}')}),
    Ask("Use of workers", "Streams over the tokens they bring: tokens a second for each worker.", "none",
        {"{{worker}}": "max by (worker) (mill_fleet_decode_tokens_per_second)"}),
]


def _placed(uid: str, title: str, text: str, asks: Sequence[Ask]) -> Dashboard:
    """Panels from left to right, row by row."""
    panels = [_panel(number, ask) for number, ask in enumerate(asks)]
    links = [Link("tokenmill", "dashboards", tags=["tokenmill"], as_dropdown=True)]
    return Dashboard(uid, f"tokenmill: {title}", text, ["tokenmill"], panels, links, Span("now-30m", "now"))


def _panel(number: int, ask: Ask) -> Panel:
    row, column = divmod(number, COLUMNS)
    targets = [Target(chr(ord("A") + i), expr, legend) for i, (legend, expr) in enumerate(ask.queries.items())]
    # one quantile of a panel shows the traces behind all
    targets[-1].exemplar = any(f"{name}_bucket" in targets[-1].expr for name in TRACED)
    limits = Defaults(ask.unit, min=0.0, max=1.0) if ask.unit == "percentunit" else Defaults(ask.unit)
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                               "tooltip": {"mode": "multi", "sort": "desc"}}
    if ask.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area"}
    return Panel(number + 1, ask.title, ask.text, ask.kind, GridPos(column * WIDTH, row * HEIGHT, WIDTH, HEIGHT),
                 FieldConfig(limits), targets, options=options)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for dashboard in dashboards():
        (FOLDER / f"{dashboard.uid}.json").write_bytes(encoded(dashboard))


if __name__ == "__main__":
    main()
