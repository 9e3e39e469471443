"""What a grammar is worth and costs: answers to random JSON schemas, with drafts and without, beside none at all.

    python -m deploy.bench.grammar [--schemas 1000] [--streams 16] [--json FILE]

The default model answers each of `schemas.schema(0)`, `schema(1)`, ... at temperature 1, many at once, through the
worker's scheduler, block pool and batch in a loop without bus and without time.

    validity   each answer is read by the package `jsonschema`; one that was cut at `MOST_TOKENS` counts apart. With
               drafts (right ones of which every third has one token changed, beside those that the grammar forces)
               each stream must be what it was without.
    speed      streams side by side with a grammar and, in turns, the same prompts for as many tokens without one;
               tokens a second of the steps that decode, drafts off. `forced`: again with the tokens that the grammar
               leaves no choice about taken as drafts.

Ends with 1 when an answer does not fit its schema, or drafts changed one.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from msgspec.structs import replace

from deploy import pull
from deploy.bench import machine
from deploy.bench.mesh import show
from deploy.bench.schemas import schema
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder
from shared.messages import Generate, Grammar, Proposal, Sampling
from shared.tokens import pack, unpack
from shared.vocabulary import FILE, load_vocabulary
from worker.batch import Batch
from worker.grammar import Grammars
from worker.kv_blocks import BlockPool
from worker.scheduler import Advanced, Limits, Scheduler

MOST_TOKENS = 300
BLOCKS = 2048
SPEED_STREAMS = (1, 16)
SPEED_ROUNDS = 3
FAR = 1e18

Said = dict[str, list[int]]


class Run(NamedTuple):
    """What streams said. Seconds and tokens of the steps in which every row was a stream's next token or a draft."""

    said: Said
    decode_s: float
    decode_tokens: int
    drafts: int
    accepted_drafts: int
    forced_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.grammar", description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=16, help="answers at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options.schemas, options.streams)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show({"rows": report["validity"]})
    show({"rows": report["rows"]})
    if wrong := complaints(report):
        raise SystemExit("\n".join(wrong))


def measure(count: int, streams: int) -> dict[str, Any]:
    """Validity of `count` schemas, and speed."""
    folder = pull.pull("default")
    tokenizer, card = Tokenizer.load(folder), load_card(folder)
    decoder = NativeDecoder.load(folder / "model.gguf", blocks=BLOCKS)
    grammars = Grammars(lambda: load_vocabulary(folder / FILE), decoder.vocabulary_size)
    requests = [_request(number, tokenizer, card.stop_token_ids) for number in range(count)]
    with machine.Disturbance() as lost:
        plain = run(decoder, grammars, requests, streams)
        print(f"{count} schemas without drafts: {sum(map(len, plain.said.values()))} tokens", file=sys.stderr)
        drafted = run(decoder, grammars, requests, streams, plain.said)
        validity = [_validity("without", requests, plain, plain, tokenizer),
                    _validity("with", requests, drafted, plain, tokenizer)]
        rows = [_speed(decoder, grammars, requests, plain.said, side_by_side) for side_by_side in SPEED_STREAMS]
    decoder.close()
    return {"machine": machine.describe(), "command": machine.command("deploy.bench.grammar", sys.argv[1:]),
            "recipe": NativeDecoder.recipe, "steal_cores": lost.steal_cores, "validity": validity, "rows": rows}


def complaints(report: dict[str, Any]) -> list[str]:
    """Why the report fails; empty when all answers fit and drafts changed none."""
    wrong = []
    for row in report["validity"]:
        if row["invalid"]:
            wrong.append(f"{row['drafts']} drafts: {row['invalid']} answers do not fit, schemas {row['which'][:10]}")
        if row["changed"]:
            wrong.append(f"{row['drafts']} drafts: {row['changed']} answers are not what they are without")
    return wrong


def run(decoder: Decoder, grammars: Grammars, requests: Sequence[Generate], streams: int, truth: Said | None = None,
        forced: bool = False) -> Run:
    """All requests, so many at a time. `truth`: what to draft from; `forced`: only what grammars force."""
    limits = Limits(decoder.block_size_tokens, decoder.context_length, decoder.vocabulary_size, max_running=streams,
                    max_waiting=len(requests), max_draft_tokens=8 if truth is not None or forced else 0)
    scheduler = Scheduler(limits, BlockPool(decoder.blocks))
    batch = Batch(streams, -(-scheduler.length_limit // limits.block_size), limits.vocabulary_size)
    said: Said = {request.request_id: [] for request in requests}
    for request in requests:
        state = grammars.begin(request.grammar, []) if request.grammar is not None else None
        scheduler.add(request, 0.0, FAR, state)
    chooser = random.Random(1)
    seconds, tokens = 0.0, 0
    while True:
        if truth is not None:
            for stream in scheduler.running:
                if draft := _draft(truth[stream.request.request_id][stream.delivered:][:8], chooser):
                    scheduler.drafts.offer(Proposal(*stream.key, base_length=len(stream.tokens), tokens=pack(draft)))
        began = time.perf_counter()
        step = scheduler.plan(0.0)
        if step is None:
            break
        chosen = decoder.step(batch.build(step)).tolist()
        events = scheduler.commit(step, chosen, 0.0)
        took_s = time.perf_counter() - began
        scheduler.cost.observe(step.sampled, step.rows - step.sampled, took_s)
        made = 0
        for event in events:
            if isinstance(event, Advanced):
                said[event.sequence.request.request_id] += event.tokens
                made += len(event.tokens)
        if step.rows == step.sampled and step.streams == streams:
            seconds += took_s
            tokens += made
    return Run(said, seconds, tokens, scheduler.draft_tokens, scheduler.accepted_draft_tokens, scheduler.forced_tokens)


def _draft(right: list[int], chooser: random.Random) -> list[int]:
    """Every third has one token changed."""
    if right and chooser.random() < 1 / 3:
        right[chooser.randrange(len(right))] = chooser.randrange(1000)
    return right


def _request(number: int, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Generate:
    prompt = tokenizer.encode(f"Record {number} as JSON:\n", add_special=False)
    return Generate(f"r{number}", attempt=1, gateway="bench", model="default", tokens=pack(prompt),
                    max_tokens=MOST_TOKENS, deadline=FAR, sampling=Sampling(temperature=1.0, seed=number),
                    stop_token_ids=stop_ids, grammar=Grammar("json", json.dumps(schema(number))))


def _validity(drafts: str, requests: Sequence[Generate], found: Run, plain: Run,
              tokenizer: Tokenizer) -> dict[str, Any]:
    """One row of the report. An answer that ended must fit; one that was cut counts apart."""
    from jsonschema import ValidationError, validate

    invalid, cut, changed = [], 0, 0
    for number, request in enumerate(requests):
        tokens = found.said[request.request_id]
        changed += tokens != plain.said[request.request_id]
        ended = tokens[:-1] if tokens and tokens[-1] in request.stop_token_ids else tokens
        if len(tokens) == MOST_TOKENS:
            cut += 1
            continue
        try:
            validate(json.loads(tokenizer.decode(ended)), schema(number))
        except (ValueError, ValidationError):
            invalid.append(number)
    return {"drafts": drafts, "schemas": len(requests), "tokens": sum(map(len, found.said.values())),
            "valid": len(requests) - len(invalid) - cut, "invalid": len(invalid), "cut": cut, "changed": changed,
            "draft_tokens": found.drafts, "accepted": found.accepted_drafts, "forced": found.forced_tokens,
            "which": invalid}


def _speed(decoder: Decoder, grammars: Grammars, requests: Sequence[Generate], said: Said,
           streams: int) -> dict[str, Any]:
    """Tokens a second with and without a grammar, `streams` at a time; medians of some rounds in turns."""
    chosen = sorted(requests, key=lambda request: -len(said[request.request_id]))[: max(4, 2 * streams)]
    free = [replace(request, grammar=None, stop_token_ids=(), max_tokens=len(said[request.request_id]))
            for request in chosen]
    rates: dict[str, list[float]] = {"grammar": [], "plain": [], "forced": []}
    for _ in range(SPEED_ROUNDS):
        for name, runs in (("plain", free), ("grammar", chosen), ("forced", chosen)):
            found = run(decoder, grammars, runs, streams, forced=name == "forced")
            rates[name].append(found.decode_tokens / found.decode_s)
    rounds = {name: median(values) for name, values in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["grammar"], rates["plain"], strict=True)]
    return {"streams": streams, "answers": len(chosen),
            "prompt_tokens": sum(len(unpack(request.tokens)) for request in chosen),
            "grammar_tok_s": round(rounds["grammar"], 1), "plain_tok_s": round(rounds["plain"], 1),
            "ratio": round(median(ratios), 3), "forced_tok_s": round(rounds["forced"], 1),
            "forced_ratio": round(rounds["forced"] / rounds["plain"], 3)}


if __name__ == "__main__":
    main()
