"""The load behind a price sheet: each side of it driven at each operating point, in turn, and what was seen.

    questions   what people ask for: code to edit, records to write, passages to quote, open talk; answers end where
                they end. The only load on which drafts may be judged
    512/64      prompts of about 512 tokens of plain English, answers of exactly 64: whatever the model says, drafts
                would guess its loops, so sides with drafters do not get it

Rules: no two prompts of a side begin alike, so that a cache hit is what templates share and no more; sides are asked
the same, and take turns, run by run; what warms a side up is not counted.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from deploy import broker, hub, pull
from deploy.bench import load, machine, prompts
from deploy.bench.speculation_prompts import KINDS
from deploy.energy import Meter
from deploy.local_mesh import LocalMesh, Options, UpFailed
from deploy.price_sheet import Point, Run
from gateway.model_files import load_card

QUESTIONS = "questions"
LEAST_REQUESTS = 4
TOKENS_A_SENTENCE = 19.0  # of deploy.bench.prompts, until a tokenizer has said
RUN_WITHIN_S = 600.0
Report = Callable[[str, int, int], None]  # what runs now, runs done, runs in all


class LoadFailed(Exception):
    """One sentence on why there is nothing to measure."""


class Workload(NamedTuple):
    """`prompt_tokens` of 0: questions."""

    name: str
    prompt_tokens: int
    output_tokens: int

    @property
    def fixed(self) -> bool:
        return bool(self.prompt_tokens)


@dataclass
class Driven:
    """One side under load. `pids`: the processes of its mesh, where they are ours."""

    name: str
    url: str
    model: str
    drafts: bool = False
    key: str = ""
    pids: Sequence[int] = ()
    sentence_tokens: float = TOKENS_A_SENTENCE
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)


def workloads(text: str, output_tokens: int) -> list[Workload]:
    """`questions,512/64` as workloads; `output_tokens` is the most of a question's answer. Raises ValueError."""
    found = []
    for word in dict.fromkeys(word.strip() for word in text.split(",")):
        if word == QUESTIONS:
            found.append(Workload(word, 0, output_tokens))
            continue
        prompt, slash, output = word.partition("/")
        if not (slash and prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise ValueError(f"{word!r} is no workload: write questions, or tokens of prompt and answer such as 512/64")
        found.append(Workload(word, int(prompt), int(output)))
    return found


def requests_of(workload: Workload, model: str, count: int, numbers: "itertools.count[int]",
                sentence_tokens: float = TOKENS_A_SENTENCE) -> list[dict[str, object]]:
    """`count` greedy chat requests, none of which begins as another one did. Kinds of questions take turns."""
    sentences = max(1, round(workload.prompt_tokens / sentence_tokens))
    kinds = list(KINDS.values())
    found: list[dict[str, object]] = []
    for number in itertools.islice(numbers, count):
        asked = prompts.words(number, sentences) if workload.fixed else kinds[number % len(kinds)](number)
        body: dict[str, object] = {"model": model, "temperature": 0, "max_tokens": workload.output_tokens,
                                   "messages": [{"role": "user", "content": f"{number + 1}.\n\n{asked}"}]}
        found.append(body | ({"ignore_eos": True} if workload.fixed else {}))
    return found


def run_of(seen: load.Load, asked: Workload, requests: int) -> Run:
    """What a load saw, as a run of a sheet."""
    wrong = requests - len(seen.lengths)
    if asked.fixed:
        wrong += sum(length != asked.output_tokens for length in seen.lengths.values())
    ttft_ms, tpot_ms, e2e_ms = (tuple(round(1e3 * each, 2) for each in times)
                                for times in (seen.ttft_s, seen.tpot_s, seen.e2e_s))
    return Run(
        wall_us=round(1e6 * seen.wall_s), requests=requests, failures=len(seen.failures), wrong_lengths=wrong,
        prompt_tokens=seen.prompt_tokens, cached_tokens=seen.cached_tokens, output_tokens=seen.completion_tokens,
        draft_tokens=seen.draft_tokens, accepted_draft_tokens=seen.accepted_draft_tokens, chunks=seen.chunks,
        ttft_ms=ttft_ms, tpot_ms=tpot_ms, e2e_ms=e2e_ms,
        itl_tenths=dict(sorted(Counter(round(1e4 * gap) for gap in seen.itl_s).items())))


async def measure(sides: Sequence[Driven], asked: Sequence[Workload], at_once: Sequence[int], runs: int, waves: int,
                  report: Report = lambda what, done, total: None) -> list[Point]:
    """Every side at every point, run by run in turn; `waves` requests of each stream. Raises LoadFailed."""
    plan = [(side, workload, streams) for workload in asked for streams in at_once for side in sides
            if not (workload.fixed and side.drafts)]
    if not plan:
        raise LoadFailed("nothing would be measured: drafts are judged on questions alone, so add questions to "
                         "--workloads, or a side without drafters")
    for side in sides:
        await _warm(side, asked)
    seen: dict[tuple[str, str, int], list[Run]] = {}
    done = 0
    for workload, streams in itertools.product(asked, at_once):
        turn = [one for one in plan if one[1:] == (workload, streams)]
        for number in range(runs):
            # who was second is first in the next run
            for side, _, _ in turn[::-1] if number % 2 else turn:
                report(f"{side.name}, {workload.name}, {streams} at once", done, runs * len(plan))
                run = await _once(side, workload, streams, max(LEAST_REQUESTS, waves * streams))
                seen.setdefault((side.name, workload.name, streams), []).append(run)
                done += 1
    report("", done, runs * len(plan))
    return [Point(side.name, workload.name, workload.fixed, streams, tuple(seen[side.name, workload.name, streams]))
            for side, workload, streams in plan]


async def _warm(side: Driven, asked: Sequence[Workload]) -> None:
    """A few requests of each workload; they say how many tokens a sentence has here. Raises LoadFailed."""
    for workload in asked:
        bodies = requests_of(workload._replace(output_tokens=8), side.model, 2, side.numbers, side.sentence_tokens)
        seen = await _driven(side, bodies, 2)
        if seen.failures or not seen.e2e_s:
            raise LoadFailed(f"{side.url} does not answer: {seen.failures[0] if seen.failures else 'no text came'}")
        if workload.fixed and seen.prompt_tokens:
            side.sentence_tokens *= seen.prompt_tokens / (len(bodies) * workload.prompt_tokens)


async def _once(side: Driven, workload: Workload, streams: int, requests: int) -> Run:
    bodies = requests_of(workload, side.model, requests, side.numbers, side.sentence_tokens)
    here = side.pids or load.endpoint(side.url).host in ("127.0.0.1", "::1", "localhost")
    before, meter = machine.cpu_seconds(list(side.pids)) if side.pids else 0.0, Meter()
    with machine.Disturbance() as lost:
        seen = await _driven(side, bodies, streams)
    run = run_of(seen, workload, requests)
    if not here:
        return run
    cores = round((machine.cpu_seconds(list(side.pids)) - before) / seen.wall_s, 3) if side.pids else None
    return msgspec.structs.replace(run, mesh_cores=cores, busy_cores=lost.busy_cores,
                                   steal_cores=lost.steal_cores, joules=meter.joules())


async def _driven(side: Driven, bodies: Sequence[dict[str, object]], streams: int) -> load.Load:
    try:
        return await load.run(side.url, bodies, streams, RUN_WITHIN_S, side.key)
    except TimeoutError:
        raise LoadFailed(f"{side.name}: {len(bodies)} requests, {streams} at once, did not end within "
                         f"{RUN_WITHIN_S:.0f} s: ask for fewer with --waves, or for shorter answers") from None
    except ValueError as error:
        raise LoadFailed(str(error)) from None


# --- what is driven --------------------------------------------------------------------------------------------------


async def first_model(url: str, key: str = "") -> str:
    """The first name that an endpoint serves. Raises LoadFailed, ValueError for a `url` that is none."""
    where = load.endpoint(url)
    try:
        base = f"{'https' if where.tls else 'http'}://{where.host}:{where.port}{where.path}"
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            answer = await client.get(f"{base}/v1/models",
                                      headers={"authorization": f"Bearer {key}"} if key else {})
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise LoadFailed(f"{url} does not say which models it serves ({error}): name one with --model") from None


@asynccontextmanager
async def meshes(folders: Sequence[Path], data: Path, drafters: Sequence[int], workers: int,
                 engine: str) -> AsyncIterator[list[Driven]]:
    """A mesh of our own for each model and number of drafters, all up at the same time. Raises LoadFailed."""
    async with AsyncExitStack() as kept:
        sides: list[Driven] = []
        for folder, count in itertools.product(folders, drafters):
            options = Options(model=folder, data=data / f"mesh-{len(sides) + 1}", port=broker.free_port(),
                              workers=workers, drafters=count, engine=engine, log_level="warning", drain_s=5.0)
            try:
                mesh = await kept.enter_async_context(LocalMesh(options))
                await mesh.until_ready()
            except UpFailed as error:
                raise LoadFailed(str(error)) from None
            model = load_card(folder).name
            name = f"{model} " * (len(folders) > 1) + ("with drafts" if count else "without drafts")
            pids = [child.pid for child in mesh.children if child.pid]
            sides.append(Driven(name, mesh.url, model, bool(count), pids=pids))
        # workers measure their own steps when they are ready
        await asyncio.sleep(1.0)
        yield sides


def revision(folder: Path) -> str:
    """Of the weights in a pulled model's folder: the hub's, or a digest."""
    if (folder / hub.STATE).is_file():
        return msgspec.json.decode((folder / hub.STATE).read_bytes(), type=hub.State).revision
    if folder.name == pull.DEFAULT_NAME:
        return f"sha256 {pull.DEFAULT_GGUF_SHA256[:16]}"
    return f"files {load_card(folder).source[:16]}"
