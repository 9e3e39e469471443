"""Tokens chosen in C++ are those of `shared/noise.py`."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.native.build import available, best_instructions
from kernels.native.decoder import NativeDecoder, load_library
from shared import noise
from tests.kernels.steps import mixed_sampling
from tests.kernels.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))


def native_choice(
    logits: NDArray[np.float32],
    seed: int,
    position: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    instructions: str | None = None,
) -> int:
    logits = np.ascontiguousarray(logits, np.float32)
    return int(
        load_library(instructions).mill_choose(
            ctypes.c_void_p(logits.ctypes.data), len(logits), temperature, top_k, top_p, min_p, seed, position
        )
    )


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**33),
    st.integers(1, 3000),
    st.sampled_from([0.0, 1e-6, 1e-5, 0.1, 0.7, 1.0, 2.5, 100.0]),
    st.sampled_from([0, 1, 2, 40, 5000]),
    st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.sampled_from(["portable", None]),
)
def test_a_choice_is_that_of_the_reference(
    state: int,
    seed: int,
    position: int,
    count: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    instructions: str | None,
) -> None:
    logits = (np.random.default_rng(state).standard_normal(count) * 4).astype(np.float32)
    expected = noise.choose(
        logits,
        seed,
        position,
        float(np.float32(temperature)),
        top_k,
        float(np.float32(top_p)),
        float(np.float32(min_p)),
    )
    assert native_choice(logits, seed, position, temperature, top_k, top_p, min_p, instructions) == expected


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = np.zeros(1000, np.float32)
    logits[[40, 300, 999]] = 2
    assert native_choice(logits, 0, 0, temperature=0.0) == 40
    assert native_choice(logits, 0, 0, temperature=1.0, top_k=1) == 40


def test_flat_logits_leave_the_choice_to_the_noise() -> None:
    logits = np.zeros(49152, np.float32)
    for seed in range(20):
        assert native_choice(logits, seed, 17) == int(np.argmax(noise.gumbel(seed, 17, np.arange(49152))))


def test_masked_ids_are_never_chosen() -> None:
    logits = np.full(500, -np.inf, np.float32)
    logits[[7, 450]] = [-900.0, -901.0]
    chosen = {native_choice(logits, seed, 3, temperature=1.5) for seed in range(50)}
    assert chosen == {7, 450}
    assert native_choice(logits, 0, 3, temperature=0.0) == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature,top_k", [(0.0, 0), (1.0, 0), (1.0, 5)])
def test_nothing_is_chosen_from_broken_logits(bad: float, temperature: float, top_k: int) -> None:
    logits = np.zeros(300, np.float32)
    logits[123] = bad
    assert native_choice(logits, 1, 1, temperature, top_k) == -1
    assert native_choice(np.full(300, -np.inf, np.float32), 1, 1, temperature, top_k) == -1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instructions", ["portable", best_instructions()])
def test_every_row_of_a_step_is_sampled_by_its_own_rules(tmp_path: Path, threads: int, instructions: str) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf"))
    decoder = NativeDecoder(checkpoint, blocks=4, threads=threads, instructions=instructions)
    inputs = mixed_sampling(0x123456789ABCDEF)
    expected = [
        noise.choose(
            logits,
            int(inputs.seeds[at]),
            int(inputs.positions[inputs.sample_rows[at]]) + 1,
            float(inputs.temperature[at]),
            int(inputs.top_k[at]),
            float(inputs.top_p[at]),
            float(inputs.min_p[at]),
        )
        for at, logits in enumerate(decoder.logits(inputs))
    ]
    assert decoder.step(inputs).tolist() == expected
