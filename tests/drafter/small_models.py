"""Tiny models that draft, and what a target says, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter.drafting import Ask, Continuation, Key, Stream
from drafter.small_model import ModelDraftsman, RacingDecoder
from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from shared.messages import Sampling
from tests.kernels.tiny import Tiny, write_tiny_folder
from tests.worker.builders import plain, request

S = Key("w0", "s", 1)
FOREVER = float("inf")


def decoder_of(folder: Path, blocks: int = 64) -> Any:
    """As a worker has it, or as it would without a compiler, which is slower."""
    checkpoint = open_checkpoint(folder)
    if available() is None:
        return NativeDecoder(checkpoint, blocks=blocks, threads=1)
    return TorchDecoder(checkpoint, blocks=blocks)


def write_model(folder: Path, vocabulary: str = "abcd", **shape: Any) -> Path:
    """A tiny model with a card, as a pulled one has."""
    write_tiny_folder(folder, Tiny(**{"layers": 1, "context_length": 256} | shape))
    (folder / "card.json").write_text(json.dumps({"vocabulary": vocabulary}))
    return folder


def said(decoder: Any, prompt: list[int], count: int, sampling: Sampling) -> list[int]:
    """What the target says behind `prompt`."""
    return plain(request(prompt=prompt, max_tokens=count, sampling=sampling), decoder)


def drafting(decoder: RacingDecoder, tokens: Sequence[int], sampling: Sampling, draft_temperature: float = 1.0,
             key: Key = S) -> ModelDraftsman:
    """A draftsman that follows one stream."""
    draftsman = ModelDraftsman(decoder, "abcd", draft_temperature)
    draftsman.open(key, Stream(tokens, len(tokens), sampling))
    return draftsman


def asked(draftsman: ModelDraftsman, length: int = 8, branches: int = 0, key: Key = S,
          budget_s: float = FOREVER) -> list[Continuation]:
    """What it says, however many rounds it takes to take the text in."""
    while True:
        found = draftsman.propose([Ask(key, length, 0, branches)], budget_s)
        draftsman.lines.audit()
        if key not in draftsman.behind:
            return found
