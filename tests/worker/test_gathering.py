"""What short steps say travels together, and nobody who waits for a first token waits for that."""

from itertools import pairwise

import pytest

from shared.messages import Accepted, Finished, Tokens
from tests.virtual_time import run_virtual
from tests.worker.builders import Bench, mock_decoder, request
from tests.worker.mesh import WALL_S, Mesh
from worker.engine import GATHER_S
from worker.events import Advanced, Ended, Event
from worker.outbox import together

DEADLINE = WALL_S + 1000.0


def test_the_tokens_of_a_stream_become_one_event_and_nothing_is_lost() -> None:
    bench = Bench(mock_decoder())
    events: list[Event] = []
    bench.scheduler.add(request("a", max_tokens=5), 0.0, 100.0)
    bench.scheduler.add(request("b", [9, 8, 7], max_tokens=3), 0.0, 100.0)
    for _ in range(6):
        events += bench.scheduler.take_events()
        if (step := bench.scheduler.plan(0.0)) is not None:
            chosen = bench.decoder.step(bench.batch.build(step)).tolist()
            events += bench.scheduler.commit(step, chosen, 0.0)
    told = together(events)
    for name, length in (("a", 5), ("b", 3)):
        def of(event: Event, name: str = name) -> bool:
            return isinstance(event, Advanced | Ended) and event.sequence.key.request_id == name
        (tokens, end) = [event for event in told if of(event)]
        assert isinstance(tokens, Advanced) and isinstance(end, Ended)
        assert tokens.first == 0 and len(tokens.tokens) == length
        assert tokens.tokens == [token for event in events if isinstance(event, Advanced) and of(event)
                                 for token in event.tokens]
    assert [event for event in told if not isinstance(event, Advanced)] == [
        event for event in events if not isinstance(event, Advanced)]


@pytest.mark.parametrize("speculation", [False, True])
@pytest.mark.parametrize(("step_s", "longest_s"), [(0.0005, GATHER_S + 0.001), (0.004, 0.0045)])
def test_tokens_wait_for_others_only_where_steps_are_short_and_nobody_drafts(
        step_s: float, longest_s: float, speculation: bool) -> None:
    async def scenario() -> tuple[Mesh, list[tuple[float, int]]]:
        mesh = Mesh(mock_step_s=step_s, mock_row_s=0.0, mock_token_s=0.0, speculation=speculation)
        seen: list[tuple[float, int]] = []
        async with mesh:
            await mesh.send(request("r", max_tokens=60, deadline=DEADLINE))
            while not mesh.ends("r"):
                before = len(mesh.stream("r"))
                await mesh.until(lambda before=before: len(mesh.stream("r")) > before or mesh.ends("r"))
                seen.append((mesh.clock.now(), len(mesh.stream("r"))))
        return mesh, seen

    mesh, seen = run_virtual(scenario(), timeout_s=60)
    assert len(mesh.stream("r")) == 60
    kinds = [type(reply) for reply in mesh.replies]
    assert kinds[0] is Accepted and kinds[-1] is Finished and set(kinds[1:-1]) == {Tokens}
    assert seen[0][1] == 1  # the first token came alone
    assert max(later - sooner for (sooner, _), (later, _) in pairwise(seen)) <= longest_s
    messages = len(mesh.batches)
    assert messages < 15 if step_s < 0.001 else messages >= 60
