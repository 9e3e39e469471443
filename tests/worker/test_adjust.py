"""What a stream asks to shift or mask is what the specification says, in whatever steps it is computed."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import adjust as kernel
from shared import adjust as specification
from shared.messages import Adjust, Failed, Generate, Proposal, Sampling
from shared.tokens import pack, unpack
from tests.worker.builders import VOCABULARY, Bench, mock_decoder, plain, request
from worker.adjust import Adjuster, Builder, fill_all, without

SMALL = 40  # a vocabulary in which everything is met again soon

ids = st.integers(0, SMALL - 1)


def bias_of(values: dict[int, float]) -> dict[str, Any]:
    return {"biased": pack(values), "biases": np.array([*values.values()], "<f4").tobytes()}


@st.composite
def adjusts(draw: st.DrawFn, vocabulary: int = SMALL) -> Adjust:
    """Each parameter off its default about half the time."""
    some = st.integers(0, vocabulary - 1)
    bias = draw(st.dictionaries(some, st.sampled_from([-100.0, -1.5, 0.25, 3.0, 100.0]), max_size=6))
    return Adjust(
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])), **bias_of(bias),
        frequency_penalty=draw(st.sampled_from([0.0, 0.37, -1.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.9, -0.4])), min_tokens=draw(st.sampled_from([0, 0, 3, 9])),
        bad_words=tuple(map(pack, draw(st.lists(st.lists(some, min_size=1, max_size=3), max_size=4)))),
        allowed=pack(draw(st.sampled_from([[], [], [1, 3, vocabulary - 1], range(0, vocabulary, 2)]))))


@settings(deadline=None, max_examples=200)
@given(adjusts(), st.lists(ids, min_size=1, max_size=12), st.lists(st.lists(ids, min_size=1, max_size=4), max_size=5),
       st.lists(ids, max_size=4), st.lists(ids, max_size=3), st.integers(0, 2**32 - 1))
def test_every_row_meets_the_logits_of_the_specification(
        adjust: Adjust, prompt: list[int], commits: list[list[int]], drafts: list[int], stops: list[int],
        state: int) -> None:
    """The counts grow from commit to commit; rows of drafts in between leave nothing behind."""
    logits = (np.random.default_rng(state).standard_normal(SMALL) * 4).astype(np.float32)
    adjuster = Adjuster(request(prompt=prompt, adjust=adjust, stop_token_ids=tuple(stops)), len(prompt), SMALL)
    tokens = list(prompt)
    for commit in [*commits, []]:
        builder = Builder(SMALL)
        builder.add(1, adjuster, tokens, drafts)
        made = builder.build(fill_all)
        kernel.check_adjustments(made, 2 + len(drafts), SMALL)
        found = kernel.adjusted(np.tile(logits, (2 + len(drafts), 1)), made)
        assert (found[0] == logits).all()
        for count in range(len(drafts) + 1):
            answer = [*tokens[len(prompt):], *drafts[:count]]
            expected = specification.adjusted(logits, adjust, prompt, answer, stops)
            assert (found[1 + count].view(np.uint32) == expected.view(np.uint32)).all()
        tokens += commit


def adjusted_request(adjust: Adjust, **more: Any) -> Generate:
    return request(prompt=[5, 9, 5, 150, 151], max_tokens=24, adjust=adjust, stop_token_ids=(101,),
                   sampling=Sampling(temperature=1.0, seed=more.pop("seed", 3)), **more)


def drafted(wanted: Generate, truth: list[int], chooser: random.Random, **limits: Any) -> list[int]:
    """The stream with drafts that are right up to a random place."""
    bench = Bench(mock_decoder(), **({"step_tokens": 64} | limits))
    bench.add(wanted)
    prompt = len(wanted.tokens) // 4
    for _ in range(100):
        length = bench.scheduler.length_of(wanted.request_id)
        if length is None:
            break
        draft = truth[length - prompt:][:4]
        if draft and chooser.random() < 0.5:
            draft[chooser.randrange(len(draft))] = chooser.randrange(VOCABULARY)
        if draft:
            bench.scheduler.speculation.drafts.offer(Proposal(wanted.request_id, 1, length, pack(draft)))
        bench.scheduler.cost.observe(1, 0, 1.0)  # a step so long that every draft pays
        bench.step()
    assert bench.scheduler.speculation.accepted_draft_tokens > 0
    return bench.streams[wanted.request_id, 1]


@settings(deadline=None, max_examples=40)
@given(adjusts(VOCABULARY), st.integers(0, 1000))
def test_drafts_chunks_and_resubmission_change_no_token(adjust: Adjust, seed: int) -> None:
    wanted = adjusted_request(adjust, seed=seed)
    truth = plain(wanted)
    chooser = random.Random(seed)
    if len(truth) > 8:
        assert drafted(wanted, truth, chooser) == truth
    chunked = Bench(mock_decoder(), step_tokens=2, max_running=1)
    chunked.add(wanted)
    chunked.finish()
    assert chunked.streams[wanted.request_id, 1] == truth
    done = chooser.randrange(len(truth))
    rest = plain(adjusted_request(adjust, seed=seed, generated=truth[:done]))
    assert truth[:done] + rest == truth


def test_company_and_preemption_change_no_token() -> None:
    adjusts = [Adjust(repetition_penalty=1.4, presence_penalty=0.8), Adjust(allowed=pack([3, 7, 101, 160])),
               Adjust(min_tokens=20, bad_words=(pack([110]), pack([120, 121]))), None]
    wanted = [request(f"r{number}", prompt=[5, 9, number], max_tokens=24, adjust=adjust, stop_token_ids=(101,),
                      sampling=Sampling(temperature=1.0, seed=number)) for number, adjust in enumerate(adjusts * 2)]
    bench = Bench(mock_decoder(blocks=24), step_tokens=16, max_running=8)
    for one in wanted:
        bench.add(one)
    bench.finish()
    assert bench.scheduler.preemptions > 0
    for one in wanted:
        assert bench.streams[one.request_id, 1] == plain(one), one.request_id


def answer_to(adjust: Adjust, **more: Any) -> list[int]:
    return plain(adjusted_request(adjust, **more))


def test_only_allowed_ids_are_chosen() -> None:
    assert set(answer_to(Adjust(allowed=pack([7, 150, 199])))) <= {7, 150, 199}


def test_no_stop_token_before_min_tokens_and_then_it_counts() -> None:
    only_stops = Adjust(**bias_of({101: 100.0}))
    assert answer_to(only_stops) == [101]
    longer = answer_to(Adjust(min_tokens=6, biased=only_stops.biased, biases=only_stops.biases))
    assert len(longer) == 7 and longer[-1] == 101 and 101 not in longer[:-1]


def test_a_bad_word_is_never_completed() -> None:
    free = answer_to(Adjust(**bias_of({3: 0.5})), seed=9)
    word = free[4:6]
    kept = answer_to(Adjust(bad_words=(pack(word),)), seed=9)
    assert kept[:5] == free[:5] and kept[5] != free[5]
    assert all(kept[at:at + 2] != word for at in range(len(kept)))


def test_walls_stand_before_what_is_not_wanted() -> None:
    """Stop tokens are all that is allowed: the answer ends, though it was to be longer."""
    assert answer_to(Adjust(allowed=pack([101]), min_tokens=5)) == [101]
    mask = kernel.mask_of(np.array([101]), VOCABULARY)
    assert (without(mask, [101]) == mask).all()
    both = kernel.mask_of(np.array([7, 101]), VOCABULARY)
    assert (without(both, [101]) == kernel.mask_of(np.array([7]), VOCABULARY)).all()


@pytest.mark.parametrize("wrong", [
    Adjust(biased=pack([VOCABULARY]), biases=b"\0\0\0\0"), Adjust(biased=pack([3, 3]), biases=bytes(8)),
    Adjust(biased=pack([1])), Adjust(allowed=b"abc"),
    Adjust(bad_words=(pack([1] * 65),)), Adjust(bad_words=tuple(pack([1, id]) for id in range(257))),
    Adjust(bad_words=(b"",)), Adjust(bad_words=(pack([1, VOCABULARY]),)), Adjust(repetition_penalty=0.0),
    Adjust(presence_penalty=float("nan")), Adjust(allowed=pack([VOCABULARY]))])
def test_what_cannot_be_applied_is_refused_and_nothing_changes(wrong: Adjust) -> None:
    bench = Bench(mock_decoder())
    bench.add(adjusted_request(wrong))
    assert not bench.step()
    (end,) = bench.ends["r", 1]
    assert isinstance(end, Failed) and end.code == "invalid_request" and not end.retryable
    assert not bench.scheduler.waiting


def test_a_stream_that_asks_for_nothing_has_no_adjustments() -> None:
    bench = Bench(mock_decoder())
    bench.add(request())
    step = bench.scheduler.plan(0.0)
    assert step is not None and bench.batch.build(step).adjustments is None


def test_a_packed_bias_is_read_in_the_order_of_its_ids() -> None:
    adjust = Adjust(**bias_of({30: 1.0, 2: -1.0}))
    adjuster = Adjuster(request(adjust=adjust), 3, SMALL)
    found, values = adjuster.shifts([])
    assert (found.tolist(), values.tolist()) == ([2, 30], [-1.0, 1.0])
    assert unpack(adjust.biased) == [30, 2]


def test_what_is_unwanted_is_looked_up_and_not_searched_for_in_every_row() -> None:
    """A thousand stops and hundreds of long bad words held up every stream of every step."""
    words = (*(pack([7] * 60 + [id]) for id in range(8, 30)), pack([3]), pack([5, 6]))
    one = request(prompt=[1], adjust=Adjust(min_tokens=2, bad_words=words), stop_token_ids=(33, 31))
    adjuster = Adjuster(one, 1, SMALL)
    assert adjuster.unwanted([1], []) == [3, 31, 33]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.adjust._tail", lambda *given: pytest.fail("nothing of the kind was said"))
        assert adjuster.unwanted([1, 4, 6], []) == adjuster.unwanted([1, 4], [6]) == [3]
    assert adjuster.unwanted([1, 4], [5]) == [3, 6]
    assert adjuster.unwanted([1, *[7] * 60], []) == [3, *range(8, 30)]
