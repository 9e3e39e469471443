"""`tokenmill certify`: two checkpoints read the same texts, and `deploy.certificate` says how they differ.

Both are computed in float32 from the weights as they are stored: what is measured is the weights, not an engine.
"""

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from deploy.bench.departure import Departure
from deploy.certificate import Certificate, Side, Text, compared, page
from gateway import model_files
from gateway.tokenizer import Tokenizer
from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from worker.compress.writing import Job, step_inputs

TEXTS = Path(__file__).with_name("texts")
SHIPPED = ("prose.txt", "code.txt")
LICENCE = "Apache-2.0, tokenmill's own"
WINDOW = 256

Report = Callable[[int, int], None]  # windows read, in all


class CertifyFailed(Exception):
    """One clear sentence on why there is no certificate."""


def certify(model: Path, baseline: Path, *, out: Path, tokens: int, text: Path | None, report: Report) -> Certificate:
    """Compare two pulled models, and write certificate.json and certificate.md into `out`.

    `tokens`: positions of each text, at least, in whole windows. `text`: a file to read instead of the shipped ones.
    Raises CertifyFailed.
    """
    began = time.monotonic()
    try:
        if model_files.load_card(model).vocabulary != model_files.load_card(baseline).vocabulary:
            raise ValueError(f"{model.name} and {baseline.name} have different vocabularies, so their predictions "
                             "cannot be compared: certify against the model it was made from")
        files = [text] if text is not None else [TEXTS / name for name in SHIPPED]
        tokenizer = Tokenizer.load(baseline)
        cut = {file: windows_of(tokenizer.encode(file.read_text(), add_special=False), tokens, file.name)
               for file in files}
        decoders = [TorchDecoder.load(folder, blocks=WINDOW // 16) for folder in (baseline, model)]
        total, done = sum(map(len, cut.values())), 0
        texts: list[Text] = []
        for file, windows in cut.items():
            departures = []
            for window in windows:
                truth, other = (_logits(decoder, window)[:-1] for decoder in decoders)
                departure = Departure()
                departure.add(truth, other, np.array(window[1:], np.int32))
                departures.append(departure)
                done += 1
                report(done, total)
            licence = LICENCE if text is None else "a file of the user's"
            digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            texts.append(compared(file.name, licence, digest, departures))
        certificate = Certificate(
            model=side_of(model), baseline=side_of(baseline), texts=texts, window_tokens=WINDOW,
            seconds=round(time.monotonic() - began, 1),
            versions={"torch": str(torch.__version__), "numpy": np.__version__})
        out.mkdir(parents=True, exist_ok=True)
        (out / "certificate.json").write_bytes(encoded(certificate))
        (out / "certificate.md").write_text(page(certificate))
    except (ValueError, OSError) as error:
        raise CertifyFailed(str(error)) from None
    return certificate


def encoded(certificate: Certificate) -> bytes:
    return msgspec.json.format(msgspec.json.encode(certificate), indent=1)


def windows_of(ids: list[int], positions: int, name: str) -> list[list[int]]:
    """Windows with at least `positions` positions that have a next token. Raises ValueError for too little text."""
    count = -(-positions // (WINDOW - 1))
    if not 0 < count * WINDOW <= len(ids):
        most = len(ids) // WINDOW * (WINDOW - 1)
        raise ValueError(f"{name} has text for 1 to {most:,} positions, not for {positions:,}: choose other --tokens")
    return [ids[at * WINDOW:(at + 1) * WINDOW] for at in range(count)]


def side_of(folder: Path) -> Side:
    """Sizes and kinds of a pulled model."""
    checkpoint = open_checkpoint(folder)
    kinds: dict[str, int] = {}
    for name in checkpoint.names():
        kind = checkpoint.kind(name)
        kinds[kind] = kinds.get(kind, 0) + math.prod(checkpoint.shape(name))
    files = [checkpoint.path] if checkpoint.path.is_file() else list(checkpoint.path.glob("*.safetensors"))
    return Side(name=folder.name, weights=sum(kinds.values()), bytes=sum(file.stat().st_size for file in files),
                kinds=kinds)


def _logits(decoder: TorchDecoder, window: list[int]) -> NDArray[np.float32]:
    """Of each position of a window [WINDOW, V], on an otherwise empty decoder."""
    blocks = np.arange(decoder.blocks, dtype=np.int32)
    said: NDArray[np.float32] = decoder.logits(
        step_inputs([(Job((), 0.0, 0), blocks, (0, window))], [range(len(window))]))
    return said
