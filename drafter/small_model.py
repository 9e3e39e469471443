"""Kind `model`: a small decoder runs the target's race with the target's noise.

    round   1. every stream's new tokens, all in one step             one row each, in the usual case
            2. a row for each chain that is still worth its time      until none is, or time is up
            3. the likely outcomes of these chains, side by side      where there is time left

Rules:
- A draft is argmax of logits / temperature + G(seed, position, id): the noise is the one the target will use, so that
  the two agree far more often than their distributions would by chance. The draft temperature is a factor on the
  request's own; 0 drafts greedily whatever is asked.
- A chain goes on while the next token is expected to be worth more than its time: `reach * T > expected * c` for a
  round every T seconds that brings `expected` tokens, and a step of c seconds. What is known of T is the budget.
- What lies in the KV cache is kept (`drafter.lines`); a new text is taken in piece by piece.
- The ids are the target's: a trimmed head maps them (`d2t.json`), and what it does not know it cannot guess.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.lines import Branch, Guess, Line, Lines
from drafter.outcomes import likely_outcomes
from kernels.step import BlockStore, Decoder, Racing, StepInputs
from shared.clock import stopwatch
from shared.settings import DrafterSettings

ENGINES = ("cpu", "cuda", "reference")
ALTERNATIVES = 2
# of prompts, in one round
ABSORB_ROWS = 256
# a chain ends where less than this of it is likely to be reached, and is not said beyond a guess less likely than that
LEAST_REACH = 0.1
LEAST_CONFIDENCE = 0.2
# an outcome less likely than this is not prepared for, and no further than this
LEAST_OUTCOME = 0.05
LONGEST_BRANCH = 8
COST_MEMORY = 0.2
SEED_MASK = (1 << 64) - 1


class RacingDecoder(Decoder, Racing, BlockStore, Protocol):  # type: ignore[misc]  # kernels is not followed
    """What drafting takes."""


class _Card(msgspec.Struct):
    vocabulary: str = ""


class _Part(NamedTuple):
    """Rows of one stream in a step."""

    line: Line
    branch: Branch | None
    tokens: Sequence[int]
    start: int  # position of the first
    samples: bool


class _Chain(NamedTuple):
    """A line or branch that is being continued."""

    ask: Ask
    line: Line
    branch: Branch | None


class ModelDraftsman:
    """A `drafter.drafting.Draftsman`."""

    kind = "model"
    threaded = True

    def __init__(self, decoder: RacingDecoder, vocabulary: str, draft_temperature: float = 1.0,
                 clock: Callable[[], float] = stopwatch) -> None:
        self.vocabulary = vocabulary
        self.lines = Lines(decoder.blocks, decoder.block_size_tokens)
        self.rows = 0  # that were computed
        self.step_s = 0.0  # what a step of chains takes lately
        self._decoder = decoder
        self._draft_temperature = draft_temperature
        self._clock = clock
        self._behind: set[Key] = set()
        self._block = np.empty(decoder.block_bytes, np.uint8)

    @property
    def behind(self) -> Collection[Key]:
        return self._behind

    def open(self, key: Key, stream: Stream) -> None:
        self._behind.discard(key)
        self.lines.open(key, stream, self._draft_temperature)

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        self.lines.advance(key, tokens)

    def close(self, key: Key, audience: Audience | None) -> None:
        self._behind.discard(key)
        self.lines.close(key)

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        until = self._clock() + budget_s
        asked = self._with_room(asks)
        ready = self._catch_up(asked)
        self._extend([_Chain(ask, self.lines[ask.key], None) for ask in ready], budget_s, until)
        if self._clock() < until:
            branches = [_Chain(ask, self.lines[ask.key], branch) for ask in ready for branch in self._fork(ask)]
            self._extend(branches, budget_s, until)
        return [continuation for ask in ready for continuation in self._said(ask)]

    def _with_room(self, asks: Sequence[Ask]) -> list[Ask]:
        """Those whose text and continuation fit into the context and the cache, and that say no id the model lacks.

        A target of the same tokenizer may have a wider embedding.
        """
        asked, keys = [], [ask.key for ask in asks]
        for ask in asks:
            line = self.lines[ask.key]
            end = len(line.tokens) + ask.length
            if (end < self._decoder.context_length and line.highest < self._decoder.vocabulary_size
                    and self.lines.make_room(ask.key, end, keys)):
                asked.append(ask)
            else:
                self._behind.discard(ask.key)
        return asked

    def _catch_up(self, asks: Sequence[Ask]) -> list[Ask]:
        """Compute what is not in the cache, and the first guess behind it; those that are there."""
        left = ABSORB_ROWS
        parts, ready = [], []
        for ask in asks:
            line = self.lines[ask.key]
            self._behind.discard(ask.key)
            if line.chain:
                ready.append(ask)
                continue
            # the last token is always computed: its logits are wanted
            start = min(line.held, len(line.tokens) - 1)
            waiting = len(line.tokens) - start
            take = waiting if waiting == 1 else min(waiting, left)
            left -= take
            if take:
                parts.append(_Part(line, None, line.tokens[start:start + take], start, take == waiting))
            if take < waiting:
                self._behind.add(ask.key)
            else:
                ready.append(ask)
        self._run(parts)
        return ready

    def _extend(self, chains: list[_Chain], budget_s: float, until: float) -> None:
        """Go on with each of them while that is worth its time."""
        active = chains
        while True:
            active = [chain for chain in active if self._is_worth(chain, len(active), budget_s)]
            if not active or self._clock() >= until:
                return
            parts = []
            for _, line, branch in active:
                of = line if branch is None else branch
                if branch is not None and not branch.chain:
                    parts.append(_Part(line, branch, [branch.token], branch.position, True))
                else:
                    base = len(line.tokens) if branch is None else branch.position + 1
                    at = base + len(of.chain) - 1
                    parts.append(_Part(line, branch, [of.chain[-1].token], at, True))
            began = self._clock()
            self._run(parts)
            took = self._clock() - began
            self.step_s += (took - self.step_s) * (COST_MEMORY if self.step_s else 1.0)

    def _is_worth(self, chain: _Chain, chains: int, budget_s: float) -> bool:
        """Whether another token behind this one is."""
        ask, line, branch = chain
        reach, expected, length = 1.0, 1.0, 0
        if branch is not None:
            if not branch.chain:
                return True
            reach = branch.likely
        for guess in (line if branch is None else branch).chain:
            reach *= self._right(line, guess)
            expected += reach
            length += 1
            if branch is None and length == ask.lead:
                # they will have been right or wrong when the answer arrives
                reach = 1.0
        if length >= (ask.length if branch is None else min(ask.length, LONGEST_BRANCH)):
            return False
        if branch is None and length < ask.lead:
            return reach >= LEAST_REACH
        if reach < (LEAST_REACH if branch is None else LEAST_REACH * branch.likely):
            return False
        return reach * budget_s > expected * self.step_s / chains

    def _fork(self, ask: Ask) -> list[Branch]:
        """New branches for the likely outcomes of a stream's chain, each with a copy of the block that it shares."""
        line = self.lines[ask.key]
        if ask.branches <= 0:
            return []
        agreement = [self._right(line, guess) for guess in line.chain]
        others = [self.lines.margins.recall[:len(guess.others)] for guess in line.chain]
        found = []
        for outcome in likely_outcomes(agreement, others, ask.branches, ALTERNATIVES, LEAST_OUTCOME):
            position = len(line.tokens) + outcome.agreed
            token = line.chain[outcome.agreed].others[outcome.rank]
            # of the last token that is guessed nothing is computed
            end = position + min(ask.length, LONGEST_BRANCH)
            if end > self._decoder.context_length:
                continue
            branch = self.lines.fork(ask.key, position, token, end, outcome.probability)
            if branch is None:
                continue
            if position % self._decoder.block_size_tokens:
                shared = line.blocks[position // self._decoder.block_size_tokens]
                self._decoder.read_block(shared, self._block)
                self._decoder.write_block(branch.blocks[0], self._block)
            found.append(branch)
        return found

    def _said(self, ask: Ask) -> list[Continuation]:
        line = self.lines[ask.key]
        base = len(line.tokens)
        tokens, confidence = self._worth_saying(line, line.chain, ask.lead, ask.length)
        found = [Continuation(ask.key, base, (), tokens, confidence)] if tokens else []
        chain = [guess.token for guess in line.chain]
        for branch in sorted(line.branches.values(), key=lambda branch: -branch.likely)[:ask.branches]:
            tokens, confidence = self._worth_saying(line, branch.chain, 0, ask.length)
            if tokens:
                assumed = (*chain[:branch.position - base], branch.token)
                found.append(Continuation(ask.key, base, assumed, tokens, confidence, branch.likely))
        return found

    def _worth_saying(self, line: Line, chain: Collection[Guess], lead: int,
                      most: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        confidence: list[float] = []
        for guess in chain:
            right = self._right(line, guess)
            if len(tokens) >= most or (len(tokens) >= lead and right < LEAST_CONFIDENCE):
                break
            tokens.append(guess.token)
            confidence.append(right)
        return (tokens, confidence) if len(tokens) > lead else ([], [])

    def _right(self, line: Line, guess: Guess) -> float:
        return line.luck.of(self.lines.margins.of(guess.margin, line.noisy))

    def _run(self, parts: Sequence[_Part]) -> None:
        """Compute these rows; where a guess is wanted it is put behind its line or branch."""
        if not parts:
            return
        self.rows += sum(len(part.tokens) for part in parts)
        race = self._decoder.race(self._inputs(parts), 1 + ALTERNATIVES)
        wanted = iter(zip(race.tokens.tolist(), race.scores.tolist(), strict=True))
        for line, branch, tokens, start, samples in parts:
            of = line if branch is None else branch
            of.held = start + len(tokens)
            if samples:
                (token, *others), (score, *scores) = next(wanted)
                of.chain.append(Guess(token, score - scores[0], [other for other in others if other >= 0]))

    def _inputs(self, parts: Sequence[_Part]) -> StepInputs:
        tables = [self.lines.table(part.line, part.branch) for part in parts]
        padded = np.full((len(parts), max(map(len, tables))), -1, np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[:len(table)] = table
        starts = np.cumsum([0, *(len(part.tokens) for part in parts)]).astype(np.int32)
        sampled = [(part.line, end - 1) for part, end in zip(parts, starts[1:].tolist(), strict=True) if part.samples]
        lines = [line for line, _ in sampled]
        return StepInputs(
            tokens=np.concatenate([np.asarray(part.tokens, np.int32) for part in parts]),
            positions=np.concatenate([np.arange(part.start, part.start + len(part.tokens), dtype=np.int32)
                                      for part in parts]),
            sequence_starts=starts,
            block_tables=padded,
            sample_rows=np.array([row for _, row in sampled], np.int32),
            temperature=np.array([line.temperature for line in lines], np.float32),
            top_k=np.array([line.sampling.top_k for line in lines], np.int32),
            top_p=np.array([line.sampling.top_p for line in lines], np.float32),
            min_p=np.array([line.sampling.min_p for line in lines], np.float32),
            seeds=np.array([line.sampling.seed & SEED_MASK for line in lines], np.uint64),
        )


def load(settings: DrafterSettings) -> ModelDraftsman:
    """The model that the settings name. Blocking, for seconds. Raises ValueError when it cannot draft here."""
    path = Path(settings.model)
    vocabulary = vocabulary_of(path)
    if settings.draft_temperature < 0:
        raise ValueError(f"draft_temperature must be 0 or more, got {settings.draft_temperature}")
    return ModelDraftsman(_decoder(settings, path), vocabulary, settings.draft_temperature)


def vocabulary_of(path: Path) -> str:
    """The digest of the ids a model speaks, out of the card beside it. Raises ValueError where none says so."""
    card = (path if path.is_dir() else path.parent) / "card.json"
    try:
        vocabulary = msgspec.json.decode(card.read_bytes(), type=_Card).vocabulary
    except FileNotFoundError:
        vocabulary = ""
    except msgspec.MsgspecError as error:
        raise ValueError(f"{card} is no model card ({error}): run `tokenmill pull` again") from None
    if not vocabulary:
        raise ValueError(f"{path} has no card.json that says which ids it speaks, so no worker could trust its drafts: "
                         "pull it with `tokenmill pull`, or make a drafter with `tokenmill distil`")
    return vocabulary


def _decoder(settings: DrafterSettings, path: Path) -> RacingDecoder:
    if settings.engine not in ENGINES:
        raise ValueError(f"engine is {settings.engine!r}: choose one of {', '.join(ENGINES)}")
    kv_bytes = settings.kv_mib << 20
    if settings.engine == "cpu":
        from kernels.native.decoder import NativeDecoder

        try:
            native: RacingDecoder = NativeDecoder.load(path, kv_bytes=kv_bytes, threads=settings.threads)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"a small model drafts with the native step, and there is none here: {error}") from None
        return native
    from kernels.decoder import TorchDecoder

    device = "cuda" if settings.engine == "cuda" else "cpu"
    decoder: RacingDecoder = TorchDecoder.load(path, kv_bytes=kv_bytes, device=device)
    return decoder
