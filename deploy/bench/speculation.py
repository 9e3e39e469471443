"""What a drafter brings: the same requests with it and without, in turn, through one worker on a real NATS.

    python -m deploy.bench.speculation [--workloads repetitive_1,chat_1,chat_32,remote_20ms] [--rounds N] [--json FILE]

    repetitive_1  one stream: code edits, JSON out of a text, a passage word for word
    chat_1        one stream: open questions
    chat_32       32 of them at once
    remote_20ms   one stream of either kind, with a drafter whose round trip to the broker takes 20 ms

Greedy, and sampled at the temperature such work is done with (0.3, open questions 0.8). Worker and drafter are
processes of their own. Whether a request has drafts is decided by its residency: the drafter stands in a zone that only
half of the requests allow. Each request is sent both ways, in the order AB BA, by a tenant of its own, so that no
drafter has heard its answer before; the prompt is cached both times. A pair has the same tokens, or the report says so;
`speedup` is the time without drafts, from the first token to the last, over the time with them, all pairs together,
with a 95 % interval over pairs. FILE keeps what it has of other workloads.

acceptance_length    tokens of a step that verified drafts
outcome_hit_rate     of the steps for which outcomes had been prepared before the one before had ended: those where the
                     one that came was among them
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from deploy import pull
from deploy.bench import machine
from deploy.bench.mesh import show
from deploy.bench.nats_proxy import NatsProxy, Weather
from deploy.bench.rig import MODEL, WITH_DRAFTS, WITHOUT, Rig, Stream
from deploy.bench.speculation_prompts import KINDS, REPETITIVE
from gateway.prompt import ServedModel
from shared.messages import Residency, Sampling
from shared.settings import DrafterSettings, WorkerSettings

ROUND_TRIP_S = 0.02
RESAMPLES = 2000
WARM_TOKENS = 24


@dataclass(frozen=True)
class Workload:
    """Requests of some kinds, so many at a time."""

    kinds: tuple[str, ...]
    streams: int = 1
    numbers: int = 4  # prompts of each kind a round
    max_tokens: int = 160
    sampled: float = 0.8  # the other temperature beside 0
    drafter: str = "near"


WORKLOADS = {
    "repetitive_1": Workload(REPETITIVE, sampled=0.3),
    "chat_1": Workload(("chat",), numbers=5, max_tokens=320),
    "chat_32": Workload(("chat",), streams=32, numbers=32, max_tokens=48),
    "remote_20ms": Workload((*REPETITIVE, "chat"), numbers=2, max_tokens=240, sampled=0.3, drafter="far"),
}


@dataclass(frozen=True)
class Pair:
    """One request both ways, or one crowd of them. Seconds from the first token to the last."""

    kind: str
    temperature: float
    tokens: int
    without_s: float
    with_s: float
    differing: int  # answers that differ
    drafted: int
    accepted: int
    verified_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of the worker; 0: one for each core")
    parser.add_argument("--kind", default="suffix", help="of the drafter")
    parser.add_argument("--drafter-model", default="", help="for kinds that need one: its path")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.workloads.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise SystemExit(f"--workloads: {', '.join(unknown)} is not one of {', '.join(WORKLOADS)}")
    report = uvloop.run(measure(names, options))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    show({"rows": [{"workload": row["workload"]} | detail for row in report["rows"] for detail in row["details"]]})


async def measure(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Every workload, one after the other, on one worker."""
    report: dict[str, Any] = {"machine": machine.describe(), "drafter": options.kind, "rows": []}
    command = machine.command("deploy.bench.speculation", sys.argv[1:])
    if options.json and options.json.exists():  # of a run of other workloads
        report["rows"] = [row for row in json.loads(options.json.read_text())["rows"] if row["workload"] not in names]
    folder = pull.pull("default")
    model = ServedModel.load(folder, MODEL)
    with tempfile.TemporaryDirectory() as data:
        worker = WorkerSettings(model=str(folder), engine="auto", kv_mib=512, threads=options.threads)
        async with Rig(Path(data), worker) as rig, NatsProxy(rig.port, Weather(ROUND_TRIP_S / 2)) as proxy:
            followed = ""
            for name in names:
                workload = WORKLOADS[name]
                if workload.drafter != followed:
                    if followed:
                        await rig.stop_drafter(followed)
                    followed = workload.drafter
                    settings = DrafterSettings(id=followed, kind=options.kind, model=options.drafter_model)
                    await rig.start_drafter(settings, proxy.url if followed == "far" else "")
                row = await measure_one(rig, model, workload, options.rounds)
                run = {"command": command, "commit": report["machine"]["commit"]}
                report["rows"].append({"workload": name} | row | {"run": run})
                if options.json:  # a long run that is cut off leaves what it has
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


async def measure_one(rig: Rig, model: ServedModel, workload: Workload, rounds: int) -> dict[str, Any]:
    """The row of one workload."""
    crowds = [(kind, [_prompt(model, kind, number) for number in numbers])
              for kind in workload.kinds for numbers in _crowds(workload)]
    for _, prompts in crowds:
        await asyncio.gather(*(rig.ask(prompt, Sampling(0.0), WARM_TOKENS, WITHOUT) for prompt in prompts))
    turns = [(kind, prompts, temperature) for _ in range(rounds) for kind, prompts in crowds
             for temperature in (0.0, workload.sampled)]
    before, before_s = await rig.figures(), machine.cpu_seconds([rig.pid(workload.drafter)])
    pairs: list[Pair] = []
    with_s = 0.0
    with machine.Disturbance() as lost:
        for number, (kind, prompts, temperature) in enumerate(turns):
            sides: dict[Residency, list[Stream]] = {}
            for residency in (WITHOUT, WITH_DRAFTS) if number // 2 % 2 else (WITH_DRAFTS, WITHOUT):
                sides[residency] = await asyncio.gather(*(
                    rig.ask(prompt, Sampling(temperature, seed=1000 * number + place), workload.max_tokens, residency,
                            model.card.stop_token_ids)
                    for place, prompt in enumerate(prompts)))
            pairs.append(_pair(kind, temperature, sides[WITHOUT], sides[WITH_DRAFTS]))
            with_s += pairs[-1].with_s
    figures = {name: value - before[name] for name, value in (await rig.figures()).items()}
    drafter_s = machine.cpu_seconds([rig.pid(workload.drafter)]) - before_s
    return {
        **summary(pairs),
        "outcome_hit_rate": _ratio(figures, "outcomes_hit", "outcomes_prepared"),
        "ready_rate": _ratio(figures, "drafts_ready", "drafts_wanted"),
        "drafter_cores": round(drafter_s / with_s, 3),
        "steal_cores": lost.steal_cores,
        "details": list(_details(pairs)),
        "worker": {name: round(value, 4) for name, value in figures.items()},
    }


def _prompt(model: ServedModel, kind: str, number: int) -> list[int]:
    return model.chat([{"role": "user", "content": KINDS[kind](number)}], now_s=0.0)


def _crowds(workload: Workload) -> Iterator[range]:
    for start in range(0, workload.numbers, workload.streams):
        yield range(start, start + workload.streams)


def _pair(kind: str, temperature: float, without: Sequence[Stream], drafted: Sequence[Stream]) -> Pair:
    def seconds(streams: Sequence[Stream]) -> float:
        return max(stream.arrived_s[-1] for stream in streams) - min(stream.arrived_s[0] for stream in streams)

    ends = [stream.end for stream in drafted]
    return Pair(
        kind, temperature, sum(len(stream.tokens) - 1 for stream in without), seconds(without), seconds(drafted),
        sum(a.tokens != b.tokens for a, b in zip(without, drafted, strict=True)),
        sum(end.draft_tokens for end in ends), sum(end.accepted_draft_tokens for end in ends),
        sum(end.draft_steps for end in ends))


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Figures of some pairs together."""
    rng = random.Random(5)
    samples = sorted(_speedup(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    steps, accepted = (sum(getattr(pair, name) for pair in pairs) for name in ("verified_steps", "accepted"))
    drafted = sum(pair.drafted for pair in pairs)
    return {
        "speedup": round(_speedup(pairs), 3),
        "low": round(samples[int(0.025 * RESAMPLES)], 3),
        "high": round(samples[int(0.975 * RESAMPLES)], 3),
        "median": round(statistics.median(pair.without_s / pair.with_s for pair in pairs), 3),
        "acceptance_length": round(1 + accepted / steps, 3) if steps else None,
        "accepted": round(accepted / drafted, 3) if drafted else None,
        "tok_s_without": round(sum(pair.tokens for pair in pairs) / sum(pair.without_s for pair in pairs), 1),
        "pairs": len(pairs),
        "tokens": sum(pair.tokens for pair in pairs),
        "differing": sum(pair.differing for pair in pairs),
    }


def _speedup(pairs: Sequence[Pair]) -> float:
    return sum(pair.without_s for pair in pairs) / sum(pair.with_s for pair in pairs)


def _details(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for kind, temperature in dict.fromkeys((pair.kind, pair.temperature) for pair in pairs):
        those = [pair for pair in pairs if (pair.kind, pair.temperature) == (kind, temperature)]
        yield {"kind": kind, "temperature": temperature} | summary(those)


def _ratio(figures: Mapping[str, float], part: str, whole: str) -> float | None:
    return round(figures[part] / figures[whole], 3) if figures.get(whole) else None


if __name__ == "__main__":
    main()
