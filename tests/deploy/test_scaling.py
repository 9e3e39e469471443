"""What a mesh needs of each service, by each one's own signal, and when advice changes."""

import asyncio
import json
import math
import sys

import pytest

from deploy import broker
from deploy.autoscale import follow
from deploy.live import Board
from deploy.local_mesh import LocalMesh, Options
from deploy.scale_command import bounds
from deploy.scaling import Advisor, Goals, Need, needs, slots_of
from gateway.model_files import load_card
from shared import subjects
from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, WorkerStatus
from tests.mesh.streams import chat, read
from tests.models import default_folder

GOALS = Goals()


def worker(name: str = "w1", **fields: object) -> WorkerStatus:
    """One that carries 40 streams at 50 ms: a step takes 10 ms and 1 ms for each of them."""
    told = {"step_base_s": 0.010, "step_row_s": 0.001, "max_running": 64, "prefill_tok_s": 1000.0, "blocks_total": 100}
    return WorkerStatus(name, 1, "m", **(told | fields))  # type: ignore[arg-type]


def of(role: str, *statuses: object) -> Need:
    [found] = [need for need in needs(statuses, GOALS) if need.role == role]  # type: ignore[arg-type]
    return found


def test_a_worker_carries_what_its_steps_allow_in_the_promised_time():
    assert slots_of(worker(), 0.05) == 40
    assert slots_of(worker(), 1.0) == 64
    assert slots_of(worker(step_base_s=0.2), 0.05) == 1
    assert slots_of(worker(step_row_s=0.0), 0.05) == 64


@pytest.mark.parametrize(("fields", "load", "why"), [
    ({"running": 20, "waiting": 60}, 2.0, "20 streams run and 60 wait; one worker carries 40"),
    ({"running": 4, "queued_tokens": 2000}, 4.0, "2.00 s of prompts wait"),
    ({"running": 4, "blocks_used": 90}, 0.9, "KV blocks of 0.9 workers"),
])
def test_the_scarcest_of_streams_prompts_and_blocks_says_how_many_workers(fields, load, why):
    need = of("worker", worker(**fields))
    assert need.load == pytest.approx(load) and why in need.why
    assert need.up == math.ceil(load / 0.8) and need.down >= need.up


def test_requests_that_routers_hold_count_as_waiting_at_the_models_that_have_streams():
    other = WorkerStatus("x", 1, "n", running=10, step_base_s=0.010, step_row_s=0.001)
    found = {need.name: need for need in needs([worker(running=30), other, RouterStatus("r", 1, held=40)], GOALS)
             if need.role == "worker"}
    assert found["m"].load == pytest.approx((30 + 30) / 40) and found["n"].load == pytest.approx((10 + 10) / 40)


def test_what_drains_does_not_count_and_what_starts_does():
    leaving, coming = worker("w2", state="draining", running=9), worker("w3", state="starting")
    need = of("worker", worker("w1", running=8), leaving, coming)
    assert need.have == 2 and need.load == pytest.approx(8 / 40)
    assert of("worker", worker(state="starting")).up == 1


def test_a_gateway_and_a_router_are_full_at_their_core():
    gateways = [GatewayStatus("g1", 1, busy=0.9), GatewayStatus("g2", 1, busy=0.5)]
    assert of("gateway", *gateways)[2:6] == (2, pytest.approx(1.4), 3, 4)
    assert of("router", RouterStatus("r1", 1, busy=0.01)).up == 1


def test_a_busy_drafter_wants_another_but_not_where_drafts_do_not_pay():
    busy = DrafterStatus("d1", 1, busy=0.95)
    assert of("drafter", busy, worker(drafting="on")).up == 2
    need = of("drafter", busy, DrafterStatus("d2", 1), worker("a", drafting="slower"), worker("b", drafting="dear"))
    assert (need.up, need.down) == (1, 1) and "2 of 2 workers are faster without" in need.why


def moment(load: float, have: int = 1) -> Need:
    return Need("worker", "m", have, load, max(1, math.ceil(load / 0.8)), max(1, math.ceil(load / 0.6)), "")


def test_a_burst_changes_nothing_and_a_lasting_need_is_met_at_once():
    advisor = Advisor(GOALS, up_s=15.0, down_s=600.0)
    for second in range(10):
        [advice] = advisor.advise([moment(9.0)], float(second))
    assert advice.wanted == 1
    assert advisor.advise([moment(0.5)], 10.0)[0].wanted == 1
    for second in range(11, 27):
        [advice] = advisor.advise([moment(3.0 if second % 2 else 2.0)], float(second))
    assert advice.wanted == 3  # what was needed all the time, not the peak
    assert advisor.advise([moment(2.0, have=1)], 27.0)[0].wanted == 3  # nobody has come yet: still wanted


def test_fewer_are_wanted_one_by_one_each_after_the_whole_time():
    advisor = Advisor(GOALS, up_s=15.0, down_s=600.0)
    advisor.advise([moment(3.0, have=5)], 0.0)
    wanted = {at: advisor.advise([moment(0.1, have=5)], float(at))[0].wanted for at in range(1, 2500)}
    assert [wanted[at] for at in (600, 602, 1199, 1204, 1810, 2499)] == [5, 4, 4, 3, 2, 1]
    advisor = Advisor(GOALS, up_s=15.0, down_s=600.0)
    told = [advisor.advise([moment(0.1 if at % 500 else 3.9, have=5)], float(at))[0].wanted for at in range(2500)]
    assert set(told) == {5}  # a peak every 500 s is reason enough to stay


def test_load_between_the_two_lines_moves_nothing():
    advisor = Advisor(GOALS, up_s=15.0, down_s=60.0)
    told = {advisor.advise([moment(2.0 + 0.35 * math.sin(at / 20), have=3)], float(at))[0].wanted for at in range(4000)}
    assert told == {3}


def test_bounds_hold_whatever_the_load():
    advisor = Advisor(Goals(least={"gateway": 2}, most={"worker": 4}), up_s=0.0)
    gateway = Need("gateway", "", 1, 0.0, 1, 1, "")
    for at in range(5):
        told = advisor.advise([gateway, moment(50.0)], float(at))
    assert [advice.wanted for advice in told] == [2, 4]


def test_waves_of_load_are_followed_without_flapping():
    """A closed loop: what is advised comes 30 s later, or leaves at once; two hours of waves and noise."""
    advisor = Advisor(GOALS, up_s=15.0, down_s=600.0)
    have, arriving, changes, short_s = 2, list[int](), 0, 0
    for at in range(7200):
        load = 4.0 + 3.0 * math.sin(at / 7200 * 4 * math.pi) + 0.8 * math.sin(at * 12.9898)
        have += sum(due <= at for due in arriving)
        arriving = [due for due in arriving if due > at]
        [advice] = advisor.advise([moment(load, have + len(arriving))], float(at))
        if advice.wanted > have + len(arriving):
            arriving += [at + 30] * (advice.wanted - have - len(arriving))
            changes += 1
        elif advice.wanted < have:
            have, changes = advice.wanted, changes + 1
        short_s += load > have
    assert changes < 25 and short_s < 0.03 * 7200  # 45 s of it before the first can be there


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "wrong"), [(["worker"], "worker"), (["cook=2"], "cook=2"), (["worker=-1"], "-1")])
def test_a_bound_that_is_none_is_named(said, wrong):
    with pytest.raises(ValueError, match=wrong):
        bounds(said)
    assert bounds(["worker=4", "gateway=2"]) == {"worker": 4, "gateway": 2}


@pytest.mark.slow
async def test_the_command_asks_for_workers_where_a_real_mesh_is_full_and_for_none_where_it_idles(tmp_path):
    """One worker that carries 8 streams at 50 ms, and 24 of them."""
    options = Options(model=default_folder(), data=tmp_path / "mesh", port=broker.free_port(), engine="mock",
                      drain_s=1.0, settings={"worker": {"mock_step_s": 0.010, "mock_row_s": 0.002, "max_running": 8}})
    async with LocalMesh(options) as mesh:
        await mesh.until_ready()
        idle = await _advised(mesh.nats)
        body = chat(load_card(options.model).name, "Count.", max_tokens=400, ignore_eos=True)
        streams = [asyncio.create_task(read(mesh.url, body)) for _ in range(24)]
        await asyncio.sleep(1.0)
        full = await _advised(mesh.nats)
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    assert {(one["role"], one["have"], one["wanted"]) for one in idle} == {
        (role, 1, 1) for role in ("gateway", "router", "worker", "drafter")}
    [workers] = [one for one in full if one["role"] == "worker"]
    assert workers["have"] == 1 and workers["wanted"] == 4, workers  # 24 / 8 / 0.8
    assert "8 streams run and 16 wait; one worker carries" in workers["why"]


async def _advised(nats):
    command = [sys.executable, "-m", "deploy.cli", "scale", "--advise", "--nats", nats, "--json", "--seconds", "4"]
    asked = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await asked.communicate()
    told = json.loads(said)
    assert asked.returncode == int(any(one["wanted"] > one["have"] for one in told))
    return told


# --- done ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_local_mesh_starts_workers_under_load_and_drains_them_after_it_without_losing_a_token(tmp_path):
    slow = {"mock_step_s": 0.020, "mock_row_s": 0.001, "max_running": 4}
    options = Options(model=default_folder(), data=tmp_path / "mesh", port=broker.free_port(), engine="mock",
                      drafters=0, drain_s=0.5, settings={"worker": slow})
    said = []
    async with LocalMesh(options) as mesh:
        await mesh.until_ready()
        board = Board()
        bus = await mesh.connect()
        await bus.subscribe(subjects.ALL_STATUS, board.take)
        advisor = Advisor(Goals(least={"worker": 1}, most={"worker": 3}), up_s=2.0, down_s=3.0)
        following = asyncio.create_task(follow(mesh, board, 3, said.append, advisor))
        body = chat(load_card(options.model).name, "Count.", max_tokens=200, ignore_eos=True, temperature=0.9, seed=5)
        seen = await asyncio.gather(*(read(mesh.url, body) for _ in range(32)))
        workers = {stream.usage["mill"]["worker"] for stream in seen}
        assert {(stream.text, stream.finish_reason) for stream in seen} == {(seen[0].text, "length")}
        # what waits at a worker stays there: the last to come may come too late for it
        assert len(workers) >= 2 and len([line for line in said if " starts, " in line]) == 2, said
        # one stream goes on while all but one worker leave
        long = asyncio.create_task(read(mesh.url, body | {"max_tokens": 600}))
        async with asyncio.timeout(60):
            while len([child for child in mesh.children if child.name.startswith("worker")]) > 1:
                await asyncio.sleep(0.1)
        assert (await long).text.startswith(seen[0].text)
        assert [line.split()[0] for line in said[2:]] == [line.split()[0] for line in reversed(said[:2])]
        following.cancel()
        await bus.close()
