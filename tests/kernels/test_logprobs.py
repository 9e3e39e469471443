"""How likely tokens were: the same from every decoder, whatever is asked beside it and however rows are adjusted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.logprobs import fill
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import Logprobs
from tests.kernels.steps import mixed_sampling
from tests.kernels.test_adjust import random_adjustments
from tests.kernels.tiny import Tiny, write_tiny_gguf

needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))
SAMPLES, TARGETS = [0, 3, 4, 11, 19], [-1, 7, -1, 0, -1]


def one_thread(checkpoint: Any, blocks: int) -> NativeDecoder:
    return NativeDecoder(checkpoint, blocks=blocks, threads=1)


def two_threads(checkpoint: Any, blocks: int) -> NativeDecoder:
    return NativeDecoder(checkpoint, blocks=blocks, threads=2)


DECODERS = [pytest.param(one_thread, marks=needs_compiler), pytest.param(two_threads, marks=needs_compiler),
            UncompiledDecoder, TorchDecoder]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("most", [0, 5])
@pytest.mark.parametrize("adjusted", [False, True])
def test_a_step_says_how_likely_tokens_were_in_its_raw_logits(tmp_path: Path, kind: Any, most: int, adjusted: bool
                                                               ) -> None:
    decoder = kind(open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf", Tiny(vocabulary=250))), blocks=4)
    inputs = mixed_sampling(3)
    if adjusted:
        inputs = replace(inputs, adjustments=random_adjustments(np.random.default_rng(1), 20, 250))
    plain = decoder.step(inputs)
    asked = replace(inputs, logprobs=Logprobs.asked(SAMPLES, TARGETS, most))
    assert (decoder.step(asked) == plain).all()
    found, expected = asked.logprobs, Logprobs.asked(SAMPLES, TARGETS, most)
    assert found is not None
    fill(expected, decoder.logits(inputs), plain)
    assert np.abs(found.of_target - expected.of_target).max() < 2e-6
    assert (found.ranks == expected.ranks).all() and (found.ranks > 1).any()
    assert (found.top_ids == expected.top_ids).all()
    if most:
        assert np.abs(found.top - expected.top).max() < 2e-6
        assert (np.diff(found.top) <= 0).all()


@needs_compiler
def test_the_answer_of_a_row_does_not_depend_on_what_is_asked_beside_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    found = []
    for threads in (1, 2):
        decoder = NativeDecoder(checkpoint, blocks=4, threads=threads)
        for samples, targets in ((SAMPLES, TARGETS), ([11], [0])):
            asked = Logprobs.asked(samples, targets, 3)
            decoder.step(replace(mixed_sampling(3), logprobs=asked))
            at = samples.index(11)
            found.append((asked.of_target[at].tobytes(), asked.top[at].tobytes(), asked.top_ids[at].tobytes()))
    assert len(set(found)) == 1


def test_equal_logits_rank_by_id() -> None:
    logits = np.zeros((1, 40), np.float32)
    logits[0, 30] = 1.0
    asked = Logprobs.asked([0], [-1], 4)
    fill(asked, logits, np.array([5], np.int32))
    assert asked.top_ids.tolist() == [[30, 0, 1, 2]] and asked.ranks.tolist() == [7]
    assert np.isclose(np.exp(asked.top[0, 0]) + 39 * np.exp(asked.of_target[0]), 1)


@pytest.mark.parametrize("wrong", [
    Logprobs.asked([3, 3], [0, 0], 1), Logprobs.asked([20], [0], 1), Logprobs.asked([0], [256], 1),
    Logprobs.asked([0], [-2], 1), Logprobs.asked([0], [0], 300),
    replace(Logprobs.asked([0], [0], 1), ranks=np.zeros(2, np.int32))])
def test_a_question_that_does_not_fit_is_refused(tmp_path: Path, wrong: Logprobs) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    decoders: list[Any] = [UncompiledDecoder(checkpoint, blocks=4), TorchDecoder(checkpoint, blocks=4)]
    if available() is None:
        decoders.append(one_thread(checkpoint, 4))
    for decoder in decoders:
        with pytest.raises(ValueError):
            decoder.step(replace(mixed_sampling(1), logprobs=wrong))
