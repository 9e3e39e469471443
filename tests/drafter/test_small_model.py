"""A small model drafts what it would say itself under the target's noise, and computes nothing twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drafter.drafting import Ask, Key, Stream
from drafter.hybrid import HybridDraftsman
from drafter.kinds import draftsman_of
from drafter.small_model import ABSORB_ROWS, ModelDraftsman, load
from drafter.suffix import SuffixDraftsman
from kernels.native.build import available
from shared.messages import Sampling
from shared.settings import DrafterSettings
from tests.drafter.small_models import FOREVER, S, asked, decoder_of, drafting, said, write_model

# at which the noise decides about as often as it does with a trained model at 1
HOT = 5.0
SAMPLINGS = [Sampling(temperature=0.0), Sampling(temperature=HOT, seed=2**63 + 9),
             Sampling(temperature=HOT, seed=5, top_k=20, top_p=0.9, min_p=0.01)]
PROMPT = [5, 6, 7, 80, 91, 200, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def decoder(folder: Path) -> Any:
    return decoder_of(folder)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_drafter_whose_model_is_the_target_is_never_wrong(folder: Path, decoder: Any, sampling: Sampling) -> None:
    truth = said(decoder_of(folder), PROMPT, 120, sampling)
    assert len(truth) == 120
    draftsman = drafting(decoder, PROMPT, sampling)
    at, random, right = 0, Random(1), 0
    while at < 100:
        (found,) = asked(draftsman)
        assert found.base == len(PROMPT) + at
        assert list(found.tokens) == truth[at:at + len(found.tokens)]
        right += len(found.tokens)
        step = random.randint(1, len(found.tokens) + 1)
        draftsman.advance(S, found.base, truth[at:at + step])
        at += step
    assert right > 100
    assert draftsman.lines.margins.recall == [0.3, 0.12]


def test_with_another_seed_or_temperature_it_is_another_race(folder: Path, decoder: Any) -> None:
    sampling = Sampling(temperature=HOT, seed=4)
    truth = said(decoder_of(folder), PROMPT, 8, sampling)

    def guesses(other: Sampling, factor: float) -> list[int]:
        draftsman = drafting(decoder, PROMPT, other, factor)
        while len(draftsman.lines[S].chain) < 8:
            asked(draftsman)
            draftsman.lines.margins.of = lambda margin, noisy: 0.99  # type: ignore[method-assign]
        return [guess.token for guess in draftsman.lines[S].chain]

    assert guesses(sampling, 1.0) == truth
    assert guesses(Sampling(temperature=HOT, seed=5), 1.0) != truth
    assert guesses(sampling, 0.3) != truth


def test_a_draft_temperature_of_zero_drafts_greedily(decoder: Any) -> None:
    greedy = asked(drafting(decoder, PROMPT, Sampling(temperature=0.0)))
    cold = asked(drafting(decoder, PROMPT, Sampling(temperature=HOT, seed=77), draft_temperature=0.0))
    assert [one.tokens for one in cold] == [one.tokens for one in greedy]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_of_the_cache_gives_what_computing_it_again_gives(folder: Path, seed: int) -> None:
    """Streams go on as guessed, as a branch guessed, or as nobody guessed; after each step a newcomer says the same."""
    random = Random(seed)
    sampling = Sampling(temperature=random.choice([0.0, HOT]), seed=seed)
    text = [random.randrange(256) for _ in range(random.randint(1, 40))]
    draftsman = drafting(decoder_of(folder), text, sampling)
    branched = 0
    for _ in range(40):
        found = asked(draftsman, length=random.randint(1, 10), branches=3)
        chain = [guess.token for guess in draftsman.lines[S].chain]
        fresh = drafting(decoder_of(folder), text, sampling)
        asked(fresh, length=10)
        again = [guess.token for guess in fresh.lines[S].chain]
        both = min(len(chain), len(again))
        assert both and chain[:both] == again[:both]
        branches = [one for one in found if one.assumed]
        if branches and random.random() < 0.5:
            one = random.choice(branches)
            new = [*one.assumed, *one.tokens[:random.randint(0, 2)]]
            branched += 1
        else:
            new = chain[:random.randint(0, len(chain))] + [random.randrange(256)] * random.randint(0, 2) or [1]
        draftsman.advance(S, len(text), new)
        draftsman.lines.audit()
        text += new
    assert branched > 3


def test_only_what_the_stream_rejected_is_computed_again(decoder: Any) -> None:
    draftsman = drafting(decoder, PROMPT * 5, Sampling(temperature=0.0))
    asked(draftsman, length=1)
    assert draftsman.rows == len(PROMPT * 5)
    chain = [guess.token for guess in draftsman.lines[S].chain]
    draftsman.advance(S, 35, [(chain[0] + 1) % 256])
    asked(draftsman, length=1)
    assert draftsman.rows == 35 + 1
    draftsman.advance(S, 36, [draftsman.lines[S].chain[0].token])
    asked(draftsman, length=1)
    assert draftsman.rows == 35 + 2
    # what was guessed and came true is not asked of the model again
    asked(draftsman, length=3)
    rows, chain = draftsman.rows, [guess.token for guess in draftsman.lines[S].chain]
    draftsman.advance(S, 37, chain[:2])
    asked(draftsman, length=1)
    assert draftsman.rows == rows


def test_an_outcome_that_was_prepared_for_is_there_at_once(decoder: Any) -> None:
    draftsman = drafting(decoder, PROMPT, Sampling(temperature=HOT, seed=3))
    found = asked(draftsman, length=6, branches=4)
    branches = [one for one in found if one.assumed]
    assert branches and all(0 < one.likely < 1 and len(one.assumed) for one in branches)
    assert [one.likely for one in branches] == sorted((one.likely for one in branches), reverse=True)
    one = branches[0]
    rows = draftsman.rows
    draftsman.advance(S, len(PROMPT), list(one.assumed))
    (said_then,) = asked(draftsman, length=len(one.tokens))
    assert list(said_then.tokens) == list(one.tokens)
    assert draftsman.rows == rows


def test_a_prompt_is_taken_in_piece_by_piece(decoder: Any) -> None:
    random = Random(8)
    tokens = [random.randrange(256) for _ in range(200)]
    draftsman = ModelDraftsman(decoder, "abcd")
    keys = [Key("w0", str(number), 1) for number in range(4)]
    for key in keys:
        draftsman.open(key, Stream(tokens, 200, Sampling(temperature=0.0)))
    asks = [Ask(key, 4) for key in keys]
    answered, rounds = [], 0
    while len(answered) < 4:
        before = draftsman.rows
        answered = [one.key for one in draftsman.propose(asks, FOREVER) if not one.assumed]
        assert draftsman.rows - before <= ABSORB_ROWS + 4 * 4
        assert set(draftsman.behind) == set(keys[len(answered):])
        rounds += 1
    assert rounds == 4
    draftsman.close(keys[0], None)
    assert keys[0] not in draftsman.behind


def test_more_streams_than_the_cache_holds_cost_time_and_nothing_else(folder: Path) -> None:
    """Blocks for three streams, and eight of them in turns."""
    truth_of, draftsman = decoder_of(folder), ModelDraftsman(decoder_of(folder, blocks=12), "abcd")
    random = Random(2)
    texts = {Key("w0", str(number), 1): [random.randrange(256) for _ in range(40)] for number in range(8)}
    truths = {}
    for number, (key, text) in enumerate(texts.items()):
        sampling = Sampling(temperature=HOT, seed=number)
        truths[key] = said(truth_of, text, 30, sampling)
        draftsman.open(key, Stream(text, 40, sampling))
    position = dict.fromkeys(texts, 0)
    for _ in range(60):
        key = random.choice(list(texts))
        (found,) = [one for one in asked(draftsman, length=6, branches=2, key=key) if not one.assumed]
        at = position[key]
        assert list(found.tokens) == truths[key][at:at + len(found.tokens)]
        draftsman.advance(key, found.base, truths[key][at:at + 1])
        position[key] = min(20, at + 1)
        if position[key] == 20:
            draftsman.close(key, None)
            draftsman.open(key, Stream(texts[key], 40, Sampling(temperature=HOT, seed=int(key.request_id))))
            position[key] = 0
        draftsman.lines.audit()
    assert draftsman.lines.computed_again > 0
    # asked for all at once, those that do not fit say nothing
    found = draftsman.propose([Ask(key, 6) for key in texts], FOREVER)
    assert len({one.key for one in found}) == 3
    draftsman.lines.audit()
    for key in texts:
        draftsman.close(key, None)
    assert draftsman.lines.free == 12


def test_of_a_text_that_is_longer_than_the_context_nothing_is_said(decoder: Any) -> None:
    draftsman = drafting(decoder, [1] * 250, Sampling(temperature=0.0))
    assert asked(draftsman, length=6) == []
    assert asked(draftsman, length=5)[0].base == 250


def trimmed(folder: Path, whole: Path, ids: list[int]) -> Path:
    folder.mkdir()
    weights = load_file(whole / "model.safetensors")
    weights["lm_head.weight"] = np.ascontiguousarray(weights["lm_head.weight"][ids])
    save_file(weights, folder / "model.safetensors")
    for name in ("config.json", "card.json"):
        (folder / name).write_text((whole / name).read_text())
    (folder / "d2t.json").write_text(json.dumps(ids))
    return folder


def test_a_trimmed_head_speaks_the_targets_ids(tmp_path: Path) -> None:
    """Where the target says what the head knows, it is as right as the whole model is: never wrong."""
    whole = write_model(tmp_path / "whole", tied_head=False)
    sampling = Sampling(temperature=HOT, seed=12)
    truth = said(decoder_of(whole), PROMPT, 100, sampling)
    random = Random(3)
    ids = sorted(set(truth[::2]) | set(random.sample(range(256), 60)))
    draftsman = drafting(decoder_of(trimmed(tmp_path / "part", whole, ids)), PROMPT, sampling)
    known = wrong = 0
    for at, token in enumerate(truth[:90]):
        asked(draftsman, length=1)
        guess = draftsman.lines[S].chain[0].token
        assert guess in ids
        known += token in ids
        wrong += token in ids and guess != token
        draftsman.advance(S, len(PROMPT) + at, [token])
    assert 40 < known < 90
    assert wrong == 0


def test_a_round_ends_when_its_time_is_up(decoder: Any) -> None:
    ticks = iter(range(10**6))
    draftsman = ModelDraftsman(decoder, "abcd", clock=lambda: float(next(ticks)))
    draftsman.open(S, Stream(PROMPT, 7, Sampling(temperature=0.0)))
    draftsman.lines.margins.of = lambda margin, noisy: 0.99  # type: ignore[method-assign]
    draftsman.propose([Ask(S, 64)], 0.5)
    assert len(draftsman.lines[S].chain) == 1
    draftsman.propose([Ask(S, 64)], 1e3)
    assert len(draftsman.lines[S].chain) == 64


def test_a_chain_goes_no_further_than_it_pays(decoder: Any) -> None:
    def length(budget_s: float, right: float) -> int:
        draftsman = ModelDraftsman(decoder, "abcd", clock=lambda: 0.0)
        draftsman.open(S, Stream(PROMPT, 7, Sampling(temperature=0.0)))
        draftsman.step_s = 1.0
        draftsman.lines.margins.of = lambda margin, noisy: right  # type: ignore[method-assign]
        ran = draftsman._run

        def run_and_keep(parts: Any) -> None:
            ran(parts)
            draftsman.step_s = 1.25 if draftsman.step_s < 1.1 else 1.0

        draftsman._run = run_and_keep  # type: ignore[method-assign]
        draftsman.propose([Ask(S, 40)], budget_s)
        return len(draftsman.lines[S].chain)

    assert length(1.0, 0.5) == 1
    assert 1 < length(6.0, 0.5) <= length(6.0, 0.9) < length(60.0, 0.9) <= 40


@pytest.fixture
def settings(folder: Path) -> Iterator[DrafterSettings]:
    engine = "cpu" if available() is None else "reference"
    yield DrafterSettings(kind="model", model=str(folder), kv_mib=1, engine=engine)


def test_a_model_is_loaded_with_its_vocabulary(settings: DrafterSettings) -> None:
    draftsman = draftsman_of(settings)
    assert isinstance(draftsman, ModelDraftsman)
    assert (draftsman.kind, draftsman.vocabulary, draftsman.threaded) == ("model", "abcd", True)
    # a megabyte of a tiny model's keys and values
    assert 0 < draftsman.lines.free <= 1 << 20


def test_a_model_that_does_not_say_what_it_speaks_is_refused(settings: DrafterSettings, tmp_path: Path) -> None:
    from msgspec.structs import replace

    with pytest.raises(ValueError, match=r"no card\.json.*tokenmill distil"):
        load(replace(settings, model=str(tmp_path)))
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="is no model card"):
        load(replace(settings, model=str(tmp_path)))
    (tmp_path / "card.json").write_text('{"vocabulary": "abcd"}')
    with pytest.raises(ValueError, match="holds no model"):
        load(replace(settings, model=str(tmp_path)))
    with pytest.raises(ValueError, match="engine is 'abacus'"):
        load(replace(settings, engine="abacus"))
    with pytest.raises(ValueError, match="draft_temperature"):
        load(replace(settings, draft_temperature=-1.0))


def test_a_hybrid_of_both_is_right_where_either_is(folder: Path) -> None:
    sampling = Sampling(temperature=HOT, seed=6)
    truth = said(decoder_of(folder), PROMPT, 60, sampling)
    hybrid = HybridDraftsman(SuffixDraftsman(), ModelDraftsman(decoder_of(folder), "abcd"))
    hybrid.open(S, Stream(PROMPT, 7, sampling))
    right = 0
    for at in range(50):
        found = [one for one in hybrid.propose([Ask(S, 4)], FOREVER) if not one.assumed]
        right += bool(found) and found[0].tokens[0] == truth[at]
        hybrid.advance(S, 7 + at, [truth[at]])
    assert right > 45


def test_a_stream_that_says_an_id_which_the_model_lacks_is_left_out_and_others_are_drafted(decoder: Any) -> None:
    """A target of the same tokenizer may have a wider embedding."""
    draftsman = drafting(decoder, [5, 310, 7], Sampling(temperature=0.0))
    other = Key("w0", "other", 1)
    draftsman.open(other, Stream(PROMPT, len(PROMPT), Sampling(temperature=0.0)))
    found = draftsman.propose([Ask(S, 8), Ask(other, 8)], FOREVER)
    assert {one.key for one in found} == {other}
    draftsman.advance(other, len(PROMPT), [decoder.vocabulary_size])
    assert draftsman.propose([Ask(S, 8), Ask(other, 8)], FOREVER) == []
    assert not draftsman.behind


@pytest.mark.parametrize("length", [4, 8, 18])
def test_no_branch_goes_past_the_context(decoder: Any, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that are rarely right make many branches, also at the end of a long chain."""
    highest, race = 0, decoder.race

    def watched(inputs: Any, places: int) -> Any:
        nonlocal highest
        highest = max(highest, int(inputs.positions.max()))
        return race(inputs, places)

    monkeypatch.setattr(decoder, "race", watched)
    branches = 0
    for tokens in range(decoder.context_length - length - 9, decoder.context_length - length):
        draftsman = drafting(decoder, [5] * tokens, Sampling(temperature=HOT, seed=3))
        monkeypatch.setattr(draftsman.lines.margins, "of", lambda margin, noisy: 0.8)
        monkeypatch.setattr(draftsman.lines.margins, "recall", [0.6, 0.3])
        branches += len([one for one in asked(draftsman, length, 4) if one.assumed])
        for branch in draftsman.lines[S].branches.values():
            assert branch.position + len(branch.chain) <= decoder.context_length
    assert branches > 4
    assert decoder.context_length - 12 < highest < decoder.context_length
