"""Law 1 on the native CPU engine: the same request gives the same tokens, whatever else the engine does.

    python -m deploy.bench.exactness [--requests 500] [--seed 1] [--jobs 1] [--json FILE]

Random requests (plain English, 5 to 300 tokens in, 8 to 48 out, greedy and sampled, some with a common beginning, a
third with penalties, bias, bad words, allowed ids or a least length) go
through the worker's scheduler, block pool and batch onto the default model in a loop without bus and without time.

    alone            one request at a time, no drafts, nothing cached: the truth
    batches          up to 32 at once, coming and going, blocks of one reused by another
    chunks           the same with step budgets that cut prompts into small pieces
    preemption       the same with too few blocks, most of them now and then in other hands
    priority         the same, those of high priority come last and take the blocks of those that run
    cancels          streams cancelled at random moments and sent again, with or without what they had said
    warm             the same requests once more over the blocks that they left
    right drafts     the true continuation proposed, every third time with one token changed
    wrong drafts     random tokens proposed
    resubmission     part of the output handed back as `generated`, on an engine that knows nothing of it
    all at once      few blocks, small steps, priorities, cancels, right and wrong drafts, a warm cache, two threads
    two threads      batches again with two threads (all others have one)

A flip is a stream that differs from the truth, however much of it does (`different_tokens`). Counters in each row show
that its condition took place. Ends with 1 when an engine whose recipe promises exactness flips, or when a
condition did not take place.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from deploy import pull
from deploy.bench import machine, prompts
from deploy.bench.mesh import show
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder
from shared.messages import Adjust, Cancel, Failed, Generate, Proposal, Sampling
from shared.tokens import pack, unpack
from worker.batch import Batch
from worker.events import Advanced, Ended, Event, Refused
from worker.kv_blocks import BlockPool
from worker.scheduler import Limits, Scheduler
from worker.sequence import Sequence as Stream

EXACT_RECIPES = "int8"  # the recipes that begin so promise equal tokens

PROMPT_TOKENS = (5, 300)
OUTPUT_TOKENS = (8, 48)
SHARED_BEGINNINGS = 8
MOST_STREAMS = 32
ROUND_REQUESTS = 64  # each round has a scheduler of its own, and blocks full of what the round before has left in them
BLOCKS = 1024  # a round and its answers fit: 64 requests of 7 blocks on average, 22 at most
FEW_BLOCKS = (26, 48)  # the longest request needs 22
FAR = 1e18

Truth = dict[str, list[int]]
Draft = Callable[[Stream], list[int]]


@dataclass
class Cover:
    """What happened while a condition ran. The columns of the report."""

    steps: int = 0
    most_streams: int = 0  # in one step
    shared_steps: int = 0  # steps of two streams or more
    chunks: int = 0  # parts of prompts that were not their last
    cached_tokens: int = 0
    preemptions: int = 0
    priority_preemptions: int = 0  # while one of higher priority that came later ran on
    cancels: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0
    resumed_tokens: int = 0


class Run(NamedTuple):
    """What came out: the whole output of each request, tokens handed in as `generated` included."""

    said: Truth
    cover: Cover


class Condition(NamedTuple):
    """One way to disturb requests; the counters of `proof` are above zero when it took place."""

    run: Callable[[Decoder, Sequence[Generate], Truth, random.Random], Run]
    proof: tuple[str, ...]
    threads: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options.requests, options.seed, options.jobs)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show({"rows": [_line(row) for row in [*report["rows"], report["total"]]]})
    if wrong := complaints(report):
        raise SystemExit("\n".join(wrong))


def measure(count: int, seed: int, jobs: int) -> dict[str, Any]:
    """One row per condition."""
    folder = pull.pull("default")
    requests = make_requests(Tokenizer.load(folder), load_card(folder).stop_token_ids, count, seed)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        truth: Truth = {}
        cpu_s = 0.0
        for part, part_s in _share(processes, _alone, [(folder, requests[at::jobs]) for at in range(jobs)]):
            truth |= part
            cpu_s += part_s
        print(f"alone: {sum(map(len, truth.values()))} tokens, {cpu_s:.0f} s of CPU", file=sys.stderr)
        rows = list(_share(processes, _disturbed, [(folder, name, requests, truth, seed) for name in CONDITIONS]))
    return {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.exactness", sys.argv[1:]),
        "recipe": NativeDecoder.recipe,
        "requests": {
            "number": count,
            "prompt_tokens": sum(len(unpack(request.tokens)) for request in requests),
            "output_tokens": sum(map(len, truth.values())),
            "sampled": sum(request.sampling.temperature > 0 for request in requests),
            "alone_cpu_s": round(cpu_s, 1),
        },
        "rows": rows,
        "total": total(rows),
    }


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum over all conditions."""
    sums = {key: sum(row[key] for row in rows) for key in ("tokens", "flips", "different_tokens")}
    return {"condition": "all", **sums, "flips_per_1e5": _per_1e5(sums["flips"], sums["tokens"])}


def _per_1e5(flips: int, tokens: int) -> float | None:
    return round(1e5 * flips / tokens, 2) if tokens else None


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """What people want to see of a row; the file has all of it."""
    shown = {key: row[key] for key in ("condition", "tokens", "flips", "different_tokens", "flips_per_1e5")}
    if row["condition"] not in CONDITIONS:
        return shown
    return shown | {"took place": ", ".join(f"{row[name]} {name}" for name in CONDITIONS[row["condition"]].proof)}


def complaints(report: dict[str, Any]) -> list[str]:
    """Why the report fails; empty when law 1 holds in every condition and every condition took place."""
    rows = report["rows"]
    wrong = [
        f"{row['condition']}: nothing counted as {name}, so this condition was not tried"
        for row in rows
        for name in CONDITIONS[row["condition"]].proof
        if not row[name]
    ]
    if str(report["recipe"]).startswith(EXACT_RECIPES):
        wrong += [f"{row['condition']}: {row['flips']} streams differ, {row['first']}" for row in rows if row["flips"]]
    return wrong


# --- the requests and their truth ------------------------------------------------------------------------------------


def make_requests(tokenizer: Tokenizer, stop_ids: tuple[int, ...], count: int, seed: int) -> list[Generate]:
    """Random requests; short prompts are more frequent than long ones, half of the requests stop at `stop_ids`."""
    chooser = random.Random(seed)

    def text(number: int, length: int) -> list[int]:
        return prompts.tokens(lambda words: tokenizer.encode(words, add_special=False), number, length)

    least, most = PROMPT_TOKENS
    words = text(0, 400)
    made = []
    for number in range(count):
        length = round(math.exp(chooser.uniform(math.log(least), math.log(most))))
        common = chooser.randrange(length) if chooser.random() < 0.4 else 0
        beginning = text(chooser.randrange(SHARED_BEGINNINGS), common) if common else []
        made.append(
            Generate(
                f"r{number}",
                attempt=1,
                gateway="bench",
                model="default",
                tokens=pack(beginning + text(1000 + number, length - common)),
                max_tokens=chooser.randint(*OUTPUT_TOKENS),
                deadline=FAR,
                sampling=Sampling(
                    temperature=chooser.choice([0.0, 0.7, 1.0]),
                    top_k=chooser.choice([0, 0, 5, 40]),
                    top_p=chooser.choice([1.0, 1.0, 0.9, 0.5]),
                    min_p=chooser.choice([0.0, 0.0, 0.05]),
                    seed=chooser.getrandbits(64),
                ),
                stop_token_ids=chooser.choice([(), stop_ids]),
                priority=chooser.randrange(3),
                adjust=_adjust(random.Random(f"{seed} {number}"), words),
            )
        )
    return made


def _adjust(chooser: random.Random, words: list[int]) -> Adjust | None:
    """What shifts or masks the logits of a third of the requests; `words`: tokens that answers are made of."""
    if chooser.random() < 2 / 3:
        return None
    biased = sorted(set(chooser.sample(words, 4)))
    phrase = chooser.randrange(len(words) - 1)
    return Adjust(
        repetition_penalty=chooser.choice([1.0, 1.2]),
        frequency_penalty=chooser.choice([0.0, 0.5]),
        presence_penalty=chooser.choice([0.0, 0.8]),
        biased=pack(biased),
        biases=np.array([chooser.uniform(-3, 3) for _ in biased], "<f4").tobytes(),
        min_tokens=chooser.choice([0, 8]),
        bad_words=(pack([words[phrase]]), pack(words[phrase : phrase + 2])),
        allowed=chooser.choice([b"", pack(sorted(set(words)))]),
    )


def alone(decoder: Decoder, requests: Sequence[Generate]) -> Truth:
    """Each request on an engine that has seen nothing else."""
    truth: Truth = {}
    for request in requests:
        truth |= Engine(decoder, Cover(), max_running=1, step_tokens=512, max_draft_tokens=0).run([request])
    return truth


def resubmitted(request: Generate, truth: Truth, chooser: random.Random) -> Generate:
    """The next attempt, which knows a random part of the output, at least a token of it."""
    said = truth[request.request_id]
    known = said[: chooser.randint(1, max(1, len(said) - 1))]
    return msgspec.structs.replace(request, attempt=request.attempt + 1, generated=pack(known))


# --- the conditions --------------------------------------------------------------------------------------------------


def batches(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    return _in_rounds(requests, chooser, lambda cover: Engine(decoder, cover, chooser))


def chunks(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    def engine(cover: Cover) -> Engine:
        running = chooser.choice([4, 8, 16])
        return Engine(decoder, cover, chooser, max_running=running, step_tokens=chooser.randint(running, 2 * running))

    return _in_rounds(requests, chooser, engine)


def preemption(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    """Admission leaves room to grow and so preempts seldom: blocks that vanish for a while make it happen."""
    return _in_rounds(requests, chooser, lambda cover: Engine(decoder, cover, chooser, _few(chooser), squeezed=True))


def priority(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    said: Truth = {}
    cover = Cover()
    for part in _rounds(requests, chooser):
        engine = Engine(decoder, cover, chooser, _few(chooser), squeezed=True)
        said |= engine.run(sorted(part, key=lambda request: request.priority + chooser.random()))
    return Run(said, cover)


def cancels(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    return _in_rounds(requests, chooser, lambda cover: Engine(decoder, cover, chooser, cancels=True))


def all_at_once(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    """Half of each round first, so that what follows finds its blocks, as far as those of the few that are left."""
    right, wrong = _right_draft(decoder, truth, chooser), _wrong_draft(decoder, chooser)
    said: Truth = {}
    cover = Cover()
    for part in _rounds(requests, chooser):
        running = chooser.choice([8, 16])
        engine = Engine(
            decoder,
            cover,
            chooser,
            _few(chooser),
            lambda stream: chooser.choice([right, wrong])(stream),
            squeezed=True,
            cancels=True,
            max_running=running,
            step_tokens=chooser.randint(running, 3 * running),
        )
        part.sort(key=lambda request: request.priority + 2 * chooser.random())
        engine.run(part[::2])
        said |= engine.run([msgspec.structs.replace(request, attempt=1000) for request in part])
    return Run(said, cover)


def _few(chooser: random.Random) -> int:
    return chooser.randint(*FEW_BLOCKS)


def warm(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    """The second time; every third request then brings a part of its output, which lies in decoded blocks."""
    said: Truth = {}
    cover = Cover()
    for part in _rounds(requests, chooser):
        engine = Engine(decoder, Cover(), chooser)
        engine.run(part)
        engine.cover = cover
        again = [msgspec.structs.replace(request, attempt=2) for request in part]
        again[::3] = [resubmitted(request, truth, chooser) for request in part[::3]]
        said |= engine.run(again)
    return Run(said, cover)


def right_drafts(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    draft = _right_draft(decoder, truth, chooser)
    return _in_rounds(requests, chooser, lambda cover: Engine(decoder, cover, chooser, draft=draft))


def wrong_drafts(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    draft = _wrong_draft(decoder, chooser)
    return _in_rounds(requests, chooser, lambda cover: Engine(decoder, cover, chooser, draft=draft))


def _right_draft(decoder: Decoder, truth: Truth, chooser: random.Random) -> Draft:
    vocabulary = decoder.vocabulary_size

    def draft(stream: Stream) -> list[int]:
        tokens = truth[stream.request.request_id][stream.delivered :][: chooser.randint(1, 8)]
        if tokens and chooser.random() < 0.3:
            tokens[chooser.randrange(len(tokens))] = chooser.randrange(vocabulary)
        return tokens

    return draft


def _wrong_draft(decoder: Decoder, chooser: random.Random) -> Draft:
    vocabulary = decoder.vocabulary_size
    return lambda stream: [chooser.randrange(vocabulary) for _ in range(chooser.randint(0, 4))]


def resubmission(decoder: Decoder, requests: Sequence[Generate], truth: Truth, chooser: random.Random) -> Run:
    again = [resubmitted(request, truth, chooser) for request in requests]
    return _in_rounds(again, chooser, lambda cover: Engine(decoder, cover, chooser))


CONDITIONS = {
    "batches": Condition(batches, ("shared_steps",)),
    "chunks": Condition(chunks, ("chunks",)),
    "preemption": Condition(preemption, ("preemptions",)),
    "priority": Condition(priority, ("priority_preemptions",)),
    "cancels": Condition(cancels, ("cancels",)),
    "warm": Condition(warm, ("cached_tokens",)),
    "right drafts": Condition(right_drafts, ("accepted_drafts",)),
    "wrong drafts": Condition(wrong_drafts, ("draft_tokens",)),
    "resubmission": Condition(resubmission, ("resumed_tokens",)),
    "all at once": Condition(
        all_at_once,
        ("chunks", "preemptions", "cancels", "accepted_drafts", "cached_tokens"),
        threads=2,
    ),
    "two threads": Condition(batches, ("shared_steps",), threads=2),
}


def compare(name: str, requests: Sequence[Generate], truth: Truth, run: Run) -> dict[str, Any]:
    """The row of one condition. `first` names the first difference of the first stream that differs."""
    flips = different = compared = 0
    first = None
    for request in requests:
        expected, said = truth[request.request_id], run.said[request.request_id]
        compared += len(expected)
        if expected == said:
            continue
        flips += 1
        length = max(len(expected), len(said))
        places = [at for at in range(length) if expected[at : at + 1] != said[at : at + 1]]
        different += len(places)
        first = first or f"first {request.request_id} at token {places[0]}"
    return {
        "condition": name,
        "tokens": compared,
        "flips": flips,
        "different_tokens": different,
        "flips_per_1e5": _per_1e5(flips, compared),
        "first": first,
        **asdict(run.cover),
    }


# --- the engine ------------------------------------------------------------------------------------------------------


class Engine:
    """A scheduler and a decoder: plan, run, commit."""

    def __init__(
        self,
        decoder: Decoder,
        cover: Cover,
        chooser: random.Random | None = None,
        blocks: int | None = None,
        draft: Draft | None = None,
        squeezed: bool = False,
        cancels: bool = False,
        **limits: int,
    ) -> None:
        """`chooser` lets requests come at random times, without it they come one by one. `draft` proposes
        tokens before each step. `squeezed`: now and then somebody else holds some of the free blocks. `cancels`: now
        and then a stream is cancelled and sent again."""
        sizes = Limits(decoder.block_size_tokens, decoder.context_length, decoder.vocabulary_size)
        limited: dict[str, Any] = {"max_running": MOST_STREAMS, "max_draft_tokens": 8 if draft else 0} | limits
        self.cover = cover
        self._decoder = decoder
        self._chooser = chooser
        self._draft = draft
        self._squeezed = squeezed
        self._cancels = cancels
        self._taken: list[int] = []
        self._scheduler = Scheduler(sizes._replace(**limited), BlockPool(blocks or decoder.blocks))
        self._scheduler.meet_drafter("bench")
        self._batch = Batch(limited["max_running"], -(-self._scheduler.length_limit // decoder.block_size_tokens),
                            decoder.vocabulary_size)
        self._said: Truth = {}
        self._open: dict[str, Generate] = {}

    def run(self, requests: Sequence[Generate]) -> Truth:
        """The output of each request. Raises RuntimeError when one fails."""
        scheduler, speculation = self._scheduler, self._scheduler.speculation
        before = (scheduler.preemptions, speculation.draft_tokens, speculation.accepted_draft_tokens)
        waiting = deque(requests)
        wanted = 0
        while waiting or self._open:
            if not self._open or (self._chooser and self._chooser.random() < 0.1):
                wanted = self._chooser.randint(1, MOST_STREAMS) if self._chooser else 1
            while waiting and len(self._open) < wanted:
                self._add(waiting.popleft())
            if self._squeezed and self._chooser and self._chooser.random() < (0.6 if self._at_a_border() else 0.1):
                self._squeeze(self._chooser)
            if self._cancels and self._chooser and self._open and self._chooser.random() < 0.05:
                self._cancel(self._chooser)
            self._step()
        self.cover.preemptions += scheduler.preemptions - before[0]
        self.cover.draft_tokens += speculation.draft_tokens - before[1]
        self.cover.accepted_drafts += speculation.accepted_draft_tokens - before[2]
        return {request.request_id: self._said.pop(request.request_id) for request in requests}

    def _add(self, request: Generate) -> None:
        self._open[request.request_id] = request
        self._said[request.request_id] = unpack(request.generated)
        self.cover.resumed_tokens += len(self._said[request.request_id])
        self._scheduler.add(request, 0.0, FAR)

    def _at_a_border(self) -> bool:
        """Whether a stream needs another block in this step: the moment when missing ones hurt."""
        size = self._decoder.block_size_tokens
        return any(len(stream.tokens) > len(stream.blocks) * size for stream in self._scheduler.running)

    def _squeeze(self, chooser: random.Random) -> None:
        """Take other free blocks than before, mostly as many as may be: the longest stream alone must always fit."""
        pool, size = self._scheduler.pool, self._decoder.block_size_tokens
        pool.release(self._taken)
        longest = max((len(request.tokens) // 4 + request.max_tokens for request in self._open.values()), default=0)
        most = max(0, min(pool.available, pool.blocks - -(-longest // size)))
        self._taken = pool.allocate(chooser.choice([most, most, chooser.randint(0, most)])) or []

    def _cancel(self, chooser: random.Random) -> None:
        """End a stream and send its request again, half the time with what was said."""
        request = chooser.choice(list(self._open.values()))
        said = pack(self._said[request.request_id]) if chooser.random() < 0.5 else b""
        self._scheduler.cancel(Cancel(request.request_id, request.attempt), 0.0)
        self._take(self._scheduler.take_events())
        self.cover.cancels += 1
        self._add(msgspec.structs.replace(request, attempt=request.attempt + 1, generated=said))

    def _step(self) -> None:
        if self._draft:
            for stream in self._scheduler.running:
                if tokens := self._draft(stream):
                    proposal = Proposal(*stream.key, base_length=len(stream.tokens), tokens=pack(tokens))
                    self._scheduler.speculation.drafts.offer(proposal)
        before = list(self._scheduler.running)
        step = self._scheduler.plan(0.0)
        self.cover.priority_preemptions += sum(stream.slot < 0 and self._overtaken(stream) for stream in before)
        self._take(self._scheduler.take_events())
        if step is None:
            return
        self.cover.steps += 1
        self.cover.most_streams = max(self.cover.most_streams, len(step.works))
        self.cover.shared_steps += len(step.works) > 1
        self.cover.chunks += sum(not work.samples for work in step.works)
        self._take(self._scheduler.commit(step, self._decoder.step(self._batch.build(step)).tolist(), 0.0))

    def _overtaken(self, stream: Stream) -> bool:
        """Whether one that came later runs on, for its priority."""
        return any(
            other.order > stream.order and other.request.priority > stream.request.priority
            for other in self._scheduler.running
        )

    def _take(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Advanced(stream, first, tokens):
                    said = self._said[stream.request.request_id]
                    if first != len(said):
                        raise RuntimeError(f"{stream.key}: token {first} came when {len(said)} were there")
                    said += tokens
                case Ended(_, Failed() as reply) | Refused(_, reply):
                    raise RuntimeError(f"{reply.request_id} did not run: {reply}")
                case Ended(stream, _):
                    self.cover.cached_tokens += stream.cached_tokens
                    del self._open[stream.request.request_id]


def _rounds(requests: Sequence[Generate], chooser: random.Random) -> Iterator[list[Generate]]:
    """All requests in a random order, a round at a time."""
    order = chooser.sample(list(requests), len(requests))
    for at in range(0, len(order), ROUND_REQUESTS):
        yield order[at : at + ROUND_REQUESTS]


def _in_rounds(requests: Sequence[Generate], chooser: random.Random, engine: Callable[[Cover], Engine]) -> Run:
    said: Truth = {}
    cover = Cover()
    for part in _rounds(requests, chooser):
        said |= engine(cover).run(part)
    return Run(said, cover)


# --- processes -------------------------------------------------------------------------------------------------------


def _share(processes: Executor, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> Iterator[Any]:
    for future in [processes.submit(function, *task) for task in tasks]:
        yield future.result()


def _alone(folder: Path, requests: Sequence[Generate]) -> tuple[Truth, float]:
    decoder = NativeDecoder.load(folder / "model.gguf", blocks=BLOCKS, threads=1)
    started = time.process_time()
    truth = alone(decoder, requests)
    cpu_s = time.process_time() - started
    decoder.close()
    return truth, cpu_s


def _disturbed(folder: Path, name: str, requests: Sequence[Generate], truth: Truth, seed: int) -> dict[str, Any]:
    condition = CONDITIONS[name]
    decoder = NativeDecoder.load(folder / "model.gguf", blocks=BLOCKS, threads=condition.threads)
    started = time.process_time()
    row = compare(name, requests, truth, condition.run(decoder, requests, truth, random.Random(f"{seed} {name}")))
    decoder.close()
    row["cpu_s"] = round(time.process_time() - started, 1)
    print(f"{name}: {row['flips']} flips, {row['cpu_s']:.0f} s of CPU", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
