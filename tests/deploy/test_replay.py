"""Replays of a small excerpt of a public trace, and of traces made up here."""

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from deploy import replay_fleet, replay_plot
from deploy.cli import app
from deploy.replay import Page, policies_named, replay
from deploy.replay_fleet import Device, Fleet, Outcome, Replay, infinite_reuse
from deploy.replay_report import drawing, percentile, table
from deploy.replay_trace import BadTrace, Trace, parse, read
from router.placement import POLICIES
from shared.blocks import hash_chain, split_hashes
from shared.tokens import count, unpack

EXCERPT = Path(__file__).parent.parent / "data" / "mooncake_conversation_excerpt.jsonl"
# small enough that blocks go, large enough that some come back
SMALL = Fleet(workers=4, blocks=1024)


def mooncake(at_ms: int, hash_ids: list[int], tokens: int = 0, output: int = 4) -> bytes:
    return json.dumps({"timestamp": at_ms, "input_length": tokens or 512 * len(hash_ids), "output_length": output,
                       "hash_ids": hash_ids}).encode()


def played(lines: list[bytes], fleet: Fleet, policy: str = "cost", block_size: int = 64) -> tuple[Trace, Outcome]:
    trace = Trace(parse(lines), block_size)
    return trace, Replay(trace, fleet, policy).run()


def reuse(outcome: Outcome) -> float:
    return sum(one.cached_tokens for one in outcome.served) / sum(one.prompt_tokens for one in outcome.served)


# --- traces


def test_prompts_share_their_first_blocks_exactly_when_their_first_ids_are_equal() -> None:
    trace = Trace(parse([mooncake(0, [7, 8, 9]), mooncake(1, [7, 8, 10])]), 64)
    first, second = (split_hashes(trace.hashes(number)) for number in range(2))
    assert len(first) == len(second) == 24
    assert first[:16] == second[:16]
    assert not set(first[16:]) & set(second[16:])
    assert len(set(first)) == 24


def test_a_prompt_has_the_length_that_its_line_says_though_its_last_block_is_half_full() -> None:
    trace = Trace(parse([mooncake(0, [1, 2], tokens=700)]), 64)
    assert count(trace.prompt(0)) == 700
    assert len(split_hashes(trace.hashes(0))) == 700 // 64


def test_a_record_of_our_own_is_cut_like_the_traffic_it_was_made_of() -> None:
    prompts = [[*range(100), 1], [*range(64), *range(900, 940)]]
    lines = [json.dumps({"at_s": 5.0 + number, "prompt_tokens": len(prompt), "output_tokens": 3,
                         "block_size_tokens": 16,
                         "hashes": [name.hex() for name in hash_chain(prompt, b"salt")]}).encode()
             for number, prompt in enumerate(prompts)]
    trace = Trace(parse(lines), 16)
    assert [arrival.at_s for arrival in trace.arrivals] == [0.0, 1.0]
    first, second = (split_hashes(trace.hashes(number)) for number in range(2))
    assert (len(first), len(second)) == (6, 6)
    assert first[:4] == second[:4] and first[4] != second[4]
    # the end that no hash names is its own
    assert unpack(trace.prompt(0))[96:] != unpack(trace.prompt(1))[96:101]


def test_arrivals_are_in_order_and_twice_the_speed_is_half_the_time() -> None:
    arrivals = parse([mooncake(3000, [1]), mooncake(1000, [2])], speed=2.0)
    assert [arrival.at_s for arrival in arrivals] == [0.0, 1.0]


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"timestamp": 0}', mooncake(0, [1], tokens=-3), mooncake(0, [-1]),
                                  b'{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1, "block_size_tokens": 16, '
                                  b'"hashes": ["zz"]}'])
def test_a_line_that_is_no_request_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(BadTrace, match="line 2 is no request"):
        parse([mooncake(0, [1]), line])


# --- replays


@pytest.fixture(scope="module")
def page() -> Page:
    return replay(EXCERPT.name, read(EXCERPT), policies_named("all"), SMALL)


def test_placement_by_cost_reuses_most_at_the_least_mean_wait(page: Page) -> None:
    figures = page.report.policies
    others = {name: one for name, one in figures.items() if name != "cost"}
    assert figures["cost"].token_reuse > 1.3 * max(one.token_reuse for one in others.values())
    assert figures["cost"].ttft_mean_ms < min(one.ttft_mean_ms for one in others.values())
    assert figures["cost"].share_of_infinite < 1.0
    # everything goes where the system prompt lies already
    assert figures["prefix"].balance > 2.0
    assert figures["round_robin"].balance < 1.2


def test_every_request_is_served_under_every_policy(page: Page) -> None:
    assert {one.requests for one in page.report.policies.values()} == {page.report.requests}
    assert {one.refused for one in page.report.policies.values()} == {0}
    assert all(len(values) == page.report.requests for values in page.ttft_ms.values())


def test_the_same_trace_gives_the_same_figures_again(page: Page) -> None:
    again = replay(EXCERPT.name, read(EXCERPT), ["cost", "random"], SMALL).report.policies
    for name, one in again.items():
        assert msgspec.structs.replace(one, cpu_s=0.0) == msgspec.structs.replace(page.report.policies[name], cpu_s=0.0)


def test_what_the_router_predicts_is_nearly_what_workers_find(page: Page) -> None:
    for one in page.report.policies.values():
        assert one.predicted_reuse == pytest.approx(one.token_reuse, rel=0.03)


def test_one_worker_with_room_for_all_finds_what_an_infinite_cache_would() -> None:
    lines = [mooncake(60_000 * number, ids) for number, ids in
             enumerate([[1, 2, 3], [1, 2, 3, 4], [5, 6], [1, 2, 7], [5, 6], [1, 2, 3, 4, 8]])]
    trace, outcome = played(lines, Fleet(workers=1, blocks=4096))
    assert reuse(outcome) == infinite_reuse(trace) > 0.4


def test_long_stretches_of_decoding_take_the_time_of_their_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [mooncake(at, ids, output=output) for at, ids, output in
             [(0, [1, 2], 300), (400, [1, 2, 3], 90), (401, [1, 4], 1), (2500, [1, 2, 3, 5], 250), (2600, [6], 40)]]
    fleet = Fleet(workers=2, blocks=4096)
    _, long = played(lines, fleet)
    monkeypatch.setattr(replay_fleet, "STRETCH", 1)
    _, single = played(lines, fleet)
    for one, other in zip(sorted(long.served), sorted(single.served), strict=True):
        assert one[:4] == other[:4]
        assert (one.ttft_s, one.e2e_s) == pytest.approx((other.ttft_s, other.e2e_s), abs=1e-9)
    assert long.busy_s == pytest.approx(single.busy_s)


def test_a_lone_request_takes_what_the_formula_says() -> None:
    device = Device(step_s=0.01, row_s=0.001, token_s=0.0001)
    _, outcome = played([mooncake(0, [1], tokens=101, output=3)], Fleet(workers=1, blocks=64, device=device))
    one, = outcome.served
    hops = 3 * replay_fleet.HOP_S
    assert one.ttft_s == pytest.approx(hops + 0.01 + 0.001 + 100 * 0.0001)
    assert one.e2e_s == pytest.approx(one.ttft_s + 2 * (0.01 + 0.001))


def test_a_request_that_no_worker_can_hold_is_counted_and_the_others_are_served() -> None:
    _, outcome = played([mooncake(0, [1, 2, 3]), mooncake(1, [1])], Fleet(workers=2, blocks=20))
    assert outcome.refused == 1
    assert len(outcome.served) == 1


def test_a_burst_of_equal_prompts_is_computed_once() -> None:
    lines = [mooncake(0, [*range(20)], output=1) for _ in range(6)]
    _, outcome = played(lines, Fleet(workers=3, blocks=4096))
    computed = sum(one.prompt_tokens - one.cached_tokens for one in outcome.served)
    assert computed < 2 * 20 * 512


# --- what is printed


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 50) == 0.0


def test_the_page_fits_a_terminal_and_names_every_policy(page: Page) -> None:
    lines = [*table(page.report), *drawing(page.ttft_ms)]
    assert max(map(len, lines)) <= 100
    assert lines[5].startswith("cost")
    for name in POLICIES:
        assert sum(line.startswith(name) for line in lines) == 1
    # two names that begin alike get letters of their own
    assert "r round_robin" in lines[-1] and "a random" in lines[-1]


def test_the_command_prints_a_page_and_writes_the_figures(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["replay", str(EXCERPT), "--workers", "4", "--blocks-per-worker", "1024",
                                      "--policy", "cost,round_robin", "--json", str(target)])
    assert result.exit_code == 0, result.output
    assert "a cache without bounds would reuse" in result.output
    written = json.loads(target.read_bytes())
    assert set(written["policies"]) == {"cost", "round_robin"}
    assert {"token_reuse", "ttft_mean_ms", "ttft_p99_ms", "e2e_mean_ms", "balance"} <= set(written["policies"]["cost"])
    assert 0 < written["policies"]["cost"]["token_reuse"] < written["infinite_reuse"]


def test_the_command_says_in_a_sentence_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    monkeypatch.setattr(replay_plot, "possible", lambda: False)
    for arguments, words in [([str(bad)], "line 1 is no request"), ([str(empty)], "holds no request"),
                             ([str(EXCERPT), "--policy", "best"], "unknown policy 'best'"),
                             ([str(EXCERPT), "--speed", "0"], "no speed"),
                             ([str(EXCERPT), "--plot", "page.png"], "tokenmill[plots]")]:
        result = CliRunner().invoke(app, ["replay", *arguments])
        assert result.exit_code == 1
        assert words in " ".join(result.output.split())


def test_the_page_can_be_a_picture(page: Page, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    replay_plot.draw(tmp_path / "page.png", page.report, page.ttft_ms)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
