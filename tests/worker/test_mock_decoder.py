"""The mock says what a model would, and notices what a model would only mumble about."""

import numpy as np
import pytest

from kernels.step import StepInputs
from worker.mock_decoder import MockDecoder

BLOCK = 4


def decoder() -> MockDecoder:
    return MockDecoder(blocks=16, block_size_tokens=BLOCK, vocabulary_size=1000, context_length=64)


def inputs(tokens: list[int], table: list[int], start: int = 0, sampled: int = 1, temperature: float = 0.0,
           seed: int = 0) -> StepInputs:
    rows = len(tokens)
    return StepInputs(
        np.array(tokens, np.int32), np.arange(start, start + rows, dtype=np.int32), np.array([0, rows], np.int32),
        np.array([table], np.int32), np.arange(rows - sampled, rows, dtype=np.int32),
        np.full(sampled, temperature, np.float32), np.zeros(sampled, np.int32), np.ones(sampled, np.float32),
        np.zeros(sampled, np.float32), np.full(sampled, seed, np.uint64))


def test_a_prompt_in_parts_gives_what_the_whole_gives() -> None:
    tokens = list(range(100, 119))
    whole = decoder().step(inputs(tokens, [3, 1, 4, 2, 5], sampled=19)).tolist()
    for cut in range(1, 19):
        parts = decoder()
        got = parts.step(inputs(tokens[:cut], [0, 1, 2, 3, 4], sampled=cut)).tolist()
        got += parts.step(inputs(tokens[cut:], [0, 1, 2, 3, 4], start=cut, sampled=19 - cut)).tolist()
        assert got == whole


def test_every_earlier_token_and_block_matters() -> None:
    tokens = list(range(100, 119))
    streams = set()
    for place in range(-1, 18):
        changed = [token + (100 if index == place else 0) for index, token in enumerate(tokens)]
        streams.add(tuple(answers(decoder(), changed, list(range(16)))))
    assert len(streams) == 19


def answers(mock: MockDecoder, tokens: list[int], table: list[int], temperature: float = 0.0, seed: int = 0,
            ) -> list[int]:
    tokens = list(tokens)
    start = 0
    answer = []
    while len(tokens) <= len(table) * BLOCK:
        token = int(mock.step(inputs(tokens[start:], table, start, 1, temperature, seed))[0])
        start = len(tokens)
        tokens.append(token)
        answer.append(token)
    return answer


def test_a_block_swapped_behind_its_back_changes_the_stream() -> None:
    tokens = list(range(100, 113))
    right, wrong = decoder(), decoder()
    right.step(inputs(tokens, [0, 1, 2, 3, 4, 5, 6, 7]))
    wrong.step(inputs(tokens, [0, 1, 2, 3, 4, 5, 6, 7]))
    table = [0, 9, 2, 3, 4, 5, 6, 7]
    first, second = [], []
    for position in range(13, 32):
        first.append(int(right.step(inputs([500], [0, 1, 2, 3, 4, 5, 6, 7], position))[0]))
        second.append(int(wrong.step(inputs([500], table, position))[0]))
    assert first != second


def test_few_streams_row_by_row_say_what_many_say_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(100 + number, 113 + number)) for number in range(3)]
    for temperature in (0.0, 1.0):
        few = [answers(decoder(), prompt, list(range(8)), temperature, 7) for prompt in prompts]
        with monkeypatch.context() as patch:
            patch.setattr("worker.mock_decoder.FEW", 0)
            assert [answers(decoder(), prompt, list(range(8)), temperature, 7) for prompt in prompts] == few


def test_the_seed_matters_when_sampling_and_only_then() -> None:
    greedy = {tuple(answers(decoder(), [5], list(range(8)), 0.0, seed)) for seed in range(5)}
    sampled = {tuple(answers(decoder(), [5], list(range(8)), 1.0, seed)) for seed in range(5)}
    assert len(greedy) == 1
    assert len(sampled) == 5


def test_control_tokens_never_come_out() -> None:
    mock = decoder()
    assert min(token for prompt in range(50) for token in answers(mock, [prompt], list(range(8)))) >= 64


def test_logits_point_at_the_chosen_token() -> None:
    step = inputs([1, 2, 3], [0], sampled=3)
    assert decoder().logits(step).argmax(axis=1).tolist() == decoder().step(step).tolist()


@pytest.mark.parametrize(("step", "message"), [
    (inputs([1000], [0]), "vocabulary"),
    (inputs([1], [0, -1], 5), "hole"),
    (inputs([1], [16]), "hole"),
    (inputs([1], [0], 4), "shorter"),
    (inputs([1], list(range(16)), 64), "context"),
])
def test_what_would_corrupt_memory_is_an_error(step: StepInputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder().step(step)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_streak_says_what_steps_say_one_by_one_and_leaves_the_same_cache(temperature: float) -> None:
    prompts = [list(range(100 + number, 109 + 2 * number)) for number in range(3)]
    tables, lengths = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], [1, 4, 7]
    by_step, at_once = decoder(), decoder()
    stepped = []
    for prompt, table, length in zip(prompts, tables, lengths, strict=True):
        at_once.step(inputs(prompt, table))
        tokens, start = list(prompt), 0
        for _ in range(length + 1):
            tokens.append(int(by_step.step(inputs(tokens[start:], table, start, 1, temperature, 7))[0]))
            start = len(tokens) - 1
        stepped.append(tokens[len(prompt):])
    firsts = [tokens[0] for tokens in stepped]
    together = StepInputs(
        np.array(firsts, np.int32), np.array([len(prompt) for prompt in prompts], np.int32),
        np.arange(4, dtype=np.int32), np.array(tables, np.int32), np.arange(3, dtype=np.int32),
        np.full(3, temperature, np.float32), np.zeros(3, np.int32), np.ones(3, np.float32),
        np.zeros(3, np.float32), np.full(3, 7, np.uint64))
    assert at_once.streak(together, lengths) == [tokens[1:] for tokens in stepped]
    for block in range(15):
        told, known = np.zeros(at_once.block_bytes, np.uint8), np.zeros(by_step.block_bytes, np.uint8)
        at_once.read_block(block, told)
        by_step.read_block(block, known)
        assert (told == known).all()


def test_a_streak_stays_in_its_blocks_and_its_context() -> None:
    for start, table, length in ((11, [0, 1, 2], 2), (3, [0, -1, 2], 2), (62, list(range(16)), 3)):
        mock = decoder()
        with pytest.raises(ValueError, match=r"position or a block"):
            mock.streak(inputs([500], table, start), [length])
