"""The float32 decoder chooses the tokens that Hugging Face transformers chooses from the same weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.decoder import TorchDecoder
from tests.kernels.steps import generate, lay_out
from tests.models import default_model

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_135m.json").read_text())
CASES = GOLDEN["cases"]
NEW_TOKENS = 48


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Beside other busy processes, two threads that wait for each other are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_tokens_are_those_of_transformers_through_the_paged_cache(one_thread: None):
    assert len(CASES) == 20
    decoder = TorchDecoder.load(default_model())
    parts = lay_out([case["prompt"] for case in CASES], NEW_TOKENS, decoder)
    generate(decoder, parts, NEW_TOKENS)
    differing = []
    for case, part in zip(CASES, parts, strict=True):
        for index, (expected, chosen) in enumerate(zip(case["output"], part.chosen, strict=True)):
            if expected != chosen:
                gap = case["gaps"][index]
                differing.append(f"{case['name']}: token {index} is {chosen}, not {expected}, gap {gap}")
                break
    assert not differing, "\n".join(differing)
