"""Law 1 on real weights within each KV format: equal recipes give equal tokens, and only they."""

import random
from collections.abc import Iterator

import pytest

from deploy.bench.exactness import CONDITIONS, Truth, alone, compare, complaints, make_requests
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from shared.messages import Generate
from tests.models import default_folder, default_model

REQUESTS = 12

pytestmark = [pytest.mark.skipif(available() is not None, reason=str(available())), pytest.mark.slow]


@pytest.fixture(scope="module")
def requests() -> list[Generate]:
    folder = default_folder()
    return make_requests(Tokenizer.load(folder), load_card(folder).stop_token_ids, REQUESTS, seed=5)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def native(request: pytest.FixtureRequest) -> Iterator[NativeDecoder]:
    decoder = NativeDecoder.load(default_model(), blocks=512, threads=1, kv_format=request.param)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def truth(native: NativeDecoder, requests: list[Generate]) -> Truth:
    return alone(native, requests)


@pytest.mark.parametrize("name", ["chunks", "preemption", "warm", "right drafts"])
def test_a_request_gives_the_tokens_it_gives_alone(
    name: str, native: NativeDecoder, requests: list[Generate], truth: Truth
) -> None:
    row = compare(name, requests, truth, CONDITIONS[name].run(native, requests, truth, random.Random(5)))
    assert row["tokens"] == sum(map(len, truth.values())) > 8 * REQUESTS
    assert complaints({"recipe": native.recipe, "rows": [row]}) == []
