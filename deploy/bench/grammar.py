"""What a grammar is worth and costs: answers to random JSON schemas, with drafts and without, beside none at all.

    python -m deploy.bench.grammar [--schemas 1000] [--streams 16] [--json FILE]

The default model answers each of `schemas.schema(0)`, `schema(1)`, ... at temperature 1, many at once, through the
worker's scheduler, block pool and batch in a loop without bus and without time.

    validity   each answer is read by the package `jsonschema`; one that was cut at `MOST_TOKENS` counts apart. With
               drafts (right ones of which every third has one token changed, beside those that the grammar forces)
               each stream must be what it was without.
    speed      streams side by side with a grammar and, in turns, the same prompts for as many tokens without one;
               tokens a second of the steps that decode, drafts off. `forced`: again as a worker does it, which computes
               the tokens that the grammar leaves no choice about together.

The report is written after every 50 schemas, and with a file that was begun the command goes on there.
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
from worker.events import Advanced
from worker.grammar import Grammars
from worker.kv_blocks import BlockPool
from worker.scheduler import Limits, Scheduler

MOST_TOKENS = 300
# so many schemas at a time, after which what was found is written down
PART, LONGEST = 50, 32
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
    parser.add_argument("--json", type=Path, help="the report; one that was begun is gone on with")
    parser.add_argument("--parts", default="validity,speed", help="what of both to do now")
    options = parser.parse_args()
    report = measure(options.schemas, options.streams, options.json, options.parts.split(","))
    show({"rows": report["validity"]})
    show({"rows": report["rows"]})
    if wrong := complaints(report):
        raise SystemExit("\n".join(wrong))


def measure(count: int, streams: int, kept: Path | None = None,
            parts: Sequence[str] = ("validity", "speed")) -> dict[str, Any]:
    """Validity of `count` schemas, some at a time, then speed. `kept`: the report as far as it has come.

    Raises SystemExit where `kept` is a report of something else.
    """
    folder = pull.pull("default")
    tokenizer, card = Tokenizer.load(folder), load_card(folder)
    decoder = NativeDecoder.load(folder / "model.gguf", blocks=BLOCKS)
    grammars = Grammars(lambda: load_vocabulary(folder / FILE), decoder.vocabulary_size)
    report = _begun(kept, {"streams": streams, "recipe": NativeDecoder.recipe})
    with machine.Disturbance() as lost:
        for first in range(report["done"], count if "validity" in parts else 0, PART):
            requests = [_request(number, tokenizer, card.stop_token_ids)
                        for number in range(first, min(count, first + PART))]
            plain = run(decoder, grammars, requests, streams)
            drafted = run(decoder, grammars, requests, streams, plain.said)
            for row, found in zip(report["validity"], (plain, drafted), strict=True):
                _add(row, _validity(requests, found, plain, tokenizer))
            lengths = {name: len(tokens) for name, tokens in plain.said.items()}
            report["longest"] = dict(sorted((report["longest"] | lengths).items(), key=lambda each: -each[1])[:LONGEST])
            report["done"] = first + len(requests)
            print(f"{report['done']} of {count} schemas", file=sys.stderr, flush=True)
            _keep(kept, report, lost)
        longest = [(_request(int(name[1:]), tokenizer, card.stop_token_ids), length)
                   for name, length in report["longest"].items()]
        for side_by_side in SPEED_STREAMS[len(report["rows"]):] if "speed" in parts else ():
            report["rows"].append(_speed(decoder, grammars, longest, side_by_side))
            _keep(kept, report, lost)
    decoder.close()
    return report


def _begun(kept: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with: the one in `kept`, or an empty one."""
    nothing = {"schemas": 0, "tokens": 0, "valid": 0, "invalid": 0, "cut": 0, "changed": 0, "draft_tokens": 0,
               "accepted": 0, "forced": 0, "which": []}
    if kept is None or not kept.exists():
        return {"machine": machine.describe(), "command": machine.command("deploy.bench.grammar", sys.argv[1:]),
                "commits": [machine.commit()], **about, "steal_cores": 0.0, "done": 0, "longest": {},
                "validity": [{"drafts": drafts, **nothing} for drafts in ("without", "with")], "rows": []}
    report: dict[str, Any] = json.loads(kept.read_text())
    if {name: report.get(name) for name in about} != about:
        raise SystemExit(f"{kept} is a report of other options or of another recipe: give another file")
    report["commits"] = list(dict.fromkeys([*report["commits"], machine.commit()]))
    return report


def _keep(kept: Path | None, report: dict[str, Any], lost: machine.Disturbance) -> None:
    lost.look()
    report["steal_cores"] = max(report["steal_cores"], lost.steal_cores)
    if kept is not None:
        kept.write_text(json.dumps(report, indent=1) + "\n")


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        total[name] += value


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
                    max_waiting=len(requests), max_draft_tokens=8 if truth is not None else 0,
                    max_forced_tokens=8 if truth is not None or forced else 0)
    scheduler = Scheduler(limits, BlockPool(decoder.blocks))
    scheduler.meet_drafter("bench")
    speculation = scheduler.speculation
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
                    speculation.drafts.offer(Proposal(*stream.key, base_length=len(stream.tokens), tokens=pack(draft)))
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
    return Run(said, seconds, tokens, speculation.draft_tokens, speculation.accepted_draft_tokens,
               speculation.forced_tokens)


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


def _validity(requests: Sequence[Generate], found: Run, plain: Run, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a part adds to its row of the report. An answer that ended must fit; one that was cut counts apart."""
    from jsonschema import ValidationError, validate

    invalid, cut, changed = [], 0, 0
    for request in requests:
        number = int(request.request_id[1:])
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
    return {"schemas": len(requests), "tokens": sum(map(len, found.said.values())),
            "valid": len(requests) - len(invalid) - cut, "invalid": len(invalid), "cut": cut, "changed": changed,
            "draft_tokens": found.drafts, "accepted": found.accepted_drafts, "forced": found.forced_tokens,
            "which": invalid}


def _speed(decoder: Decoder, grammars: Grammars, longest: Sequence[tuple[Generate, int]],
           streams: int) -> dict[str, Any]:
    """Tokens a second with and without a grammar, `streams` at a time; medians of some rounds in turns.

    `longest`: requests with the tokens that their answers have.
    """
    most = longest[:max(2, streams)]
    chosen = [request for request, _ in most]
    free = [replace(request, grammar=None, stop_token_ids=(), max_tokens=length) for request, length in most]
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
