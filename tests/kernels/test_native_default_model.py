"""The default model through the native step: the same bits in any grouping, and close to exact arithmetic."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.step import Decoder, StepInputs
from tests.models import default_folder, default_model

pytestmark = [pytest.mark.skipif(available() is not None, reason=str(available())), pytest.mark.slow]

BLOCKS = 64
TEXT = """The harbour town wakes before the sun does. Fishing boats leave the quay while the streets are still dark, and
the bakery on the corner fills the square with the smell of bread. By eight o'clock the market is open: a
woman sells cheese from the hills, her neighbour mends umbrellas, and children on their way to school stop to
look at the crabs. In the afternoon the ferry brings visitors from the mainland. They climb the hundred and
forty steps to the lighthouse, buy postcards, and ask the keeper how far the light can be seen. He always
gives the same answer: as far as it is needed. In winter the boats stay in, the nets are dried and repaired,
and letters from abroad are read aloud in the kitchen, because everybody knows somebody who has gone away to
work.

def average(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(default_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> list[int]:
    tokens: list[int] = tokenizer.encode(TEXT).ids[:200]
    return tokens


@pytest.fixture(scope="module")
def native() -> Iterator[NativeDecoder]:
    decoder = NativeDecoder.load(default_model(), blocks=BLOCKS, threads=2)
    yield decoder
    decoder.close()


def rows_of(tokens: list[int], first: int = 0, first_block: int = 0, *, all_rows: bool = True) -> StepInputs:
    """One sequence whose blocks are numbered from `first_block` on."""
    count = len(tokens)
    samples = np.arange(count, dtype=np.int32) if all_rows else np.array([count - 1], np.int32)
    wanted = len(samples)
    return StepInputs(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(first, first + count, dtype=np.int32),
        sequence_starts=np.array([0, count], np.int32),
        block_tables=np.arange(first_block, first_block + (first + count + 15) // 16, dtype=np.int32)[None],
        sample_rows=samples,
        temperature=np.zeros(wanted, np.float32),
        top_k=np.zeros(wanted, np.int32),
        top_p=np.ones(wanted, np.float32),
        min_p=np.zeros(wanted, np.float32),
        seeds=np.zeros(wanted, np.uint64),
    )


def greedy(decoder: Decoder, prompt: list[int], most: int, end: int) -> list[int]:
    said: list[int] = []
    step = rows_of(prompt, all_rows=False)
    while len(said) < most:
        said.append(int(decoder.step(step)[0]))
        if said[-1] == end:
            break
        step = rows_of(said[-1:], len(prompt) + len(said) - 1)
    return said


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    shifted: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return shifted


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_chunks_change_no_bit(native: NativeDecoder, text: list[int], chunk: int) -> None:
    tokens = text[:72]
    expected = native.logits(rows_of(tokens))
    found = [native.logits(rows_of(tokens[at : at + chunk], at, 20)) for at in range(0, len(tokens), chunk)]
    assert (np.concatenate(found).view(np.uint32) == expected.view(np.uint32)).all()


def test_instructions_and_threads_change_no_bit(native: NativeDecoder, text: list[int]) -> None:
    tokens = text[:12]
    expected = native.logits(rows_of(tokens))
    portable = NativeDecoder(open_checkpoint(default_model()), blocks=2, threads=1, instructions="portable")
    assert (portable.logits(rows_of(tokens)).view(np.uint32) == expected.view(np.uint32)).all()


def test_neighbours_change_no_bit(native: NativeDecoder, text: list[int]) -> None:
    sequences = [text[at : at + 17 + at % 5] for at in range(0, 60, 6)]
    alone = [native.logits(rows_of(tokens, all_rows=False)) for tokens in sequences]
    parts = [rows_of(tokens, 0, 2 * at, all_rows=False) for at, tokens in enumerate(sequences)]
    starts = np.cumsum([0, *(len(tokens) for tokens in sequences)]).astype(np.int32)
    together = rows_of([token for tokens in sequences for token in tokens])
    together.positions = np.concatenate([part.positions for part in parts])
    together.sequence_starts = starts
    together.block_tables = np.concatenate([part.block_tables for part in parts])
    together.sample_rows = starts[1:] - np.int32(1)
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
        setattr(together, name, np.concatenate([getattr(part, name) for part in parts]))
    assert (native.logits(together).view(np.uint32) == np.concatenate(alone).view(np.uint32)).all()


def test_it_stays_close_to_float32(native: NativeDecoder, text: list[int]) -> None:
    exact = log_softmax(TorchDecoder.load(default_model(), blocks=16).logits(rows_of(text)))
    found = log_softmax(native.logits(rows_of(text)))
    divergence = (np.exp(exact) * (exact - found)).sum(-1)
    agreement = (exact.argmax(-1) == found.argmax(-1)).mean()
    assert len(text) == 200
    assert agreement >= 0.93, (agreement, divergence.mean())
    assert divergence.mean() < 0.02, (agreement, divergence.mean())


def test_it_answers_sensibly(native: NativeDecoder, tokenizer: Tokenizer) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    end = tokenizer.token_to_id("<|im_end|>")
    assert "Paris" in tokenizer.decode(greedy(native, tokenizer.encode(prompt).ids, 30, end))
