"""How many workers a trace needs: out of replays of small traces, and of rows made up here."""

import json
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from deploy import objectives
from deploy.cli import app
from deploy.plan import Machines, at_least, cheapest_first, device_of, fewest, lines, plan
from deploy.price_sheet import Document, Hardware, Row, Side, Terms, encode, rows
from deploy.replay_fleet import Device, Fleet, Replay
from deploy.replay_synthetic import synthetic
from deploy.replay_trace import Trace, parse
from shared.pricing import Price, nanos
from tests.deploy.test_price_sheet import point, run

H100 = Machines("h100", "h100", nanos("2.95"), Fraction(1, 2), "cpu", nanos("0.10"))
DEVICE = Device(0.005, 0.001, 0.0005)


def busy(requests: int = 40, every_ms: int = 100, prompt: int = 100, output: int = 20) -> Trace:
    """Requests that share nothing, one after the other."""
    return Trace(parse([json.dumps({"timestamp": every_ms * number, "input_length": prompt, "output_length": output,
                                    "hash_ids": [number]}).encode() for number in range(requests)]), 64)


def measured(step_ms: float, row_ms: float, token_ms: float, at: tuple[int, ...] = (1, 4, 16), name: str = "a",
             workers: int = 1, prompt: int = 200) -> tuple[list[Row], Side]:
    """A sheet's rows as a device of this formula would give them."""
    side = Side(name, "tiny", (Hardware("cpu", 1, nanos("0.096")),), workers=workers, drafters=1)
    points = []
    for count in at:
        tpot = step_ms + row_ms * count / workers
        points.append(point(run(
            requests=2, prompt_tokens=2 * prompt, ttft_ms=(tpot + token_ms * prompt,) * 2, tpot_ms=(tpot,) * 2),
            concurrency=count, side=name))
    return rows(points, [side], Terms(Price(0, 0, nanos("2.00")))), side


# --- the device


@pytest.mark.parametrize("formula", [(6.0, 0.5, 0.2), (2.0, 1.5, 0.0), (4.0, 0.0, 0.1)])
def test_a_device_is_found_again_in_the_rows_that_it_gave(formula: tuple[float, float, float]) -> None:
    fitted = device_of(*measured(*formula))
    assert [1e3 * value for value in fitted.device] == pytest.approx(formula, abs=0.02)
    assert fitted.off < 0.01


def test_streams_are_shared_by_the_workers_of_a_side() -> None:
    fitted = device_of(*measured(6.0, 0.5, 0.2, at=(2, 8, 32), workers=2))
    assert 1e3 * fitted.device.row_s == pytest.approx(0.5, abs=0.02)


def test_rows_of_one_number_of_streams_tell_no_device() -> None:
    with pytest.raises(ValueError, match="less than two numbers of streams"):
        device_of(*measured(6.0, 0.5, 0.2, at=(4,)))


def test_a_line_that_does_not_fit_says_by_how_much() -> None:
    found, side = measured(6.0, 0.5, 0.2)
    off = msgspec.structs.replace(found[1], tpot_ms=msgspec.structs.replace(found[1].tpot_ms, p50=16.0))
    assert device_of([found[0], off, found[2]], side).off > 0.2


# --- the search


@pytest.mark.parametrize("needed", range(1, 40))
@pytest.mark.parametrize("low", [1, 3, 39])
def test_the_fewest_is_found_from_wherever_the_search_begins(needed: int, low: int) -> None:
    asked: list[int] = []

    def enough(workers: int) -> bool:
        asked.append(workers)
        return workers >= needed

    assert fewest(low, 64, enough) == needed
    assert needed in asked and (needed == 1 or needed - 1 in asked)
    assert len(asked) <= 14


def test_nothing_is_said_to_be_enough_when_the_most_is_not() -> None:
    assert fewest(1, 10, lambda workers: workers > 10) is None


def test_the_search_begins_below_what_is_needed() -> None:
    trace = busy(every_ms=10, prompt=400)
    found = plan(trace, H100, DEVICE, objectives.parse("ttft_p99=1s"))
    assert found.workers is not None and 1 <= at_least(trace, DEVICE) <= found.workers


def test_a_plan_meets_its_promises_and_one_worker_less_does_not() -> None:
    trace = busy(every_ms=30, prompt=400)
    found = plan(trace, H100, DEVICE, objectives.parse("ttft_p99=400ms,itl_p99=300ms"))
    assert found.workers is not None and found.workers > 1
    tried = {one.workers: one for one in found.tried}
    assert not tried[found.workers].missed and tried[found.workers - 1].missed
    assert 0 < tried[found.workers].busy < 1


def test_a_plan_costs_its_machines_by_the_hour_drafters_rounded_up() -> None:
    trace = busy(requests=41, every_ms=25, prompt=400)
    price = Price(nanos("1.00"), nanos("0.50"), nanos("2.00"))
    found = plan(trace, H100, DEVICE, objectives.parse("ttft_p99=400ms"), price)
    assert found.workers and found.usd_per_hour is not None
    assert found.drafters == -(-found.workers // 2)
    hour = found.workers * nanos("2.95") + found.drafters * nanos("0.10")
    assert nanos(found.usd_per_hour) == hour and found.usd_per_month == 730 * found.usd_per_hour
    # 41 requests in a second: 16,400 input and 820 output tokens
    assert (found.input_tok_s, found.output_tok_s) == (16400.0, 820.0)
    assert nanos(found.usd_per_million_output or 0) == round(Fraction(hour * 10**6, 820 * 3600))
    assert found.margin == pytest.approx(1 - hour / 1e9 / (3600 * (16400 * 1e-6 + 820 * 2e-6)), abs=1e-4)


def test_what_no_fleet_keeps_is_said_with_what_it_missed() -> None:
    found = plan(busy(), H100, DEVICE, objectives.parse("itl_p99=1ms"), most_workers=4)
    assert found.workers is None and found.usd_per_hour is None and found.tried[-1].workers == 4
    said = "\n".join(lines([found], objectives.parse("itl_p99=1ms")))
    assert "h100: not with 4 h100: itl_p99=1ms: " in said


def test_the_cheapest_plan_comes_first_and_the_impossible_last() -> None:
    slow = Machines("slow", "cpu", nanos("0.01"), Fraction(0))
    promised = objectives.parse("ttft_p99=400ms")
    found = [plan(busy(), H100, Device(1.0, 0.0, 0.0), promised, most_workers=2), plan(busy(), H100, DEVICE, promised),
             plan(busy(), slow, DEVICE, promised)]
    assert [one.worker_sku for one in cheapest_first(found)] == ["cpu", "h100", "h100"]
    assert cheapest_first(found)[-1].workers is None


# --- what a replay says of times between tokens


def test_gaps_of_a_stream_alone_are_its_steps() -> None:
    outcome = Replay(busy(requests=1, output=20), Fleet(1, 64, DEVICE), "cost").run()
    assert dict(outcome.gaps_us) == {6000: 19}
    (served,) = outcome.served
    assert served.output_tokens == 20
    assert served.e2e_s - served.ttft_s == pytest.approx(19 * 0.006)


def test_there_is_a_gap_for_every_token_behind_a_first_one() -> None:
    trace = Trace(synthetic("chat", 200), 64)
    outcome = Replay(trace, Fleet(2, 4096, Device()), "cost").run()
    assert sum(outcome.gaps_us.values()) == sum(one.output_tokens - 1 for one in outcome.served)
    spent_s = sum(one.e2e_s - one.ttft_s for one in outcome.served)
    assert sum(gap * count for gap, count in outcome.gaps_us.items()) / 1e6 == pytest.approx(spent_s, rel=0.02)


# --- the command


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100", "TERM": "dumb"})


def test_help_names_every_option_of_plan() -> None:
    shown = _run("--help").output
    options = ("trace", "synthetic", "slo", "sheet", "sku", "step-ms", "drafters", "drafter-sku", "most-workers",
               "prices", "json")
    assert [option for option in options if f"--{option} " not in shown] == []


@pytest.mark.parametrize(("said", "arguments"), [
    ("name a --trace", ()), ("unknown kind of traffic 'cats'", ("--synthetic", "cats")),
    ("--speed 0 is no speed", ("--synthetic", "chat", "--speed", "0")),
    ("no machine 'tpu'", ("--synthetic", "chat", "--sku", "tpu")),
    ("--drafters 'few' is no number", ("--synthetic", "chat", "--drafters", "few")),
    ("'soon' is no objective", ("--synthetic", "chat", "--slo", "soon"))])
def test_what_cannot_be_planned_is_said_in_one_sentence(said: str, arguments: tuple[str, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_trace_is_planned_with_the_rates_of_every_side_of_a_sheet(tmp_path: Path) -> None:
    sheet, trace = tmp_path / "sheet.json", tmp_path / "trace.jsonl"
    slow, slow_side = measured(12.0, 1.0, 0.2, name="without drafts")
    fast, fast_side = measured(6.0, 0.5, 0.2, name="with drafts")
    sheet.write_bytes(encode(Document("2026-11-27", "abc", {}, "c", [], [slow_side, fast_side],
                                      Terms(Price(0, 0, 0)), [], slow + fast, [])))
    trace.write_text("\n".join(json.dumps({"timestamp": 100 * number, "input_length": 100, "output_length": 20,
                                           "hash_ids": [number]}) for number in range(30)))
    result = _run("--trace", str(trace), "--sheet", str(sheet), "--slo", "itl_p99=60ms,ttft_p99=1s", "--json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)["plans"]
    assert {one["name"] for one in plans} == {"with drafts (2026-11-27)", "without drafts (2026-11-27)"}
    assert all(one["workers"] >= 1 and one["drafters"] == one["workers"] for one in plans)
    assert all(float(one["usd_per_hour"]) == pytest.approx(0.096 * one["workers"]) for one in plans)
    told = _run("--trace", str(trace), "--sku", "h200", "--drafters", "0.5", "--drafter-sku", "cpu")
    assert told.exit_code == 0 and "h200: 1 worker of h200, 1 drafter of cpu: $3.596 an hour" in told.stdout
