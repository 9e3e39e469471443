"""Small requests, and the plain way to compute what they must give."""

from collections.abc import Iterator

from kernels.step import Decoder, Embedding
from shared.messages import Generate, Sampling
from shared.tokens import pack
from worker.batch import Batch
from worker.events import Advanced, Ended, Event, PromptScored, Refused
from worker.kv_blocks import BlockPool
from worker.mock_decoder import MockDecoder
from worker.scheduler import Limits, Scheduler

BLOCK = 4
VOCABULARY = 200
FAR = 1e9
STEP_S = 0.01


def request(name: str = "r", prompt: list[int] | None = None, max_tokens: int = 8, **other: object) -> Generate:
    fields: dict[str, object] = {
        "attempt": 1, "gateway": "g1", "model": "m", "deadline": FAR, "tenant": "t", "cache_salt": b"salt",
        "sampling": Sampling(temperature=0.0)} | other
    if isinstance(fields.get("generated"), list):
        fields["generated"] = pack(fields["generated"])  # type: ignore[arg-type]
    return Generate(name, tokens=pack([5, 6, 7] if prompt is None else prompt), max_tokens=max_tokens,
                    **fields)  # type: ignore[arg-type]


def mock_decoder(blocks: int = 64, context_length: int = 512) -> MockDecoder:
    return MockDecoder(blocks=blocks, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY,
                       context_length=context_length)


def make_scheduler(decoder: Decoder, **limits: int) -> Scheduler:
    return Scheduler(Limits(decoder.block_size_tokens, decoder.context_length, decoder.vocabulary_size, **limits),
                     BlockPool(decoder.blocks))


def make_batch(scheduler: Scheduler, hidden_size: int = 0) -> Batch:
    return Batch(scheduler.limits.max_running, -(-scheduler.length_limit // scheduler.limits.block_size),
                 scheduler.limits.vocabulary_size, hidden_size=hidden_size)


class Bench:
    """A scheduler and a decoder without bus, loop or time."""

    def __init__(self, decoder: Decoder, **limits: int) -> None:
        self.decoder = decoder
        self.scheduler = make_scheduler(decoder, **limits)
        self.scheduler.meet_drafter("d1")
        self.batch = make_batch(self.scheduler, decoder.hidden_size if isinstance(decoder, Embedding) else 0)
        self.now = 0.0
        self.busy_s = 0.0
        self.streams: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], list[object]] = {}
        self.largest_step = 0
        self.records: dict[tuple[str, int], bytes] = {}  # how likely tokens were
        self.prompts: dict[tuple[str, int], dict[int, bytes]] = {}  # and those of prompts, by first index

    def add(self, generate: Generate) -> None:
        self.scheduler.add(generate, self.now, generate.deadline)

    def step(self) -> bool:
        """Plan, run and commit one step. False when there was nothing to do."""
        step = self.scheduler.plan(self.now)
        self.take(self.scheduler.take_events())
        if step is None:
            return False
        self.largest_step = max(self.largest_step, step.rows)
        self.now += STEP_S
        self.busy_s += STEP_S
        inputs = self.batch.build(step)
        chosen = self.decoder.step(inputs).tolist()
        self.take(self.scheduler.commit(step, chosen, self.now, logprobs=inputs.logprobs,
                                        hidden=inputs.hidden, busy_s=STEP_S))
        return True

    def steps(self, most: int = 10_000) -> Iterator[int]:
        for number in range(most):
            if not self.step():
                return
            yield number
        raise AssertionError(f"not finished after {most} steps")

    def finish(self) -> None:
        for _ in self.steps():
            pass

    def take(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Advanced(sequence, index, tokens):
                    assert index == len(self.streams.setdefault(sequence.key, [])) + \
                        sequence.resumed_length - sequence.prompt_length
                    self.streams[sequence.key] += tokens
                    self.records[sequence.key] = self.records.get(sequence.key, b"") + event.logprobs
                case PromptScored(sequence, index, records):
                    self.prompts.setdefault(sequence.key, {})[index] = records
                case Ended(sequence, reply):
                    self.ends.setdefault(sequence.key, []).append(reply)
                case Refused(generate, reply):
                    self.ends.setdefault((generate.request_id, generate.attempt), []).append(reply)


def plain(generate: Generate, decoder: MockDecoder | None = None) -> list[int]:
    """The stream of a request alone: no cache, no batch, no drafts, whole prompt in one step."""
    bench = Bench(decoder or mock_decoder(), step_tokens=512, max_draft_tokens=0)
    bench.add(generate)
    bench.finish()
    return bench.streams.get((generate.request_id, generate.attempt), [])


