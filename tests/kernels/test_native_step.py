"""The native step is its specification, bit for bit, however rows are grouped and whatever computes them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.native.build import INSTRUCTIONS, available, missing_features
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.step import StepInputs
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

BLOCKS = 24
PROMPT = np.random.default_rng(7).integers(0, 256, 37).tolist()
TABLE = (5, 2, 11)
LOGITS_ROWS = range(len(PROMPT))

Part = tuple[Sequence[int], int, Sequence[int]]  # tokens, position of the first, block table


def step_of(
    *parts: Part, samples: Sequence[int] | None = None, temperature: float = 0.0, **sampling: float
) -> StepInputs:
    """A step of the given sequences; `samples`: the rows wanted, by default the last of each sequence."""
    starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)]).astype(np.int32)
    rows = np.asarray(starts[1:] - 1 if samples is None else samples, np.int32)
    tables = np.full((len(parts), max(len(table) for _, _, table in parts)), -1, np.int32)
    for at, (_, _, table) in enumerate(parts):
        tables[at, : len(table)] = table
    return StepInputs(
        tokens=np.array([token for tokens, _, _ in parts for token in tokens], np.int32),
        positions=np.array([first + i for tokens, first, _ in parts for i in range(len(tokens))], np.int32),
        sequence_starts=starts,
        block_tables=tables,
        sample_rows=rows,
        temperature=np.full(len(rows), temperature, np.float32),
        top_k=np.full(len(rows), sampling.get("top_k", 0), np.int32),
        top_p=np.full(len(rows), sampling.get("top_p", 1), np.float32),
        min_p=np.full(len(rows), sampling.get("min_p", 0), np.float32),
        seeds=np.full(len(rows), sampling.get("seed", 0), np.uint64),
    )


def whole(decoder: NativeDecoder | SpecifiedDecoder) -> NDArray[np.float32]:
    """The logits of every row of PROMPT, in one step."""
    return decoder.logits(step_of((PROMPT, 0, TABLE), samples=LOGITS_ROWS))


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


Loader = Callable[..., NativeDecoder]


@pytest.fixture(scope="module")
def load(tiny: Path) -> Loader:
    def loader(
        path: Path = tiny, instructions: str | None = None, threads: int = 2, kv_format: str = "fp16"
    ) -> NativeDecoder:
        checkpoint = open_checkpoint(path)
        return NativeDecoder(checkpoint, blocks=BLOCKS, threads=threads, instructions=instructions, kv_format=kv_format)

    return loader


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    "linear,head",
    [
        (Kind.Q4_1, Kind.Q8_0),
        (Kind.Q8_0, Kind.Q8_0),
        (Kind.Q4_0, Kind.Q4_1),
        (Kind.F32, Kind.F16),
        (Kind.BF16, Kind.BF16),
    ],
)
def test_logits_are_the_specification_s_to_the_bit(
    tmp_path: Path, load: Loader, instructions: str, linear: Kind, head: Kind
) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(tied_head=False), linear=linear, head=head)
    decoder = load(path, instructions)
    assert decoder.instructions == instructions or instructions == "amx"  # Linux may deny tiles
    assert same_bits(whole(decoder), whole(SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS)))


@pytest.mark.parametrize(
    "shape",
    [
        Tiny(
            heads=5, kv_heads=1, head_dim=32, hidden=96, ffn=160
        ),  # tiles of three and two heads, a whole chunk of values
        Tiny(heads=8, kv_heads=1, head_dim=48, hidden=32, ffn=32, layers=1),  # a chunk and a half
        Tiny(heads=2, kv_heads=2, head_dim=64, vocabulary=77, layers=1),
    ],
)  # a last panel that is not full
@pytest.mark.parametrize("threads", [1, 3])
def test_odd_shapes_are_the_specification_s_too(tmp_path: Path, load: Loader, shape: Tiny, threads: int) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", shape)
    prompt = [token % shape.vocabulary for token in PROMPT]
    inputs = step_of((prompt, 0, TABLE), samples=LOGITS_ROWS)
    expected = SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS).logits(inputs)
    assert same_bits(load(path, threads=threads).logits(inputs), expected)


def test_a_hugging_face_folder_runs_with_its_own_order_of_pairs(tmp_path: Path, load: Loader) -> None:
    folder = write_tiny_folder(tmp_path / "folder")
    assert not open_checkpoint(folder).config.rope_interleaved
    assert same_bits(whole(load(folder)), whole(SpecifiedDecoder(open_checkpoint(folder), blocks=BLOCKS)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 16, 20])
def test_the_cut_of_a_prompt_changes_no_bit(load: Loader, chunk: int) -> None:
    expected = whole(load())
    decoder = load()
    parts = [
        decoder.logits(step_of((PROMPT[at : at + chunk], at, TABLE), samples=range(len(PROMPT[at : at + chunk]))))
        for at in range(0, len(PROMPT), chunk)
    ]
    assert same_bits(np.concatenate(parts), expected)


def test_a_prompt_longer_than_one_pass_changes_no_bit(load: Loader) -> None:
    prompt, table = np.random.default_rng(3).integers(0, 256, 330).tolist(), list(range(21))
    expected = load(threads=1).logits(step_of((prompt, 0, table), samples=range(330)))
    decoder = load()
    found = [decoder.logits(step_of(([token], at, table))) for at, token in enumerate(prompt)]
    assert same_bits(np.concatenate(found), expected)


def test_threads_change_no_bit(load: Loader) -> None:
    assert same_bits(whole(load(threads=1)), whole(load(threads=2)))
    assert same_bits(whole(load(threads=1)), whole(load(threads=5)))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.9, 0), (0.9, 40)])
def test_a_step_that_the_caller_does_alone_changes_no_bit(load: Loader, temperature: float, top_k: int) -> None:
    decoder = load(threads=5)
    step = step_of((PROMPT, 0, TABLE), samples=LOGITS_ROWS, temperature=temperature, top_k=top_k, seed=3)
    decoder.go_alone(0)
    logits = decoder.logits(step)
    assert decoder.crew == 5
    decoder.go_alone(0)
    tokens = decoder.step(step)
    assert decoder.crew == 5
    decoder.go_alone(1000)
    assert same_bits(decoder.logits(step), logits)
    assert decoder.step(step).tolist() == tokens.tolist()
    assert decoder.crew == 1


def test_neighbours_and_blocks_change_no_bit(load: Loader) -> None:
    expected = whole(load())
    decoder = load()
    others = [(PROMPT[::-1][:9], 0, (0,)), (PROMPT[3:30], 0, (1, 3))]
    inputs = step_of(others[0], (PROMPT[:20], 0, (9, 8, 7)), others[1], samples=range(9, 29))
    first = decoder.logits(inputs)
    second = decoder.logits(step_of((PROMPT[20:], 20, (9, 8, 7)), ([4], 9, (0,)), samples=range(len(PROMPT) - 20)))
    assert same_bits(np.concatenate((first, second)), expected)


def test_what_a_block_held_before_does_not_matter(load: Loader) -> None:
    expected = whole(load())
    decoder = load()
    decoder.step(step_of(([9] * 48, 0, TABLE)))
    assert same_bits(whole(decoder), expected)


def test_sequences_may_share_the_blocks_of_a_prefix(load: Loader) -> None:
    expected = whole(load())
    decoder = load()
    decoder.step(step_of((PROMPT[:32], 0, TABLE)))
    found = decoder.logits(step_of((PROMPT[32:], 32, TABLE), (PROMPT[32:], 32, (*TABLE[:2], 20)), samples=range(10)))
    assert same_bits(found[:5], expected[32:])
    assert same_bits(found[5:], expected[32:])


def test_a_step_without_samples_fills_the_cache(load: Loader) -> None:
    expected = whole(load())
    decoder = load()
    assert decoder.step(step_of((PROMPT[:-1], 0, TABLE), samples=[])).tolist() == []
    assert same_bits(decoder.logits(step_of((PROMPT[-1:], len(PROMPT) - 1, TABLE))), expected[-1:])


def test_an_empty_step_is_a_step(load: Loader) -> None:
    empty = step_of(([], 0, ()), samples=[])
    assert load().step(empty).tolist() == []
