"""Adjusted logits are the same bits from numpy, torch and C++, and change nothing of other rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.adjust import adjusted, allowed_ids, check_adjustments, mask_of
from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.build import available, best_instructions
from kernels.native.decoder import NativeDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import Adjustments, Decoder, StepInputs
from shared import noise
from tests.kernels.steps import mixed_sampling
from tests.kernels.tiny import write_tiny_gguf

compiled = pytest.mark.skipif(available() is not None, reason=str(available()))


def random_adjustments(random: np.random.Generator, samples: int, vocabulary: int, masks: int = 2) -> Adjustments:
    """Of about half the rows; some without ids, some without a mask."""
    rows = np.flatnonzero(random.random(samples) < 0.5).astype(np.int32)
    counted = [random.permutation(vocabulary)[: random.integers(0, vocabulary // 2)] for _ in rows]
    shifted = [random.permutation(vocabulary)[: random.integers(0, 20)] for _ in rows]
    shifts = random.choice(np.array([-100, -1.5, 0.3, 100, -np.inf], np.float32), sum(map(len, shifted)))

    def starts(parts: list[Any]) -> Any:
        return np.cumsum([0, *map(len, parts)]).astype(np.int32)

    return Adjustments(
        samples=rows,
        repetition=random.choice(np.array([1, 1.3, 0.8], np.float32), len(rows)),
        frequency=random.choice(np.array([0, 0.37, -2], np.float32), len(rows)),
        presence=random.choice(np.array([0, 1.1, -0.7], np.float32), len(rows)),
        count_starts=starts(counted),
        counted=np.concatenate([np.zeros(0), *counted]).astype(np.int32),
        counts=random.integers(0, 5, sum(map(len, counted))).astype(np.int32),
        shift_starts=starts(shifted),
        shifted=np.concatenate([np.zeros(0), *shifted]).astype(np.int32),
        shifts=shifts,
        mask_of=random.integers(-1, masks, len(rows)).astype(np.int32),
        masks=random.integers(0, 2**32, (masks, -(-vocabulary // 32)), np.uint32),
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([33, 64, 257]))
def test_torch_gives_the_bits_of_numpy(state: int, vocabulary: int) -> None:
    random = np.random.default_rng(state)
    logits = (random.standard_normal((6, vocabulary)) * 5).astype(np.float32)
    adjustments = random_adjustments(random, 6, vocabulary)
    check_adjustments(adjustments, 6, vocabulary)
    expected = adjusted(logits, adjustments)
    found = reference.adjust_logits(torch.from_numpy(logits), adjustments).numpy()
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()
    others = np.setdiff1d(np.arange(6), adjustments.samples)
    assert (expected[others] == logits[others]).all()


def expected_tokens(decoder: Decoder, inputs: StepInputs) -> list[int]:
    """By the raw logits, `adjusted` and the specification of the noise."""
    logits = decoder.logits(inputs)
    if inputs.adjustments is not None:
        logits = adjusted(logits, inputs.adjustments)
    return [
        noise.choose(
            row,
            int(inputs.seeds[at]),
            int(inputs.positions[inputs.sample_rows[at]]) + 1,
            float(inputs.temperature[at]),
            int(inputs.top_k[at]),
            float(inputs.top_p[at]),
            float(inputs.min_p[at]),
        )
        for at, row in enumerate(logits)
    ]


@compiled
@pytest.mark.parametrize("instructions", ["portable", best_instructions()])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_native_step_adjusts_each_row_by_its_own_rules(tmp_path: Path, threads: int, instructions: str) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    decoder = NativeDecoder(checkpoint, blocks=4, threads=threads, instructions=instructions)
    different = 0
    for state in range(30):
        plain = mixed_sampling(0x123456789 + state)
        adjustments = random_adjustments(np.random.default_rng(state), len(plain.sample_rows), 256)
        inputs = replace(plain, adjustments=adjustments)
        found = decoder.step(inputs).tolist()
        assert found == expected_tokens(decoder, inputs)
        different += found != decoder.step(plain).tolist()
    assert different > 20


@pytest.mark.parametrize("kind", [TorchDecoder, UncompiledDecoder])
def test_a_step_without_a_compiler_does_too(tmp_path: Path, kind: Any) -> None:
    decoder = kind(open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf")), blocks=4)
    for state in range(3):
        plain = mixed_sampling(0x123456789 + state)
        adjustments = random_adjustments(np.random.default_rng(state), len(plain.sample_rows), 256)
        inputs = replace(plain, adjustments=adjustments)
        assert decoder.step(inputs).tolist() == expected_tokens(decoder, inputs)


def test_a_mask_allows_the_ids_it_was_made_of() -> None:
    mask = mask_of(np.array([0, 31, 32, 70]), 71)
    assert np.flatnonzero(allowed_ids(mask, 71)).tolist() == [0, 31, 32, 70]
    assert allowed_ids(mask, 130).sum() == 4  # ids without a bit are not allowed


BAD: list[dict[str, Any]] = [
    {"samples": np.array([3, 3], np.int32)},
    {"samples": np.array([3, 20], np.int32)},
    {"counted": np.array([256], np.int32)},
    {"counts": np.array([-1], np.int32)},
    {"count_starts": np.array([0, 2, 1], np.int32)},
    {"shifts": np.array([np.nan], np.float32)},
    {"shifts": np.array([np.inf], np.float32)},
    {"repetition": np.array([0, 1], np.float32)},
    {"presence": np.array([np.inf, 1], np.float32)},
    {"mask_of": np.array([-2, 0], np.int32)},
    {"mask_of": np.array([1, 0], np.int32)},
    {"mask_of": np.array([0], np.int32)},
    {"frequency": np.zeros(2)},
]


@pytest.mark.parametrize("wrong", BAD)
def test_adjustments_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    good = Adjustments(
        samples=np.array([3, 5], np.int32),
        repetition=np.ones(2, np.float32),
        frequency=np.zeros(2, np.float32),
        presence=np.zeros(2, np.float32),
        count_starts=np.array([0, 0, 1], np.int32),
        counted=np.array([255], np.int32),
        counts=np.array([1], np.int32),
        shift_starts=np.array([0, 1, 1], np.int32),
        shifted=np.array([0], np.int32),
        shifts=np.array([-np.inf], np.float32),
        mask_of=np.array([-1, 0], np.int32),
        masks=np.full((1, 8), 2**32 - 1, np.uint32),
    )
    check_adjustments(good, 20, 256)
    inputs = replace(mixed_sampling(1), adjustments=replace(good, **wrong))
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    decoders: list[Decoder] = [UncompiledDecoder(checkpoint, blocks=4), TorchDecoder(checkpoint, blocks=4)]
    if available() is None:
        decoders.append(NativeDecoder(checkpoint, blocks=4, threads=1))
    for decoder in decoders:
        with pytest.raises(ValueError):
            decoder.step(inputs)


def test_a_row_whose_every_id_is_masked_fails(tmp_path: Path) -> None:
    nothing = np.zeros((1, 8), np.uint32)
    all_masked = Adjustments(
        samples=np.array([3], np.int32),
        repetition=np.ones(1, np.float32),
        frequency=np.zeros(1, np.float32),
        presence=np.zeros(1, np.float32),
        count_starts=np.zeros(2, np.int32),
        counted=np.zeros(0, np.int32),
        counts=np.zeros(0, np.int32),
        shift_starts=np.zeros(2, np.int32),
        shifted=np.zeros(0, np.int32),
        shifts=np.zeros(0, np.float32),
        mask_of=np.zeros(1, np.int32),
        masks=nothing,
    )
    inputs = replace(mixed_sampling(1), adjustments=all_masked)
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    decoders: list[Decoder] = [UncompiledDecoder(checkpoint, blocks=4)]
    if available() is None:
        decoders.append(NativeDecoder(checkpoint, blocks=4, threads=1))
    for decoder in decoders:
        with pytest.raises(RuntimeError, match="every id of a row is masked"):
            decoder.step(inputs)
