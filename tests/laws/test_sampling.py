"""Law 1 for every sampling parameter, alone and with others: `python -m tests.laws.sampling` plays more of them."""

import random
from collections.abc import Iterator

import pytest

from kernels.native.build import available
from shared.messages import Sampling
from shared.noise import choose
from tests.laws import sampling
from tests.laws.plain_sampler import Chosen, logits_behind, probabilities
from tests.laws.sampling import PARAMETERS, SURE, Place, case, chance, play, positions, used

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    decoder, grammars = sampling.place(tmp_path_factory.mktemp("tiny"))
    yield Place(decoder, grammars)
    decoder.close()


def test_random_combinations_of_all_parameters_say_what_a_plain_model_says(place: Place) -> None:
    played = play(range(120), place)
    assert played.broken == [] and played.uneven == {}
    assert min(played.covered) > 0
    assert min(len(values) for values in played.positions.values()) > 20


@pytest.mark.parametrize("only", PARAMETERS)
def test_each_parameter_alone_says_what_a_plain_model_says(only: str, place: Place) -> None:
    played = play(range(12), place, only)
    assert played.broken == [] and played.uneven == {}
    assert played.covered.tokens > 12


def test_a_case_with_one_parameter_has_no_other_and_random_cases_have_all_of_them() -> None:
    for only in PARAMETERS:
        others = used(case(1, only))
        assert len(others) <= 2 and (others or only in ("n", "seed")), only
    seen = set().union(*(used(case(number)) for number in range(200)))
    assert seen == {"repetition_penalty", "frequency_penalty", "presence_penalty", "biased", "biases", "min_tokens",
                    "bad_words", "allowed", "temperature", "top_k", "top_p", "min_p", "stop_token_ids", "logprobs",
                    "prompt_logprobs", "grammar"}


@pytest.mark.parametrize(("asked", "drawn", "is_seen"), [
    (Sampling(0.8), Sampling(1.0), True), (Sampling(), Sampling(top_p=0.9), True), (Sampling(), Sampling(), False)])
def test_a_sampler_that_is_a_little_off_is_seen(asked: Sampling, drawn: Sampling, is_seen: bool, place: Place) -> None:
    chooser = random.Random(1)
    values = []
    for first in range(60):
        logits = logits_behind(place.decoder, [first, 98])
        likely = probabilities(logits, asked)
        values += positions([
            Chosen(choose(logits, chooser.getrandbits(64), 2, drawn.temperature, top_p=drawn.top_p), likely, 0.0)
            for _ in range(50)], chooser)
    assert (chance(values) < SURE) is is_seen
