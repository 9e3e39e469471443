"""A price sheet says what was measured, prices it exactly, and hides nothing: out of figures made up here."""

import asyncio
import itertools
import json
import xml.etree.ElementTree as ElementTree
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from deploy import objectives, price_curve, price_load, price_page
from deploy import price_sheet as sheets
from deploy.bench.load import Endpoint, Load, endpoint
from deploy.cli import app
from deploy.energy import Meter
from deploy.objectives import Objective
from deploy.price_load import Workload, requests_of, run_of, workloads
from deploy.price_sheet import Hardware, Point, Row, Run, Side, Terms, decode, encode, rows
from shared.pricing import Price, nanos

US = 10**6
TWO_DOLLARS = Terms(Price(0, 0, nanos("2.00")))


def run(**more: Any) -> Run:
    """One second with 100 output and 400 input tokens of two requests."""
    fields: dict[str, Any] = dict(
        wall_us=US, requests=2, failures=0, wrong_lengths=0, prompt_tokens=400, cached_tokens=0, output_tokens=100,
        draft_tokens=0, accepted_draft_tokens=0, chunks=100, ttft_ms=(50.0, 60.0), tpot_ms=(10.0, 20.0),
        e2e_ms=(500.0, 1000.0), itl_tenths={100: 90, 200: 8})
    return Run(**(fields | more))


def point(*runs: Run, concurrency: int = 2, side: str = "a", workload: str = "questions", fixed: bool = False) -> Point:
    return Point(side, workload, fixed, concurrency, runs or (run(),))


def side(name: str = "a", hour: str = "0.096", **more: Any) -> Side:
    return Side(name, "tiny", (Hardware("cpu", 1, nanos(hour), "somebody"),), **more)


def one(*runs: Run, hour: str = "0.096", terms: Terms = TWO_DOLLARS, promised: str = "") -> Row:
    (found,) = rows([point(*runs)], [side(hour=hour)], terms, objectives.parse(promised))
    return found


def document(*found: Row, sides: list[Side] | None = None, points: list[Point] | None = None) -> sheets.Document:
    return sheets.Document("2026-11-27", "abc", {"processor": "slow", "cores": 2}, "tokenmill price-sheet", ["shared"],
                           sides or [side()], TWO_DOLLARS, [], list(found), points or [])


# --- money


def test_two_dollars_a_million_at_1200_tokens_a_second_and_35_percent_leave_5_616_an_hour_and_1500_make_it_48() -> None:
    def at(rate: int) -> Row:
        return one(run(prompt_tokens=0, output_tokens=30 * rate, wall_us=30 * US), hour="5.616")

    slow, fast = at(1200), at(1500)
    assert slow.hour_usd_for_margin == slow.usd_per_hour == Decimal("5.616")
    assert (slow.margin, fast.margin) == (0.35, 0.48)
    assert (slow.usd_per_million_output, fast.usd_per_million_output) == (Decimal("1.3"), Decimal("1.04"))
    assert (slow.revenue_usd_per_hour, fast.revenue_usd_per_hour) == (Decimal("8.64"), Decimal("10.8"))
    assert (slow.break_even_share, fast.break_even_share) == (0.65, 0.52)
    page = price_page.markdown(document(slow, fast))
    assert "5.616" in page and "35.0 %" in page and "48.0 %" in page


def test_an_hour_is_spread_over_input_over_output_and_over_both() -> None:
    found = one(run(), hour="3.60")
    # $0.001 a second: 400 input, 100 output tokens
    assert found.usd_per_million_input == Decimal("2.5")
    assert found.usd_per_million_output == Decimal("10")
    assert found.usd_per_million_total == Decimal("2")
    assert (found.input_tok_s, found.output_tok_s, found.total_tok_s) == (400.0, 100.0, 500.0)
    assert found.output_tok_s_per_usd == round(100 / 3.6, 3)


def test_half_an_hour_of_load_costs_twice_as_much_a_token_and_earns_half() -> None:
    whole, half = (one(hour="3.60", terms=msgspec.structs.replace(TWO_DOLLARS, utilisation=Decimal(share)))
                   for share in ("1", "0.5"))
    assert whole.usd_per_million_output is not None
    assert half.usd_per_million_output == 2 * whole.usd_per_million_output
    assert 2 * half.revenue_usd_per_hour == whole.revenue_usd_per_hour
    assert half.break_even_share == whole.break_even_share
    assert half.utilisation == Decimal("0.5")


def test_a_cached_token_earns_its_own_price() -> None:
    terms = Terms(Price(nanos("1.00"), nanos("0.25"), 0))
    whole, cached = one(run(), terms=terms), one(run(cached_tokens=400), terms=terms)
    assert 4 * cached.revenue_usd_per_hour == whole.revenue_usd_per_hour
    assert cached.cached_share == 1.0


def test_every_machine_is_paid_for_the_drafters_too() -> None:
    both = Side("a", "tiny", (Hardware("h100", 2, nanos("2.95")), Hardware("cpu", 1, nanos("0.096"))))
    assert rows([point()], [both], TWO_DOLLARS)[0].usd_per_hour == Decimal("5.996")


def test_what_earns_nothing_has_no_margin_and_no_share_to_break_even_at() -> None:
    found = one(terms=Terms(Price(0, 0, 0)))
    assert (found.margin, found.break_even_share, found.hour_usd_for_margin) == (None, None, Decimal(0))


# --- figures


def test_runs_are_added_up_with_the_slowest_and_the_fastest_beside_the_mean() -> None:
    found = one(run(output_tokens=100), run(output_tokens=300, wall_us=2 * US), run(output_tokens=60))
    assert (found.output_tok_s_low, found.output_tok_s, found.output_tok_s_high) == (60.0, 115.0, 150.0)
    assert found.runs == 3 and found.requests == 6


def test_times_are_those_of_all_streams_of_all_runs() -> None:
    found = one(run(ttft_ms=(1.0,) * 50), run(ttft_ms=(*(2.0,) * 49, 900.0)))
    assert (found.ttft_ms.p50, found.ttft_ms.p90, found.ttft_ms.p99) == (1.0, 2.0, 2.0)
    assert (found.itl_ms.p50, found.itl_ms.p99) == (10.0, 20.0)
    assert (found.user_tok_s, found.user_tok_s_slow) == (100.0, 50.0)


def test_what_nobody_could_measure_is_said_and_not_filled_in() -> None:
    known = dict(mesh_cores=1.5, busy_cores=2.0, steal_cores=0.1, joules=30.0)
    found = one(run(**known), run(**known))
    assert (found.mesh_cores, found.busy_cores, found.steal_cores, found.output_joules) == (1.5, 2.0, 0.1, 0.3)
    # one run without it: no mean of the others in its name
    found = one(run(**known), run())
    assert (found.mesh_cores, found.steal_cores, found.output_joules) == (None, None, None)
    assert "not measured" in price_page.markdown(document(found))


def test_drafts_are_counted_where_there_were_any() -> None:
    assert one(run()).accepted_share is None
    found = one(run(draft_tokens=80, accepted_draft_tokens=60, chunks=40))
    assert (found.accepted_share, found.accepted_of_output, found.tokens_per_chunk) == (0.75, 0.6, 2.5)


def test_an_outdone_row_and_one_that_misses_a_promise_are_marked_and_stay() -> None:
    fast, slow = run(tpot_ms=(5.0,)), run(tpot_ms=(9.0,), output_tokens=50)
    found = rows([point(fast), point(slow, side="b"), point(slow, side="b", workload="512/64")], [side(), side("b")],
                 TWO_DOLLARS, objectives.parse("tpot_p50=7ms"))
    assert [(one.outdone, bool(one.missed)) for one in found] == [(False, False), (True, True), (False, True)]
    page = price_page.markdown(document(*found, sides=[side(), side("b")]))
    assert "tpot_p50=7ms: 9ms; outdone" in page


def test_a_row_is_outdone_only_beyond_what_runs_differ_by() -> None:
    mine = point(run(output_tokens=90), run(output_tokens=110))
    for slowest, outdone in ((105, False), (111, True)):
        other = point(run(output_tokens=slowest), run(output_tokens=200), side="b")
        assert rows([mine, other], [side(), side("b")], TWO_DOLLARS)[0].outdone is outdone
        # faster on a machine that costs twice as much is not cheaper
        assert not rows([mine, other], [side(), side("b", hour="0.192")], TWO_DOLLARS)[0].outdone
        slower = point(run(output_tokens=300, tpot_ms=(30.0,)), side="b")
        assert not rows([mine, slower], [side(), side("b")], TWO_DOLLARS)[0].outdone


def test_a_point_without_any_answer_has_no_row_and_one_of_no_side_is_refused() -> None:
    assert rows([point(run(output_tokens=0, e2e_ms=()))], [side()], TWO_DOLLARS) == []
    with pytest.raises(ValueError, match="no side 'b'"):
        rows([point(side="b")], [side()], TWO_DOLLARS)


# --- the page, the file and the curve


def test_every_table_begins_with_the_operating_point_and_every_row_is_in_each() -> None:
    found = rows([point(concurrency=count) for count in (1, 4, 16)], [side()], TWO_DOLLARS)
    lines = price_page.markdown(document(*found)).splitlines()
    point_of = "| side | workload | on | at once | in / out tokens | cached | cores |"
    heads = [line for line in lines if line.startswith(point_of)]
    assert len(heads) == 4
    for count in (1, 4, 16):
        begin = f"| a | questions | 1 cpu | {count} | 200 / 50 | 0.0 % | not measured |"
        assert len([line for line in lines if line.startswith(begin)]) == 4


def test_the_page_names_model_revision_precision_machines_prices_and_who_says_so() -> None:
    stated = side(revision="sha256 12ab", precision="Q4_1", engine="cpu", workers=1, drafters=0)
    page = price_page.markdown(document(one(), sides=[stated]))
    for word in ("tiny", "sha256 12ab", "Q4_1", "1 cpu at $0.096 (somebody)", "$2.00 a million output tokens", "abc",
                 "2026-11-27", "> shared", "processor: slow"):
        assert word in page, word


def test_a_sheet_is_read_back_as_it_was_written_and_priced_again() -> None:
    points = [point()]
    before = document(*rows(points, [side()], TWO_DOLLARS), points=points)
    after = decode(encode(before))
    assert after == before
    dearer = rows(after.points, after.sides, Terms(Price(0, 0, nanos("4.00"))))[0]
    assert dearer.revenue_usd_per_hour == 2 * before.rows[0].revenue_usd_per_hour
    with pytest.raises(ValueError, match="no price sheet"):
        decode(b"{}")


def test_the_curve_of_letters_has_a_capital_for_what_is_best_and_a_small_one_for_what_is_not() -> None:
    found = rows([point(run(tpot_ms=(5.0,)), concurrency=1), point(run(tpot_ms=(50.0,), output_tokens=900)),
                  point(run(tpot_ms=(40.0,), output_tokens=50), concurrency=4)], [side()], TWO_DOLLARS)
    lines = price_page.curve(found)
    assert sum(line.count("A") for line in lines[:-2]) == 2 and sum(line.count("a") for line in lines[:-3]) == 1
    assert lines[0].startswith("      900 |") and lines[-1].strip() == "A  a, questions"
    assert price_page.curve([]) == ["no row has more than one token an answer: there is no curve"]


def test_the_picture_is_svg_with_a_mark_for_each_row_hollow_where_it_is_outdone() -> None:
    found = rows([point(run(tpot_ms=(5.0,)), concurrency=1), point(run(tpot_ms=(9.0,), output_tokens=50)),
                  point(run(tpot_ms=()), concurrency=8)], [side()], TWO_DOLLARS)
    picture = ElementTree.fromstring(price_curve.svg(found, "a & b"))
    circles = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert [circle.get("fill") == "#fff" for circle in circles] == [False, True]
    for circle in circles:
        assert 0 < float(circle.get("cx", "")) < price_curve.WIDTH
        assert 0 < float(circle.get("cy", "")) < price_curve.HEIGHT
    assert ElementTree.fromstring(price_curve.svg([], "nothing")) is not None


@pytest.mark.parametrize("most", [0.3, 1.0, 7.0, 99.0, 101.0, 540.0, 12_345.0])
def test_an_axis_covers_its_values_with_few_marks(most: float) -> None:
    marks = price_curve._scale([most])
    assert marks[0] == 0 and marks[-1] >= most > marks[-2] and len(marks) <= 10


# --- promises


def test_a_promise_has_a_unit_and_is_said_again_as_it_was() -> None:
    assert objectives.parse("ttft_p99=0.5s, itl_p99.9=40ms") == [Objective("ttft", 99, 500), Objective("itl", 99.9, 40)]
    assert ",".join(map(str, objectives.parse("ttft_p99=0.5s,itl_p99.9=40ms"))) == "ttft_p99=500ms,itl_p99.9=40ms"
    assert objectives.parse("") == []
    for word in ("ttft_p99=500", "ttft=1s", "speed_p50=1s", "ttft_p101=1s", "itl_p99=-1ms"):
        with pytest.raises(ValueError, match="no objective"):
            objectives.parse(word)


def test_what_is_not_known_is_not_kept() -> None:
    promised = objectives.parse("ttft_p99=500ms,e2e_p50=1s,itl_p99=10ms")
    values = {"ttft": 501.0, "e2e": 1000.0}
    assert objectives.missed(promised, lambda what, percent: values.get(what)) == [
        "ttft_p99=500ms: 501ms", "itl_p99=10ms: not known"]


def test_percentiles_of_counts_are_those_of_the_values_one_by_one() -> None:
    counts = {3: 5, 1: 2, 9: 1, 4: 0}
    values = [value for value, count in counts.items() for _ in range(count)]
    for percent in (0, 10, 25, 26, 50, 87.5, 88, 100):
        assert objectives.counted_percentile(counts, percent) == objectives.percentile(values, percent)
    assert objectives.counted_percentile({}, 50) is None and objectives.percentile([], 50) is None


# --- the load


def test_workloads_are_questions_or_two_numbers() -> None:
    assert workloads("questions,512/64", 128) == [Workload("questions", 0, 128), Workload("512/64", 512, 64)]
    for word in ("chat", "512", "512/0", "0/64", "a/b", ""):
        with pytest.raises(ValueError, match="no workload"):
            workloads(word, 128)


def test_only_fixed_lengths_are_forced_and_no_two_prompts_begin_alike() -> None:
    numbers = itertools.count()
    asked = requests_of(Workload("questions", 0, 128), "m", 8, numbers)
    assert all("ignore_eos" not in body and body["max_tokens"] == 128 for body in asked)
    forced = requests_of(Workload("512/64", 512, 64), "m", 8, numbers)
    assert all(body["ignore_eos"] is True and body["max_tokens"] == 64 for body in forced)
    begins = [body["messages"][0]["content"].split("\n")[0] for body in asked + forced]  # type: ignore[index]
    assert len(set(begins)) == 16


def test_an_answer_of_another_length_or_without_usage_is_counted() -> None:
    seen = Load(wall_s=2.0, ttft_s=[0.1, 0.2], e2e_s=[1.0, 1.5], itl_s=[0.01, 0.01, 0.02], prompt_tokens=40,
                completion_tokens=127, lengths={0: 64, 1: 63}, failures=["503"])
    found = run_of(seen, Workload("512/64", 512, 64), 3)
    assert (found.wrong_lengths, found.failures, found.wall_us, found.itl_tenths) == (2, 1, 2 * US, {100: 2, 200: 1})
    assert run_of(seen, Workload("questions", 0, 128), 3).wrong_lengths == 1


async def test_drafts_are_never_judged_on_forced_lengths() -> None:
    driven = [price_load.Driven("with drafts", "http://127.0.0.1:1", "m", drafts=True)]
    with pytest.raises(price_load.LoadFailed, match="drafts are judged on questions alone"):
        await price_load.measure(driven, workloads("512/64", 8), [1], 1, 1)


def test_an_address_may_end_with_v1_have_a_path_and_be_encrypted() -> None:
    assert endpoint("http://127.0.0.1:8000") == Endpoint("127.0.0.1", 8000, False, "")
    assert endpoint("http://127.0.0.1:8000/v1/") == Endpoint("127.0.0.1", 8000, False, "")
    assert endpoint("https://api.example.com/mesh/v1") == Endpoint("api.example.com", 443, True, "/mesh")
    with pytest.raises(ValueError, match="no address"):
        endpoint("127.0.0.1:8000")


class Endpoint200:
    """Serves one model as an OpenAI endpoint: three chunks for three tokens, a short answer where it is asked for 7."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("get"):
            body = json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]})
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        else:
            length = int(head.partition("content-length: ")[2].split()[0])
            asked = json.loads(await reader.readexactly(length))
            self.seen.append(asked)
            tokens = 3 if asked["max_tokens"] != 7 else 2
            events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "word "}}]}] * tokens
            events.append({"choices": [], "usage": {
                "prompt_tokens": 20, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 5},
                "mill": {"draft_tokens": 4, "accepted_draft_tokens": 1}}})
            sent = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            writer.write(f"HTTP/1.1 200 OK\r\n\r\n{sent}data: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()


async def test_an_endpoint_that_runs_is_measured_as_it_says_itself() -> None:
    endpoint_200 = Endpoint200()
    async with endpoint_200 as url:
        assert await price_load.first_model(url) == "tiny"
        driven = [price_load.Driven("there", url, "tiny")]
        points = await price_load.measure(driven, workloads("questions,20/7", 3), [1, 4], 2, 1)
    assert [(one.workload, one.concurrency, len(one.runs)) for one in points] == [
        ("questions", 1, 2), ("questions", 4, 2), ("20/7", 1, 2), ("20/7", 4, 2)]
    for one in points:
        for each in one.runs:
            tokens = 2 if one.fixed else 3
            assert (each.requests, each.failures, each.prompt_tokens, each.cached_tokens) == (4, 0, 80, 20)
            assert (each.output_tokens, each.chunks, each.draft_tokens) == (4 * tokens, 4 * tokens, 16)
            # seven were demanded, two came
            assert each.wrong_lengths == (4 if one.fixed else 0)
            assert len(each.ttft_ms) == len(each.tpot_ms) == len(each.e2e_ms) == 4
            assert sum(each.itl_tenths.values()) == 4 * (tokens - 1)
            assert each.mesh_cores is None and each.busy_cores is not None
    begins = [asked["messages"][0]["content"].split("\n")[0] for asked in endpoint_200.seen]
    assert len(set(begins)) == len(begins) == 2 + 2 + 4 * 8
    assert all(asked["stream_options"] == {"include_usage": True} for asked in endpoint_200.seen)


async def test_an_endpoint_that_is_not_there_is_said_with_its_address() -> None:
    with pytest.raises(price_load.LoadFailed, match=r"http://127.0.0.1:1 does not answer"):
        driven = [price_load.Driven("a", "http://127.0.0.1:1", "m")]
        await price_load.measure(driven, workloads("questions", 3), [1], 1, 1)
    with pytest.raises(price_load.LoadFailed, match="does not say which models"):
        await price_load.first_model("http://127.0.0.1:1")


# --- joules


def test_joules_are_those_of_all_packages_also_when_a_counter_runs_over(tmp_path: Path) -> None:
    def write(name: str, used: int) -> None:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{used}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")

    write("intel-rapl:0", 9_000_000)
    write("intel-rapl:0:0", 5)  # a part of the first
    write("intel-rapl:1", 1_000_000)
    meter = Meter(tmp_path)
    write("intel-rapl:0", 500_000)
    write("intel-rapl:1", 3_000_000)
    assert meter.joules() == pytest.approx(1.5 + 2.0)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None


def test_there_are_no_joules_where_nothing_counts_them(tmp_path: Path) -> None:
    assert Meter(tmp_path).joules() is None


# --- the command


def test_models_of_several_prices_do_not_share_a_sheet(tmp_path: Path) -> None:
    points, path, prices = [point()], tmp_path / "a.json", tmp_path / "prices.toml"
    sides = [side(), msgspec.structs.replace(side("b"), model="other")]
    path.write_bytes(encode(document(*rows(points, sides, TWO_DOLLARS), sides=sides, points=points)))
    line = "[[prices]]\nmodel = '{}'\ninput = 1\noutput = {}\nsource = 'x'\ndate = 2026-11-27\n"
    prices.write_text(line.format("tiny", 2) + line.format("other", 3))
    refused = _run("--from", str(path), "--prices", str(prices))
    assert refused.exit_code == 1 and refused.stderr.startswith("these models have several prices")
    prices.write_text(line.format("tiny", 2) + line.format("other", 2))
    assert _run("--from", str(path), "--prices", str(prices)).exit_code == 0
    prices.write_text(line.format("other", 2))
    missing = _run("--from", str(path), "--prices", str(prices))
    assert missing.exit_code == 1 and missing.stderr.startswith("the prices file has no price for tiny")


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["price-sheet", *arguments], env={"COLUMNS": "100", "TERM": "dumb"})


def test_help_names_every_option() -> None:
    shown = _run("--help").output
    options = ("url", "model", "concurrency", "workloads", "max-tokens", "runs", "waves", "speculation", "sku",
               "machines", "drafter-sku", "prices", "tier", "margin", "utilisation", "slo", "note", "from", "out",
               "json")
    assert [option for option in options if f"--{option} " not in shown] == []


@pytest.mark.parametrize(("said", "arguments"), [
    ("no machine 'tpu'", ("--sku", "tpu")), ("--margin '1' is no share", ("--margin", "1")),
    ("--utilisation '0' is no share", ("--utilisation", "0")), ("--concurrency '0'", ("--concurrency", "0")),
    ("'fast' is no objective", ("--slo", "fast")), ("'chat' is no workload", ("--workloads", "chat")),
    ("--speculation 'maybe' is unknown", ("--speculation", "maybe")),
    ("'nowhere' is no address of an API", ("--url", "nowhere"))])
def test_what_cannot_be_measured_is_said_in_one_sentence_before_anything_starts(
        said: str, arguments: tuple[str, str]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1 and said in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


def test_a_sheet_can_be_priced_again_without_measuring_anything(tmp_path: Path) -> None:
    points = [point()]
    path, stem = tmp_path / "a.json", tmp_path / "again.v2"
    path.write_bytes(encode(document(*rows(points, [side()], TWO_DOLLARS), points=points)))
    result = _run("--from", str(path), "--utilisation", "0.5", "--tier", "priority", "--note", "again", "--out",
                  str(stem))
    assert result.exit_code == 0, result.output
    again = decode((tmp_path / "again.v2.json").read_bytes())
    assert again.notes == ["shared", "again"] and again.points == points
    assert again.rows[0].utilisation == Decimal("0.5") and again.terms.price.output == nanos("0.70")
    assert "again.v2.svg" in (tmp_path / "again.v2.md").read_text()
    assert (tmp_path / "again.v2.svg").read_text().startswith("<svg")
    assert Fraction(again.rows[0].hour_usd_for_margin) < Fraction(again.rows[0].revenue_usd_per_hour)
