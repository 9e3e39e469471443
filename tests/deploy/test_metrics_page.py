"""The page of figures says what there is, and what there is has the names and bounds that it promises."""

from deploy.metrics_page import PAGE, figures, written


def test_the_page_has_every_figure_and_no_other() -> None:
    assert PAGE.read_text() == written(PAGE.read_text()), "run `python -m deploy.metrics_page`"


def test_what_operators_ask_for_is_there() -> None:
    names = {figure.name for figure in figures()}
    assert names >= {
        "gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds",
        "gen_ai_server_request_duration_seconds", "mill_inter_token_latency_seconds", "mill_worker_queue_seconds",
        "mill_worker_running", "mill_worker_waiting", "mill_worker_blocks_held", "mill_worker_blocks",
        "mill_gateway_prompt_tokens_total", "mill_gateway_cached_tokens_total", "mill_worker_draft_tokens_total",
        "mill_worker_accepted_draft_tokens_total", "mill_worker_preemptions_total", "mill_gateway_tenant_tokens_total",
        "mill_gateway_refused_total", "mill_router_turned_away_total", "mill_bus_round_trip_seconds",
        "mill_loop_lag_seconds"}


def test_each_figure_says_what_it_is_and_no_two_of_a_process_share_a_name() -> None:
    found = figures()
    for figure in found:
        assert figure.text.endswith("."), figure
        assert figure.name.startswith(("mill_", "gen_ai_server_", "vllm:")), figure
    for service in {figure.service for figure in found}:
        names = [figure.name for figure in found if figure.service in (service, "every process")]
        assert len(names) == len(set(names))


def test_histograms_say_their_unit() -> None:
    assert all(figure.name.endswith("_seconds") for figure in figures() if figure.kind == "histogram")


def test_no_label_can_hold_what_a_client_makes_up() -> None:
    known = {"route", "status", "code", "cause", "miss", "model_name", "position", "gen_ai_operation_name",
             "gen_ai_request_model", "error_type", "worker", "model", "zone", "sku", "reason", "tier", "kind", "why",
             "tenant"}
    assert {label for figure in figures() for label in figure.labels} <= known
