"""Drafters that die, freeze, lie and are misheard, as real processes on a real NATS; and no stream may show it.

    python -m tests.mesh.drafter_schedules [--seeds 200] [--from 0]

One worker with the mock engine, whose every token depends on all before it, and two drafters: `a-liar`, which knows the
truth and seldom says it, and `b-honest`. Both are connected through a proxy that delays, loses, doubles and reorders
what it is told to. A schedule is drawn from its seed: some streams, greedy and sampled; the weather; and blows at
whichever drafter is followed then: SIGKILL (it is started again at once), or SIGSTOP and SIGCONT. Each stream is
compared with the plain loop. Prints `n schedules, f faults, v violations`; exit 1 when a stream differs or hangs.
"""

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from deploy.bench.nats_proxy import NatsProxy, Weather
from deploy.bench.rig import THERE, WITH_DRAFTS, Rig, RigFailed
from deploy.supervisor import service_command
from shared.messages import Sampling
from shared.settings import DrafterSettings, WorkerSettings, to_flags
from tests.laws.plain import mock_stream
from worker.mock_decoder import MockDecoder

VOCABULARY = 2048
ANSWER_WITHIN_S = 30.0
CALM = Weather()
LIAR, HONEST = "a-liar", "b-honest"


@dataclass(frozen=True)
class Ask:
    """One stream."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Blow:
    """At `at_s` the drafter that is followed dies (`frozen_s` 0), or stands still for so long."""

    at_s: float
    frozen_s: float


@dataclass(frozen=True)
class Schedule:
    """What will happen."""

    asks: tuple[Ask, ...]
    blows: tuple[Blow, ...]
    weather: Weather


def drawn(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(f"{seed} processes")
    shared = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(4, 60))]
    asks = []
    for _ in range(rng.randint(2, 6)):
        own = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(1, 40))]
        asks.append(Ask(
            rng.uniform(0.0, 0.3), (*(shared if rng.random() < 0.6 else ()), *own, *own), rng.randint(20, 120),
            Sampling(temperature=rng.choice((0.0, 0.8)), seed=rng.getrandbits(64)),
            tuple(rng.randrange(1024, 1536) for _ in range(rng.choice((0, 0, 8))))))
    blows = tuple(Blow(rng.uniform(0.05, 0.6), rng.choice((0.0, rng.uniform(0.02, 0.5))))
                  for _ in range(rng.choice((0, 1, 1, 2, 3))))
    weather = Weather(
        rng.choice((0.0, 0.001, 0.01, 0.03)), rng.choice((".drafts", ".drafts", ".follow", "mill.")),
        rng.choice((0.0, 0.02, 0.2)), rng.choice((0.0, 0.1)), rng.choice((0.0, 0.1, 0.3)), rng.uniform(0.0, 0.05))
    return Schedule(tuple(asks), blows, weather)


class Drafters:
    """The two processes."""

    def __init__(self, rig: Rig, nats: str, seed: int) -> None:
        self._rig = rig
        self._nats = nats
        self._seed = seed
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.blows = 0

    async def start(self, name: str) -> None:
        flags = to_flags(DrafterSettings(id=name, nats=self._nats, zone=THERE, log_level="error"))
        self._seed += 1
        command = (service_command("tests.laws.lying_drafter", [str(self._seed), str(VOCABULARY), *flags])
                   if name == LIAR else service_command("drafter", flags))
        self._running[name] = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, start_new_session=True)

    async def strike(self, blow: Blow) -> None:
        """The one that is followed; nobody if none is."""
        await asyncio.sleep(blow.at_s)
        name = self._rig.worker.drafter if self._rig.worker is not None else ""
        process = self._running.get(name)
        if process is None or process.returncode is not None:
            return
        self.blows += 1
        if blow.frozen_s:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(blow.frozen_s)
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
        else:
            process.kill()
            await process.wait()
            await self.start(name)

    async def stop(self) -> None:
        for process in self._running.values():
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                await process.wait()


async def play(seeds: Sequence[int]) -> tuple[int, int, int]:
    """Faults, violations, and drafts that were accepted all the same."""
    decoder = MockDecoder(blocks=64, vocabulary_size=VOCABULARY)
    violations = 0
    worker = WorkerSettings(engine="mock", mock_vocabulary=VOCABULARY, kv_blocks=2048, mock_step_s=0.004,
                            mock_row_s=0.0002, mock_token_s=0.00002, max_running=16, silence_s=1.0, heartbeat_s=0.2)
    with tempfile.TemporaryDirectory() as data:
        async with Rig(Path(data), worker) as rig, NatsProxy(rig.port, CALM, seeds[0]) as proxy:
            drafters = Drafters(rig, proxy.url, 1000 * seeds[0])
            try:
                for name in (LIAR, HONEST):
                    await drafters.start(name)
                await rig.until(lambda: rig.worker is not None and bool(rig.worker.drafter), "nobody is followed")
                for seed in seeds:
                    violations += await _play_one(seed, rig, proxy, drafters, decoder)
                await asyncio.sleep(0.5)
                accepted = rig.worker.accepted_draft_tokens_total if rig.worker is not None else 0
            finally:
                await drafters.stop()
    return drafters.blows + proxy.faults, violations, accepted


async def _play_one(seed: int, rig: Rig, proxy: NatsProxy, drafters: Drafters, decoder: MockDecoder) -> int:
    schedule = drawn(seed)
    proxy.weather = schedule.weather
    blows = [asyncio.ensure_future(drafters.strike(blow)) for blow in schedule.blows]
    found = await asyncio.gather(*(_differs(rig, ask, decoder) for ask in schedule.asks))
    await asyncio.gather(*blows)
    proxy.weather = CALM
    for ask, difference in zip(schedule.asks, found, strict=True):
        if difference:
            print(f"seed {seed}, {len(ask.prompt)} tokens of prompt: {difference}", flush=True)
    return sum(map(bool, found))


async def _differs(rig: Rig, ask: Ask, decoder: MockDecoder) -> str:
    """What is wrong with the stream; empty if nothing is."""
    await asyncio.sleep(ask.at_s)
    truth = list(mock_stream(decoder, ask.prompt, ask.sampling, ask.max_tokens, ask.stop_token_ids))
    try:
        stream = await rig.ask(ask.prompt, ask.sampling, ask.max_tokens, WITH_DRAFTS, ask.stop_token_ids, tenant="t",
                               within_s=ANSWER_WITHIN_S)
    except RigFailed as error:
        return str(error)
    if stream.tokens == truth:
        return ""
    place = next((place for place, pair in enumerate(zip(stream.tokens, truth, strict=False)) if pair[0] != pair[1]),
                 min(len(stream.tokens), len(truth)))
    return f"{len(stream.tokens)} tokens for {len(truth)}, other from number {place} on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--from", type=int, default=0, dest="first")
    options = parser.parse_args()
    began = time.perf_counter()
    faults, violations, accepted = uvloop.run(play(range(options.first, options.first + options.seeds)))
    print(f"{accepted} drafts were accepted; {time.perf_counter() - began:.0f} s")
    print(f"{options.seeds} schedules, {faults} faults, {violations} violations")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
