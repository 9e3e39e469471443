"""Whether timing tells one tenant what another has asked.

    python -m deploy.bench.isolation [--engines mock,auto] [--repeats 60] [--prompt-tokens 256] [--json FILE]

Real processes, a tenants file with two tenants, one worker, so that whatever could be shared is in one place. A repeat
measures three times to the first token, in an order of its own; before each of them tenant A has just asked something,
so that all else is alike:

    probe     A asks a text that is new, then B asks the same text
    fresh     A asks a text that is new, then B asks another one that is new
    repeat    A asks a text that is new, then A asks it again: what a leak would look like

`effect` is probe less fresh, `control` repeat less fresh. `guessed` is how often somebody is right who sees one pair
and takes the faster one for what was asked before: 0.5 is chance. Texts of made-up words, not tokens: whatever a
gateway may remember of a text is in it too.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from deploy import broker, keys, pull
from deploy.bench import load, machine, paired
from deploy.bench.paired import Interval
from deploy.local_mesh import LocalMesh, Options
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer

KINDS = ("probe", "fresh", "repeat")
WARM = 4  # requests of each tenant that nobody measures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.isolation", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="mock,auto", help="as `tokenmill up --engine` takes them")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="about so many")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.repeats < paired.LEAST_PAIRS:
        parser.error(f"--repeats {options.repeats} gives no interval: {paired.LEAST_PAIRS} or more")
    report = asyncio.run(measure(options.engines.split(","), options.repeats, options.prompt_tokens))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(line for found in report["rows"] for line in lines(found)))


async def measure(engines: list[str], repeats: int, prompt_tokens: int) -> dict[str, Any]:
    """One row per engine."""
    rows = [await _engine(engine, repeats, prompt_tokens) for engine in engines]
    words = ["--engines", ",".join(engines), "--repeats", str(repeats), "--prompt-tokens", str(prompt_tokens)]
    return {"machine": machine.describe(), "command": machine.command("deploy.bench.isolation", words), "rows": rows}


async def _engine(engine: str, repeats: int, prompt_tokens: int) -> dict[str, Any]:
    model = pull.pull("default")
    tokenizer = Tokenizer.load(model)
    with tempfile.TemporaryDirectory() as data:
        tenants = Path(data) / "tenants.toml"
        key = {name: keys.create(tenants, name, datetime.now(UTC)).key for name in ("a", "b")}
        options = Options(model=model, data=Path(data) / "mesh", port=broker.free_port(), engine=engine, drafters=0,
                          log_level="warning", tenants=tenants)
        async with LocalMesh(options) as mesh:
            await mesh.until_ready()
            asking = _Asking(mesh.url, load_card(model).name, key, Texts(tokenizer, prompt_tokens))
            for _ in range(WARM):
                for name in key:
                    await asking.one(name, asking.texts.new())
            with machine.Disturbance() as lost:
                for repeat in range(repeats):
                    for kind in random.Random(repeat).sample(KINDS, len(KINDS)):
                        await asking.measure(kind)
    return row(engine, asking.ttft_s, asking.cached) | {"steal_cores": lost.steal_cores}


class Texts:
    """Texts of about `tokens` tokens, no two of which share a block, or a word that others use."""

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._made = 0

    def new(self) -> str:
        """One that nobody has asked."""
        self._made += 1
        chooser = random.Random(self._made)
        words = ("".join(chooser.choices(ascii_lowercase, k=chooser.randint(4, 9))) for _ in range(self._tokens))
        ids = self._tokenizer.encode(" ".join(words), add_special=False)
        return self._tokenizer.decode(ids[:self._tokens])


class _Asking:
    """Requests of two tenants, one after the other, and what was seen of those that count."""

    def __init__(self, url: str, model: str, key: dict[str, str], texts: Texts) -> None:
        self.texts = texts
        self.ttft_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.cached: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._url = url
        self._model = model
        self._key = key

    async def measure(self, kind: str) -> None:
        """One time to the first token."""
        text = self.texts.new()
        await self.one("a", text)
        seen = await self.one("a" if kind == "repeat" else "b", self.texts.new() if kind == "fresh" else text)
        self.ttft_s[kind].append(seen.ttft_s[0])
        self.cached[kind] += seen.cached_tokens

    async def one(self, tenant: str, text: str) -> load.Load:
        """Raises SystemExit when it fails."""
        body = {"model": self._model, "prompt": text, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        seen = await load.run(self._url, [body], streams=1, key=self._key[tenant])
        if seen.failures or not seen.ttft_s:
            raise SystemExit(f"a request failed: {(seen.failures or ['no text came'])[0]}")
        return seen


def row(engine: str, ttft_s: dict[str, list[float]], cached: dict[str, int]) -> dict[str, Any]:
    """What the measurements say, in milliseconds."""
    effect = paired.differences(ttft_s["probe"], ttft_s["fresh"])
    control = paired.differences(ttft_s["repeat"], ttft_s["fresh"])
    found: dict[str, Any] = {"engine": engine, "repeats": len(effect)}
    found |= {f"{kind}_ttft_ms": round(1000 * statistics.median(ttft_s[kind]), 2) for kind in KINDS}
    found |= {f"{kind}_cached_tokens": cached[kind] for kind in KINDS}
    for name, values in (("effect", effect), ("control", control)):
        found |= _shown(f"{name}_median_ms", paired.median(values), 1000)
        found |= _shown(f"{name}_mean_ms", paired.mean(values), 1000)
        found |= _shown(f"{name}_guessed", paired.share(sum(value < 0 for value in values), len(values)), 1)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """A row as sentences."""
    def told(name: str) -> str:
        low, high = found[f"{name}_95"]
        return f"{found[name]:g} ({low:g} to {high:g})"

    return [f"{found['engine']}, {found['repeats']} repeats, medians with 95 % intervals:",
            f"  B's first token: {found['probe_ttft_ms']:g} ms where A had asked the same, "
            f"{found['fresh_ttft_ms']:g} ms where nobody had: {told('effect_median_ms')} ms apart",
            f"  who takes the faster one for asked before is right {told('effect_guessed')} of the time; "
            f"{found['probe_cached_tokens']} tokens were cached",
            f"  A's own repeat: {found['repeat_ttft_ms']:g} ms, {told('control_median_ms')} ms apart, "
            f"right {told('control_guessed')}"]


def _shown(name: str, interval: Interval, scale: float) -> dict[str, list[float] | float]:
    return {name: round(scale * interval.value, 3),
            f"{name}_95": [round(scale * interval.low, 3), round(scale * interval.high, 3)]}


if __name__ == "__main__":
    main()
