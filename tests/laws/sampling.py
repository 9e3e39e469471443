"""Requests with every sampling parameter, alone and in random combinations, computed in every way there is.

    python -m tests.laws.sampling --cases 10000 --from 0        ends with 1 when one of them breaks law 1

Each case is a request drawn from its number. Its tokens must be those of `tests.laws.plain_sampler`, whether it is
computed alone; beside others, in chunks and with so few blocks that they take each other's; with drafts that are right
up to a random place; or begun anew behind a part of its answer. And over all cases the tokens must be distributed as
that model says, which neither knows the noise nor how ids are masked.
"""

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder
from shared.logprobs import record_bytes, unpack_likely
from shared.messages import Adjust, Finished, Generate, Grammar, Proposal, Sampling
from shared.noise import choice_seed
from shared.tokens import pack, unpack
from shared.vocabulary import Vocabulary
from tests.kernels.tiny import Tiny, write_tiny_gguf
from tests.laws.plain_sampler import Chosen, answer
from tests.worker.builders import Bench, request
from worker.grammar import Grammars
from worker.kv_blocks import BlockPool
from worker.scheduler import Scheduler

WORDS = [b'{"', b'": ', b"name", b"true", b"null", b"ab", b"abc", b"ca", b", ", b"yes", b"no", b"maybe"]
END = 256 + len(WORDS)
SIZE = 288
# prompts, stops, biases and walls are drawn of these, so that they meet
FEW = [*b'abcnoy{}":,', *range(256, END + 1)]
SPELLING = b'{}":, abcdefghijklmnopqrstuvwxyz'
GRAMMARS = (Grammar("choice", '["yes", "no", "maybe, no"]'), Grammar("regex", "(ab?c|na*o)+y"),
            Grammar("json", '{"type": "object", "properties": {"name": {"enum": [true, null, "abc"]}}, '
                            '"required": ["name"], "additionalProperties": false}'))
COMPANY = 4
LONGEST_PROMPT, LONGEST_ANSWER = 24, 24
FEW_BLOCKS = 4  # one request needs three
# the chance of a false alarm, less than one in a million runs
SURE = 1e-6

Fields = dict[str, Any]


class Broken(AssertionError):
    """A case that says something else in one way than in another."""


# --- cases -----------------------------------------------------------------------------------------------------------


def _some(chooser: random.Random, least: int, most: int) -> list[int]:
    return chooser.sample(FEW, chooser.randint(least, most))


def _bias(chooser: random.Random) -> Fields:
    ids = _some(chooser, 1, 6)
    values = [chooser.choice((-100.0, -2.0, 1.0, 6.0, 100.0)) for _ in ids]
    return {"biased": pack(ids), "biases": np.array(values, "<f4").tobytes()}


def _grammar(chooser: random.Random) -> Fields:
    return {"grammar": chooser.choice(GRAMMARS), "stop_token_ids": chooser.choice(((END,), ()))}


def _value(name: str, *values: object) -> Callable[[random.Random], Fields]:
    return lambda chooser: {name: chooser.choice(values)}


# each parameter with values that do something
ADJUST: Mapping[str, Callable[[random.Random], Fields]] = {
    "repetition_penalty": _value("repetition_penalty", 0.6, 1.2, 2.0),
    "frequency_penalty": _value("frequency_penalty", -1.5, 0.4, 2.0),
    "presence_penalty": _value("presence_penalty", -1.5, 0.4, 2.0),
    "logit_bias": _bias,
    "min_tokens": _value("min_tokens", 1, 3, 7),
    "bad_words": lambda chooser: {"bad_words": tuple(pack(_some(chooser, 1, 3)) for _ in range(chooser.randint(1, 4)))},
    "allowed_token_ids": lambda chooser: {"allowed": pack(_some(chooser, 1, 12))},
}
SAMPLING: Mapping[str, Callable[[random.Random], Fields]] = {
    "temperature": _value("temperature", 0.0, 0.3, 0.8, 1.5),
    "top_k": _value("top_k", 1, 2, 5, 40),
    "top_p": _value("top_p", 0.0, 0.2, 0.7, 0.95),
    "min_p": _value("min_p", 0.01, 0.1, 0.5),
}
REQUEST: Mapping[str, Callable[[random.Random], Fields]] = {
    "stop_token_ids": lambda chooser: {"stop_token_ids": tuple(_some(chooser, 1, 4))},
    "logprobs": _value("logprobs", 0, 3),
    "prompt_logprobs": _value("prompt_logprobs", 0, 2),
    "grammar": _grammar,
}
# a seed has every case
PARAMETERS = (*ADJUST, *SAMPLING, *REQUEST, "n", "seed")


def case(number: int, only: str = "") -> Generate:
    """Case `number`: about a third of the parameters off their defaults, or `only` this one."""
    chooser = random.Random(f"{only} {number}")

    def drawn(of: Mapping[str, Callable[[random.Random], Fields]]) -> Fields:
        names = [name for name in of if (name == only if only else chooser.random() < 0.3)]
        return {key: value for name in names for key, value in of[name](chooser).items()}

    adjust, sampling, more = drawn(ADJUST), drawn(SAMPLING), drawn(REQUEST)
    if "grammar" in more and "allowed" in adjust:
        # walls that leave every grammar a way to its end: what it demands is spelt in one way
        adjust["allowed"] = pack(sorted({*SPELLING, *FEW}))
    choice = chooser.randrange(4) if only in ("", "n") else 0
    return request(
        f"r{number}", [chooser.choice(FEW) for _ in range(chooser.randint(1, LONGEST_PROMPT))],
        chooser.randint(1, LONGEST_ANSWER), adjust=Adjust(**adjust) if adjust else None,
        sampling=Sampling(seed=choice_seed(chooser.getrandbits(64), choice), **sampling),
        **{"stop_token_ids": ()} | more)


def used(one: Generate) -> set[str]:
    """The fields that are off their defaults."""
    parts = (one, request(stop_token_ids=())), (one.adjust or Adjust(), Adjust()), (one.sampling, Sampling())
    return {field for own, plain in parts for field in own.__struct_fields__
            if field not in ("request_id", "seed", "sampling", "adjust", "tokens", "max_tokens")
            and getattr(own, field) != getattr(plain, field)}


# --- ways to compute them --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A tiny random model with a vocabulary in which grammars can be spelt."""

    decoder: Decoder
    grammars: Grammars


def place(folder: Path) -> tuple[NativeDecoder, Grammars]:
    """Its model is written to `folder`. The decoder is to be closed."""
    path = write_tiny_gguf(folder / "tiny.gguf", Tiny(vocabulary=SIZE))
    tokens = [bytes([byte]) for byte in range(256)] + WORDS + [b"<|end|>"]
    words = Vocabulary("v", tokens + [b""] * (SIZE - len(tokens)), [END], [END])
    return NativeDecoder.load(path, blocks=64, threads=1), Grammars(lambda: words, SIZE)


class Engine(Bench):
    """The worker's scheduler and batch around a real decoder, without bus and time."""

    def __init__(self, place: Place, blocks: int = 64, **limits: int) -> None:
        super().__init__(place.decoder, **({"step_tokens": 64, "max_draft_tokens": 0, "max_forced_tokens": 0} | limits))
        self.scheduler = Scheduler(self.scheduler.limits, BlockPool(blocks))
        self.scheduler.meet_drafter("d1")
        self.grammars = place.grammars

    def add(self, generate: Generate) -> None:
        state = None
        if generate.grammar is not None:
            state = self.grammars.begin(generate.grammar, unpack(generate.generated))
        self.scheduler.add(generate, self.now, generate.deadline, state)

    def finish_with_drafts(self, truth: Mapping[str, list[int]], chooser: random.Random) -> None:
        """To the end; every other draft has one token changed."""
        while True:
            for sequence in list(self.scheduler.live):
                name = sequence.key.request_id
                draft = truth[name][len(sequence.tokens) - sequence.prompt_length:][:4]
                if draft and chooser.random() < 0.5:
                    draft[chooser.randrange(len(draft))] = chooser.choice(FEW)
                if draft:
                    self.scheduler.speculation.drafts.offer(Proposal(name, 1, len(sequence.tokens), pack(draft)))
            self.scheduler.cost.observe(1, 0, 1.0)  # a step so long that every draft pays
            if not self.step():
                return


class Answered(NamedTuple):
    """What came of a request: tokens, how likely each was, and how likely those of the prompt were."""

    tokens: list[int]
    records: bytes
    prompt_records: bytes


def answered(engine: Engine, requests: Sequence[Generate]) -> dict[str, Answered]:
    """By request, when all is done. Raises Broken for one that did not end as it should."""
    found = {}
    for one in requests:
        key = one.request_id, 1
        if [type(end) for end in engine.ends.get(key, [])] != [Finished]:
            raise Broken(f"{one} ended with {engine.ends.get(key)}")
        told = engine.prompts.get(key, {})
        found[one.request_id] = Answered(engine.streams.get(key, []), engine.records.get(key, b""),
                                         b"".join(told[at] for at in sorted(told)))
    return found


class Covered(NamedTuple):
    """How much was put to the test."""

    tokens: int = 0
    preemptions: int = 0
    drafts: int = 0
    accepted_drafts: int = 0
    resumed_tokens: int = 0

    def __add__(self, other: "Covered") -> "Covered":  # type: ignore[override]
        return Covered(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def check(requests: Sequence[Generate], place: Place, chooser: random.Random
          ) -> tuple[dict[str, list[Chosen]], Covered]:
    """What a plain model says of these requests. Raises Broken where one of them says anything else."""
    plain = {}
    for one in requests:
        state = place.grammars.begin(one.grammar, []) if one.grammar is not None else None
        plain[one.request_id] = answer(one, place.decoder, state)
    truth = {name: [chosen.token for chosen in said] for name, said in plain.items()}
    alone: dict[str, Answered] = {}
    for one in requests:
        engine = Engine(place)
        engine.add(one)
        engine.finish()
        alone |= answered(engine, [one])
    for one in requests:
        name = one.request_id
        _equal("alone", one, alone[name].tokens, truth[name])
        _check_records(one, plain[name], alone[name].records)

    together = Engine(place, FEW_BLOCKS, step_tokens=chooser.choice([4, 5, 8]), max_running=4)
    for one in requests:
        together.add(one)
    together.finish()
    _all_equal("in company, in chunks and with few blocks", requests, answered(together, requests), alone)

    drafted = Engine(place, step_tokens=chooser.choice([12, 64]), max_running=4, max_draft_tokens=4,
                     max_forced_tokens=4)
    for one in requests:
        drafted.add(one)
    drafted.finish_with_drafts(truth, chooser)
    _all_equal("with drafts", requests, answered(drafted, requests), alone)

    first = {one.request_id: chooser.randrange(len(truth[one.request_id])) for one in requests}
    again = Engine(place, max_draft_tokens=4, max_forced_tokens=3)
    for one in requests:
        generated = pack(truth[one.request_id][:first[one.request_id]])
        again.add(replace(one, generated=generated, prompt_logprobs=-1))
    again.finish_with_drafts(truth, chooser)
    rest = {name: Answered(truth[name][at:], all_of.records[len(all_of.records) // len(truth[name]) * at:], b"")
            for name, at, all_of in ((name, at, alone[name]) for name, at in first.items())}
    _all_equal("begun anew", requests, answered(again, requests), rest)
    drafts = drafted.scheduler.speculation.draft_tokens + again.scheduler.speculation.draft_tokens
    accepted = drafted.scheduler.speculation.accepted_draft_tokens + again.scheduler.speculation.accepted_draft_tokens
    return plain, Covered(sum(map(len, truth.values())), together.scheduler.preemptions, drafts, accepted,
                          sum(first.values()))


def _all_equal(way: str, requests: Sequence[Generate], found: Mapping[str, object], expected: Mapping[str, object]
               ) -> None:
    for one in requests:
        _equal(way, one, found[one.request_id], expected[one.request_id])


def _equal(way: str, one: Generate, found: object, expected: object) -> None:
    if found != expected:
        raise Broken(f"{way} {one} says {found}, not {expected}")


def _check_records(one: Generate, plain: Sequence[Chosen], records: bytes) -> None:
    """How likely tokens were is told of raw logits, up to rounding."""
    size = record_bytes(one.logprobs) if one.logprobs >= 0 else 0
    if len(records) != size * len(plain):
        raise Broken(f"{one} has {len(records)} bytes of records for {len(plain)} tokens")
    for number, chosen in enumerate(plain if size else ()):
        likely = unpack_likely(records[size * number:size * (number + 1)])
        if not math.isclose(likely.logprob, chosen.logprob, abs_tol=1e-4) or len(likely.top) != one.logprobs:
            raise Broken(f"{one} says {likely} of a token with {chosen.logprob}")


# --- how tokens are distributed --------------------------------------------------------------------------------------


def positions(plain: Sequence[Chosen], chooser: random.Random) -> list[float]:
    """Where among all ids, likeliest first, each token lies that was not certain: evenly over 0 to 1, if drawn so."""
    found = []
    for token, likely, _ in plain:
        if not likely[token] > 0.0:
            raise Broken(f"token {token} was chosen, which cannot be")
        if likely[token] < 1.0 - 1e-12:
            before = (likely > likely[token]) | ((likely == likely[token]) & (np.arange(len(likely)) < token))
            found.append(float(likely[before].sum()) + chooser.random() * float(likely[token]))
    return found


def chance(values: Sequence[float]) -> float:
    """Of values at least as uneven as these (Kolmogorov and Smirnov); 1 where there are too few to tell."""
    count = len(values)
    if count < 50:
        return 1.0
    ordered = np.sort(values)
    steps = np.arange(1, count + 1) / count
    distance = float(max((steps - ordered).max(), (ordered - steps + 1 / count).max()))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.3:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * scaled * scaled) for k in range(1, 101)))


class Played(NamedTuple):
    """What a row of cases came to."""

    cases: int
    covered: Covered
    broken: list[str]
    positions: dict[str, list[float]]  # of tokens that were not certain: all of them, and by what their cases ask for

    @property
    def uneven(self) -> dict[str, float]:
        """Parameters whose tokens are not distributed as the model says, with the chance of that."""
        found = {name: chance(values) for name, values in self.positions.items()}
        return {name: likely for name, likely in found.items() if likely < SURE}


def play(numbers: Sequence[int], place: Place, only: str = "",
         report: Callable[[int], None] = lambda done: None) -> Played:
    """Check these cases, `COMPANY` at a time. `report` is told how many are done."""
    covered, broken = Covered(), []
    values: dict[str, list[float]] = {"all": []}
    for at in range(0, len(numbers), COMPANY):
        requests = [case(number, only) for number in numbers[at:at + COMPANY]]
        chooser = random.Random(f"ways {only} {numbers[at]}")
        try:
            plain, more = check(requests, place, chooser)
            for one in requests:
                found = positions(plain[one.request_id], chooser)
                for name in ("all", *used(one)):
                    values.setdefault(name, []).extend(found)
            covered += more
        except Exception as error:  # a case that cannot be played to its end breaks a law too
            broken.append(f"cases {numbers[at]} to {numbers[at] + COMPANY - 1}: {error!r}")
        report(at + len(requests))
    return Played(len(numbers), covered, broken, values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.laws.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        decoder, grammars = place(Path(folder))
        show = (lambda done: print(f"\r{done}/{options.cases}", end="", file=sys.stderr)) if sys.stderr.isatty() \
            else (lambda done: None)
        played = play(range(options.first, options.first + options.cases), Place(decoder, grammars), report=show)
        decoder.close()
    for line in played.broken:
        print(line)
    for name, values in sorted(played.positions.items()):
        print(f"{name:20} {len(values):7} tokens   chance of so uneven a choice {chance(values):.3f}")
    print(" ".join(f"{name} {value}" for name, value in played.covered._asdict().items()))
    print(f"{played.cases} cases, {len(played.broken)} broken, {len(played.uneven)} parameters uneven")
    sys.exit(1 if played.broken or played.uneven else 0)


if __name__ == "__main__":
    main()
