"""How far the default CPU path departs from the float32 reference on the same weights.

    python -m deploy.bench.fidelity [--tokens 5000] [--peer llama.cpp=PYTHON] [--json FILE]

Plain English (the prose in docstrings of Python's standard library, some 45,000 tokens) is cut into windows of 512
tokens; at every position of a window the reference (`kernels.decoder.TorchDecoder` in float32), the native step and,
where given, llama.cpp see the same token ids from the window's beginning. Per position: does the same token come
first, the KL divergence from the reference, and how likely the token was that really came next. The last row compares
the native step with llama.cpp position by position.

The text depends on the version of Python; the report has a hash of its tokens.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploy import pull
from deploy.bench import machine, peer
from deploy.bench.departure import Departure, standard_error
from deploy.bench.mesh import show
from gateway.tokenizer import Tokenizer
from kernels.decoder import TorchDecoder
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder, StepInputs

WINDOW = 512
BLOCK_SIZE_TOKENS = 16
BLOCKS = WINDOW // BLOCK_SIZE_TOKENS
LEAST_WORDS = 15  # of a paragraph that counts as prose
MODULES = (
    "heapq", "argparse", "decimal", "statistics", "difflib", "random", "threading", "unittest.case", "unittest.mock",
    "turtle", "email.message", "email.header", "logging", "logging.handlers", "subprocess", "tempfile", "textwrap",
    "shutil", "tarfile", "zipfile", "ftplib", "imaplib", "smtplib", "socketserver", "http.server", "http.client",
    "http.cookiejar", "urllib.request", "urllib.robotparser", "typing", "collections", "contextlib", "functools",
    "fractions", "inspect", "pdb", "pickle", "pickletools", "doctest", "optparse", "configparser", "cmd", "locale",
    "gettext", "datetime", "calendar", "sched", "queue", "enum", "dataclasses", "asyncio.base_events", "asyncio.tasks",
    "asyncio.streams", "concurrent.futures.process", "concurrent.futures.thread", "multiprocessing.pool",
    "importlib.abc",
)  # fmt: skip

Logits = Callable[[int], NDArray[np.float32]]  # of a window: [WINDOW, V]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000, help="positions to compare, at least; whole windows")
    parser.add_argument("--peer", action="append", default=[], metavar="llama.cpp=PYTHON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = peer.parse(options.peer)
    if wrong := [given.name for given in peers if given.name != "llama.cpp"]:
        raise SystemExit(f"only llama.cpp's logits are read here, not those of {', '.join(wrong)}")
    report = measure(options.tokens, peers)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    titles = list(dict.fromkeys(key for row in report["rows"] for key in row if key != "way"))
    show({"rows": [{"": key} | {row["way"]: _short(row.get(key)) for row in report["rows"]} for key in titles]})
    for line in report["comparisons"]:
        print(line["sentence"])


def measure(tokens: int, peers: list[peer.Peer]) -> dict[str, Any]:
    """One row per way to compute; raises SystemExit when there is not enough text."""
    folder = pull.pull("default")
    windows = cut(Tokenizer.load(folder).encode(text(), add_special=False), tokens)
    reference = _of(TorchDecoder.load(folder, blocks=BLOCKS, dtype=torch.float32), windows)
    native = _of(NativeDecoder.load(folder, blocks=BLOCKS), windows)
    names = {NativeDecoder.recipe: native}
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        for given in peers:
            try:
                name, logits = _of_peer(given, folder / "model.gguf", windows, Path(scratch))
                names[name] = logits
            except peer.PeerFailed as error:
                failures.append({"way": given.name, "error": str(error)})
        departures = {name: Departure() for name in names}
        for number, window in enumerate(windows):
            truth, targets = reference(number)[:-1], np.array(window[1:], np.int32)
            for name, logits in names.items():
                departures[name].add(truth, logits(number)[:-1], targets)
            print(f"window {number + 1} of {len(windows)}", file=sys.stderr)
        del names, logits  # a peer's logits lie in the scratch folder
    ours, *others = departures
    return {
        "machine": machine.describe(),
        "command": machine.command("deploy.bench.fidelity", sys.argv[1:]),
        "reference": "TorchDecoder float32",
        "tokens_blake2b": hashlib.blake2b(np.array(windows, np.int32).tobytes(), digest_size=16).hexdigest(),
        "windows": len(windows),
        "rows": [{"way": name} | departure.figures() for name, departure in departures.items()] + failures,
        "comparisons": [_compare(ours, departures[ours], name, departures[name]) for name in others],
    }


def cut(ids: list[int], positions: int) -> list[list[int]]:
    """Windows of 512 tokens with at least `positions` positions that have a next token."""
    count = -(-positions // (WINDOW - 1))
    if not 0 < count * WINDOW <= len(ids):
        most = len(ids) // WINDOW * (WINDOW - 1)
        raise SystemExit(f"--tokens {positions}: there is text for 1 to {most}")
    return [ids[at * WINDOW:(at + 1) * WINDOW] for at in range(count)]


def text() -> str:
    """Paragraphs of prose, each once, in a fixed order."""
    documents = [document for module in MODULES for document in _docstrings(module)]
    return "\n\n".join(dict.fromkeys(paragraph for document in documents for paragraph in prose(document)))


def prose(document: str) -> Iterator[str]:
    """The paragraphs that are sentences: no tables, lists of options, code or headings. Lines are joined."""
    for paragraph in re.split(r"\n\s*\n", document):
        joined = " ".join(paragraph.split())
        plain = not re.search(r">>>|\||^[#*\-+>]|--|::|[{}<>=\\]|\s@|\(\)", joined)
        if plain and len(joined.split()) >= LEAST_WORDS and joined[0].isupper() and joined[-1] in ".!?":
            yield joined


def _docstrings(module: str) -> Iterator[str]:
    """Of the module, its classes and functions, from its source; nothing is imported."""
    found = importlib.util.find_spec(module)
    if not found or not found.origin or not found.origin.endswith(".py"):
        return
    for node in ast.walk(ast.parse(Path(found.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _of(decoder: Decoder, windows: list[list[int]]) -> Logits:
    """Every window is one prompt on an otherwise empty decoder."""

    def logits(number: int) -> NDArray[np.float32]:
        said: NDArray[np.float32] = decoder.logits(
            StepInputs(
                tokens=np.array(windows[number], np.int32),
                positions=np.arange(WINDOW, dtype=np.int32),
                sequence_starts=np.array([0, WINDOW], np.int32),
                block_tables=np.arange(BLOCKS, dtype=np.int32)[None],
                sample_rows=np.arange(WINDOW, dtype=np.int32),
                temperature=np.zeros(WINDOW, np.float32),
                top_k=np.zeros(WINDOW, np.int32),
                top_p=np.ones(WINDOW, np.float32),
                min_p=np.zeros(WINDOW, np.float32),
                seeds=np.zeros(WINDOW, np.uint64),
            )
        )
        return said

    return logits


def _of_peer(given: peer.Peer, model: Path, windows: list[list[int]], scratch: Path) -> tuple[str, Logits]:
    """Its version and its logits, read from the file it wrote: 100 MB for each window."""
    file = scratch / "logits.f32"
    job = {"model": str(model), "threads": machine.usable_cores(), "prompts": windows, "score": str(file)}
    answer = given.ask(job | {"task": "score"})
    written = np.memmap(file, np.float32, "r").reshape(len(windows), WINDOW, -1)
    return answer["version"], lambda number: np.asarray(written[number])


def _compare(ours: str, our: Departure, theirs: str, their: Departure) -> dict[str, Any]:
    """The same positions, ours minus theirs."""
    gaps = np.subtract(our.kl, their.kl)
    figures = {
        "kl_mean_difference": float(gaps.mean()),
        "kl_mean_difference_error": standard_error(gaps.tolist()),
        "top1_difference": float(np.mean(our.same) - np.mean(their.same)),
        "only_ours_agrees": sum(a and not b for a, b in zip(our.same, their.same, strict=True)),
        "only_theirs_agrees": sum(b and not a for a, b in zip(our.same, their.same, strict=True)),
    }
    sentence = (
        f"{ours} against {theirs}: KL mean {figures['kl_mean_difference']:+.5f} "
        f"(standard error {figures['kl_mean_difference_error']:.5f}); of the positions where one alone agrees with the "
        f"reference, {figures['only_ours_agrees']} are ours and {figures['only_theirs_agrees']} theirs"
    )
    return {"ours": ours, "theirs": theirs} | figures | {"sentence": sentence}


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
