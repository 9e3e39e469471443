"""A real worker with a real drafter: answers that are there before they are wanted, however far away it is."""

import asyncio
from collections.abc import Mapping

import pytest
from msgspec.structs import replace

import drafter.service
import worker.service
from shared import subjects
from shared.clock import LoopClock
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import Finished, Generate, StepReplies, Tokens, decode, encode
from shared.settings import DrafterSettings, WorkerSettings
from shared.tokens import pack, unpack
from tests.virtual_time import run_virtual
from tests.worker.builders import mock_decoder, plain, request

STEP_S = 0.007
TOKENS = 400


def faults(delay_s: float, loss: float = 0.0, duplication: float = 0.0) -> Faults:
    between = Faults((delay_s, delay_s), loss=loss, duplication=duplication)
    return Faults(overrides=((f"{subjects.PREFIX}.drafter.*.follow.>", between),
                             (f"{subjects.PREFIX}.worker.*.drafts.>", between)))


def streamed(one: Generate, between: Faults, **settings: object) -> tuple[list[int], Finished, Mapping[str, float]]:
    """The stream, its end, and the worker's figures."""
    workers: list[worker.service.Worker] = []

    class Seen(worker.service.Worker):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            workers.append(self)

    async def scene() -> tuple[list[int], Finished, Mapping[str, float]]:
        broker, clock = MemoryBroker(between), LoopClock(1e6)
        bus = MemoryBus(broker)
        tokens: list[int] = []
        ended: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()

        def hear(data: bytes) -> None:
            for reply in decode(data, StepReplies).replies:
                if isinstance(reply, Tokens):
                    tokens.extend(unpack(reply.tokens))
                elif isinstance(reply, Finished):
                    ended.set_result(reply)

        await bus.subscribe(subjects.replies("g1"), lambda delivery: hear(delivery.data))
        its = WorkerSettings(**{"id": "w1", "engine": "mock", "model_name": "m", "mock_step_s": STEP_S,  # type: ignore[arg-type]
                                "mock_row_s": 0.0, "drain_s": 0.0} | settings)
        ready = asyncio.Event()
        serving = [
            asyncio.create_task(drafter.service.serve(MemoryBus(broker), DrafterSettings(id="d1"), clock)),
            asyncio.create_task(worker.service.serve(MemoryBus(broker), its, clock, ready, mock_decoder(300, 1200)))]
        await ready.wait()
        # until the worker has heard of the drafter
        await asyncio.sleep(1.0)
        await bus.publish(subjects.worker_generate("w1"), encode(one))
        end = await ended
        figures = dict(workers[0].figures())
        for task in serving:
            task.cancel()
        await asyncio.wait(serving)
        return tokens, end, figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.service, "Worker", Seen)
        return run_virtual(scene(), timeout_s=60)


def asked(max_tokens: int = TOKENS) -> tuple[Generate, list[int]]:
    one = request(deadline=2e6, max_tokens=max_tokens)
    return one, plain(one, mock_decoder(300, 1200))


@pytest.mark.parametrize(("round_trip_s", "most_steps"), [(0.0, 0.30), (0.02, 0.45), (0.1, 0.75)])
def test_the_further_away_a_drafter_is_the_longer_are_its_answers(round_trip_s: float, most_steps: float) -> None:
    """A client predicts the answer: all that can be lost is lost on the way."""
    one, whole = asked()
    tokens, end, figures = streamed(replace(one, prediction=pack(whole)), faults(round_trip_s / 2))
    assert tokens == whole
    assert figures["steps"] < most_steps * TOKENS
    assert end.accepted_draft_tokens > (1 - most_steps) * TOKENS * 0.9
    if round_trip_s:
        # at least what plain steps give in that time
        assert figures["draft_lead_tokens"] >= round_trip_s / STEP_S - 1
    assert figures["drafts_ready"] > 0.5 * figures["drafts_wanted"]
    assert figures["strange_proposals"] == figures["alien_proposals"] == 0


def test_a_drafter_that_is_a_step_late_has_prepared_for_outcomes() -> None:
    one, whole = asked()
    tokens, _, figures = streamed(one, faults(0.004))
    assert tokens == whole
    assert figures["drafts_foreseen"] > 0
    assert figures["steps"] < 0.8 * TOKENS


@pytest.mark.parametrize("seed", range(3))
def test_what_is_lost_or_comes_twice_costs_drafts_and_no_token(seed: int) -> None:
    one, whole = asked(200 + seed)
    tokens, _, figures = streamed(replace(one, prediction=pack(whole)), faults(0.003, loss=0.1, duplication=0.3))
    assert tokens == whole
    assert figures["repeated_proposals"] > 0
    assert figures["strange_proposals"] == 0


def test_a_prediction_that_is_wrong_changes_nothing() -> None:
    one, whole = asked(100)
    lie = [(token + 1) % 200 for token in whole]
    for prediction in (pack(lie), pack([2**32 - 1, 199, 10**6]), b"odd"):
        tokens, _, _ = streamed(replace(one, prediction=prediction), faults(0.001))
        assert tokens == whole
