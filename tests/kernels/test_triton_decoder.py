"""A whole model over the Triton table gives the tokens and logits of the same model over the reference."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import ops
from kernels.decoder import TorchDecoder
from kernels.ops import Ops
from kernels.verify import nan_filled_memory
from tests.kernels.steps import generate, lay_out, step_inputs
from tests.kernels.tiny import write_tiny_gguf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (12, 5)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("triton") / "tiny.gguf")


def decoder_over(table: Ops, tiny: Path) -> TorchDecoder:
    decoder = TorchDecoder.load(tiny, blocks=20, device=DEVICE, ops=table)
    decoder.keys.fill_(torch.nan)
    decoder.values.fill_(torch.nan)
    return decoder


def test_a_prompt_and_a_draft_beside_it_have_the_logits_of_the_reference(tiny: Path) -> None:
    logits = []
    for table in (ops.triton(), ops.REFERENCE):
        decoder = decoder_over(table, tiny)
        long, short = lay_out(PROMPTS, 1, decoder)
        decoder.step(step_inputs([(long, 8)]))
        long.done = 8
        # Four rows that continue a sequence, as a draft would, beside a prompt.
        with nan_filled_memory():
            logits.append(decoder.logits(step_inputs([(long, 4), (short, 5)], sample=[[0, 1, 2, 3], [4]])))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_sampled_and_greedy_streams_are_those_of_the_reference(tiny: Path) -> None:
    chosen = []
    for table in (ops.triton(), ops.REFERENCE):
        decoder = decoder_over(table, tiny)
        parts = lay_out(PROMPTS, 2, decoder)
        parts[1].temperature, parts[1].seed, parts[1].top_p = 0.8, 2**63 + 5, 0.95
        generate(decoder, parts, 2)
        chosen.append([part.chosen for part in parts])
    assert chosen[0] == chosen[1]
