"""Law 1 on real weights: whatever the native engine does meanwhile, a request gives the tokens it gives alone."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.bench import exactness
from deploy.bench.exactness import CONDITIONS, Truth, alone, compare, complaints, make_requests
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.step import StepInputs
from shared.messages import Generate
from tests.models import default_folder, default_model
from worker.mock_decoder import MockDecoder

REQUESTS = 12
needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def requests() -> list[Generate]:
    folder = default_folder()
    return make_requests(Tokenizer.load(folder), load_card(folder).stop_token_ids, REQUESTS, seed=5)


@pytest.fixture(scope="module")
def native() -> Iterator[NativeDecoder]:
    decoder = NativeDecoder.load(default_model(), blocks=512, threads=1)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def truth(native: NativeDecoder, requests: list[Generate]) -> Truth:
    return alone(native, requests)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_request_gives_the_tokens_it_gives_alone(
    name: str, native: NativeDecoder, requests: list[Generate], truth: Truth
) -> None:
    condition = CONDITIONS[name]
    other = condition.threads != native.threads
    decoder = NativeDecoder.load(default_model(), blocks=512, threads=condition.threads) if other else native
    row = compare(name, requests, truth, condition.run(decoder, requests, truth, random.Random(5)))
    if other:
        decoder.close()
    assert row["tokens"] == sum(map(len, truth.values())) > 8 * REQUESTS
    assert complaints({"recipe": native.recipe, "rows": [row]}) == []


class Swayed(MockDecoder):
    """An engine that breaks law 1: in company it chooses the next token id."""

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        chosen = super().step(inputs)
        return chosen if len(inputs.sequence_starts) == 2 else (chosen + 1) % self.vocabulary_size


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_engine_that_its_company_sways_is_found_out(name: str, requests: list[Generate]) -> None:
    decoder = Swayed(blocks=512, block_size_tokens=16, vocabulary_size=49152, context_length=512)
    truth = alone(decoder, requests)
    row = compare(name, requests, truth, CONDITIONS[name].run(decoder, requests, truth, random.Random(5)))
    assert row["flips"] > 0 and row["different_tokens"] >= row["flips"]
    assert any("streams differ" in line for line in complaints({"recipe": "int8-but-wrong", "rows": [row]}))


def test_a_condition_that_did_not_take_place_is_no_proof() -> None:
    run = exactness.Run({}, exactness.Cover(steps=9))
    row = compare("preemption", [], {}, run)
    assert row["flips"] == 0
    assert "not tried" in complaints({"recipe": "int8-g32/1", "rows": [row]})[0]
