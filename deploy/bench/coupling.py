"""How often a drafter is right that shares the target's noise, and one that drafts greedily, by draft temperature.

    python -m deploy.bench.coupling [--temperature 1] [--prompts 12] [--tokens 64] [--drafter FOLDER] [--json FILE]

Offline, on the default model: texts that it wrote itself at this temperature, and at each of their positions its logits
and a drafter's. The target's token is argmax of logits / T + G(seed, position, id); a drafter's is argmax of its own
logits / (T * draft temperature) + the same G, or just the largest logit (draft temperature 0: greedy). Each position is
tried under several seeds. Drafters: the target itself without some of its layers, untrained; the target's logits with
noise on them, a drafter that is calibrated and unsure; what repeats (kind suffix); and a small model if one is given.

    independent   a drafter that draws with noise of its own
    optimum       1 - TV: what no way of verifying can exceed, at draft temperature 1
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy import pull
from deploy.bench import machine
from deploy.bench.mesh import show
from deploy.bench.speculation_prompts import KINDS
from drafter.drafting import Ask, Key, Stream
from drafter.suffix import SuffixDraftsman
from gateway.prompt import ServedModel
from kernels.checkpoint import Checkpoint, Raw, open_checkpoint
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder, StepInputs
from shared.noise import gumbel

DRAFT_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
# of thirty layers, those that are left out
WITHOUT_LAYERS = ((14,), (12, 14, 16), (8, 11, 14, 17, 20), (5, 8, 10, 12, 14, 16, 18, 20, 22, 24))
BLURS = (0.5, 1.0)  # standard deviation of noise on the target's own logits
KINDS_USED = ("chat", "edit", "quote")
CONTEXT_TOKENS = 1024

Floats = NDArray[np.float32]


class Text(NamedTuple):
    """What the target wrote behind a prompt."""

    tokens: list[int]
    prompt_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.coupling", description=__doc__.splitlines()[0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="that the target writes behind each")
    parser.add_argument("--seeds", type=int, default=4, help="under which each position is tried")
    parser.add_argument("--drafter", type=Path, help="folder of a small model with the target's vocabulary")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row for each drafter."""
    folder = pull.pull("default")
    model = ServedModel.load(folder, "m")
    checkpoint = open_checkpoint(folder)
    target = _decoder(checkpoint)
    prompts = [model.chat([{"role": "user", "content": KINDS[KINDS_USED[number % 3]](number // 3)}], now_s=0.0)
               for number in range(options.prompts)]
    texts = [written(target, prompt, options.tokens, options.temperature, seed)
             for seed, prompt in enumerate(prompts)]
    truths = [logits_of(target, text) for text in texts]
    rows = []
    for name, guesses in drafters(checkpoint, options.drafter, truths):
        _progress(name)
        rows.append({"drafter": name} | coupled(texts, truths, guesses, options.temperature, options.seeds))
    rows.append({"drafter": "suffix"} | suffix_row(texts))
    return {"machine": machine.describe(), "command": machine.command("deploy.bench.coupling", sys.argv[1:]),
            "temperature": options.temperature, "positions": sum(map(len, truths)), "seeds": options.seeds,
            "rows": rows}


def drafters(checkpoint: Checkpoint, folder: Path | None, truths: Sequence[Floats]
             ) -> Iterator[tuple[str, Callable[[int, Text], Floats]]]:
    """Name, and what gives its logits for a text: number and text."""
    for left_out in WITHOUT_LAYERS:
        decoder = _decoder(Shallow(checkpoint, left_out))
        yield (f"{len(left_out)} of {checkpoint.config.layers} layers out",
               lambda number, text, decoder=decoder: logits_of(decoder, text))  # type: ignore[misc]
    for blur in BLURS:
        rng = np.random.default_rng(1)
        yield (f"target, logits off by {blur}",
               lambda number, text, blur=blur, rng=rng: truths[number] + np.float32(blur) * rng.standard_normal(
                   truths[number].shape, np.float32))  # type: ignore[misc]
    if folder is not None:
        small = open_checkpoint(folder)
        decoder = _decoder(small)
        ids = None if small.config.head_ids is None else np.array(small.config.head_ids)

        def spread(number: int, text: Text) -> Floats:
            known = logits_of(decoder, text)
            if ids is None:
                return known
            wide = np.full((len(known), checkpoint.config.vocabulary), -np.inf, np.float32)
            wide[:, ids] = known
            return wide

        yield folder.name, spread


class Shallow:
    """A checkpoint without some of its layers."""

    def __init__(self, whole: Checkpoint, left_out: Sequence[int]) -> None:
        self.path = whole.path
        self._whole = whole
        self._kept = [layer for layer in range(whole.config.layers) if layer not in left_out]
        windows = whole.config.windows
        self.config = replace(whole.config, layers=len(self._kept),
                              windows=None if windows is None else tuple(windows[layer] for layer in self._kept))

    def names(self) -> list[str]:
        found = []
        for name in self._whole.names():
            head, _, rest = name.removeprefix("layers.").partition(".")
            if not name.startswith("layers."):
                found.append(name)
            elif int(head) in self._kept:
                found.append(f"layers.{self._kept.index(int(head))}.{rest}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        found: tuple[int, ...] = self._whole.shape(self._there(name))
        return found

    def tensor(self, name: str) -> Any:
        return self._whole.tensor(self._there(name))

    def raw(self, name: str) -> Raw:
        return self._whole.raw(self._there(name))

    def kind(self, name: str) -> str:
        found: str = self._whole.kind(self._there(name))
        return found

    def _there(self, name: str) -> str:
        if not name.startswith("layers."):
            return name
        layer, _, rest = name.removeprefix("layers.").partition(".")
        return f"layers.{self._kept[int(layer)]}.{rest}"


def written(decoder: Decoder, prompt: Sequence[int], tokens: int, temperature: float, seed: int) -> Text:
    """What the model says."""
    text = list(prompt)
    start = 0
    for _ in range(tokens):
        inputs = _inputs(text, start, 1, temperature, seed)
        start = len(text)
        text.append(int(decoder.step(inputs)[0]))
    return Text(text, len(prompt))


def logits_of(decoder: Decoder, text: Text) -> Floats:
    """Of every token that was written, [N, V]: what was expected in its place."""
    written_tokens = len(text.tokens) - text.prompt_tokens
    return np.asarray(decoder.logits(_inputs(text.tokens[:-1], 0, written_tokens, 0.0, 0)), np.float32)


def _inputs(tokens: Sequence[int], start: int, samples: int, temperature: float, seed: int) -> StepInputs:
    rows = len(tokens) - start
    return StepInputs(
        tokens=np.array(tokens[start:], np.int32), positions=np.arange(start, len(tokens), dtype=np.int32),
        sequence_starts=np.array([0, rows], np.int32),
        block_tables=np.arange(CONTEXT_TOKENS // NativeDecoder.block_size_tokens, dtype=np.int32)[None],
        sample_rows=np.arange(rows - samples, rows, dtype=np.int32),
        temperature=np.full(samples, temperature, np.float32), top_k=np.zeros(samples, np.int32),
        top_p=np.ones(samples, np.float32), min_p=np.zeros(samples, np.float32),
        seeds=np.full(samples, seed, np.uint64))


def coupled(texts: Sequence[Text], truths: Sequence[Floats], guesses: Callable[[int, Text], Floats],
            temperature: float, seeds: int) -> dict[str, Any]:
    """The figures of one drafter: shares of positions and seeds at which it was right."""
    right: dict[float, list[float]] = {draft_temperature: [] for draft_temperature in DRAFT_TEMPERATURES}
    independent: list[float] = []
    optimum: list[float] = []
    for number, (text, truth) in enumerate(zip(texts, truths, strict=True)):
        drafts = guesses(number, text)
        for place, (logits, guess) in enumerate(zip(truth, drafts, strict=True)):
            scaled, drafted = logits / np.float32(temperature), guess / np.float32(temperature)
            p, q = _softmax(scaled), _softmax(drafted)
            independent.append(float(p @ q))
            optimum.append(float(np.minimum(p, q).sum()))
            noises = [gumbel(1000 * number + seed, text.prompt_tokens + place, np.arange(len(logits)))
                      for seed in range(seeds)]
            chosen = [int(np.argmax(scaled + noise)) for noise in noises]
            for draft_temperature, found in right.items():
                if draft_temperature == 0.0:
                    likeliest = int(np.argmax(guess))
                    found.append(sum(token == likeliest for token in chosen) / seeds)
                else:
                    warm = drafted / np.float32(draft_temperature)
                    found.append(sum(token == int(np.argmax(warm + noise))
                                     for token, noise in zip(chosen, noises, strict=True)) / seeds)
    share = {draft_temperature: float(np.mean(found)) for draft_temperature, found in right.items()}
    best = max(share, key=lambda draft_temperature: share[draft_temperature])
    gain = np.array(right[best]) - np.array(right[0.0])
    return {
        "greedy": round(share[0.0], 3),
        **{f"at_{draft_temperature:g}": round(share[draft_temperature], 3)
           for draft_temperature in DRAFT_TEMPERATURES[1:]},
        "best": best,
        "gain": round(float(gain.mean()), 3),
        "gain_error": round(float(gain.std() / np.sqrt(len(gain))), 3),
        "independent": round(float(np.mean(independent)), 3),
        "optimum": round(float(np.mean(optimum)), 3),
    }


def suffix_row(texts: Sequence[Text]) -> dict[str, Any]:
    """A drafter that has no distribution: how often it says something, and how often that is right."""
    said = right = asked = 0
    for text in texts:
        draftsman = SuffixDraftsman()
        key = Key("w", "r", 1)
        draftsman.open(key, Stream(text.tokens[:text.prompt_tokens], text.prompt_tokens))
        for place in range(text.prompt_tokens, len(text.tokens)):
            found = draftsman.propose([Ask(key, 1)], float("inf"))
            asked += 1
            if found and found[0].tokens:
                said += 1
                right += found[0].tokens[0] == text.tokens[place]
            draftsman.advance(key, place, text.tokens[place:place + 1])
    return {"greedy": round(right / said, 3) if said else None, "says_something": round(said / asked, 3)}


def _decoder(checkpoint: Checkpoint) -> Decoder:
    blocks = CONTEXT_TOKENS // NativeDecoder.block_size_tokens
    decoder: Decoder = NativeDecoder(checkpoint, blocks=blocks, threads=machine.usable_cores())
    return decoder


def _softmax(scaled: Floats) -> NDArray[np.float64]:
    wide = np.exp(scaled.astype(np.float64) - float(scaled.max()))
    spread: NDArray[np.float64] = wide / wide.sum()
    return spread


def _progress(name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{name:60}", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
