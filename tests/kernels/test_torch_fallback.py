"""Without a compiler the numbers stay: numpy and torch give the bits and the tokens of the native step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.native import packed, uncompiled
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import BlockStore, Decoder
from tests.kernels.blocks import WIDE
from tests.kernels.steps import generate, lay_out, mixed_sampling
from tests.kernels.test_native_edges import BAD_INPUTS, GOOD
from tests.kernels.test_native_step import BLOCKS, LOGITS_ROWS, PROMPT, TABLE, same_bits, step_of
from tests.kernels.tiny import Tiny, tiny_weights, write_tiny_folder, write_tiny_gguf
from tests.models import default_model

compiled = pytest.mark.skipif(available() is not None, reason=str(available()))

Load = Callable[..., UncompiledDecoder]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


@pytest.fixture(scope="module")
def load(tiny: Path) -> Load:
    def loader(path: Path = tiny, threads: int = 1) -> UncompiledDecoder:
        return UncompiledDecoder(open_checkpoint(path), blocks=BLOCKS, threads=threads)

    return loader


def native(path: Path) -> NativeDecoder:
    return NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1)


def whole(decoder: Decoder | SpecifiedDecoder, prompt: Sequence[int] = PROMPT) -> NDArray[np.float32]:
    return decoder.logits(step_of((prompt, 0, TABLE), samples=LOGITS_ROWS))


def test_the_logits_are_the_specification_s_to_the_bit(tiny: Path, load: Load) -> None:
    inputs = step_of((PROMPT[:20], 0, TABLE), samples=range(20))
    expected = SpecifiedDecoder(open_checkpoint(tiny), blocks=BLOCKS).logits(inputs)
    assert same_bits(load().logits(inputs), expected)


@compiled
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "linear,head",
    [
        (Kind.Q4_1, Kind.Q8_0),
        (Kind.Q8_0, Kind.Q8_0),
        (Kind.Q4_0, Kind.Q4_1),
        (Kind.Q4_1, Kind.Q4_0),
        (Kind.F32, Kind.F16),
        (Kind.F16, Kind.F32),
        (Kind.BF16, Kind.BF16),
    ],
)
def test_every_kind_of_weights_gives_the_native_step_s_bits(
    tmp_path: Path, load: Load, linear: Kind, head: Kind, tied: bool
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(tied_head=tied), linear=linear, head=head)
    assert same_bits(whole(load(path)), whole(native(path)))


@compiled
@pytest.mark.parametrize(
    "shape",
    [
        Tiny(heads=5, kv_heads=1, head_dim=32, hidden=96, ffn=160),
        Tiny(heads=8, kv_heads=1, head_dim=48, hidden=32, ffn=32, layers=1),
        Tiny(heads=2, kv_heads=2, head_dim=64, vocabulary=77, layers=1),
    ],
)
def test_odd_shapes_do_too(tmp_path: Path, load: Load, shape: Tiny) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", shape)
    prompt = [token % shape.vocabulary for token in PROMPT]
    assert same_bits(whole(load(path), prompt), whole(native(path), prompt))


@compiled
def test_matrices_of_one_layer_may_be_of_several_kinds(tmp_path: Path, load: Load) -> None:
    from gguf.quants import quantize

    mixed = {"blk.0.attn_k.weight": Kind.Q8_0, "blk.1.ffn_up.weight": Kind.F16, "blk.1.attn_v.weight": Kind.Q4_0}
    weights = tiny_weights(Tiny())
    stored = {name: (quantize(weights[name], kind), kind) for name, kind in mixed.items()}
    path = write_tiny_gguf(tmp_path / "model.gguf", stored=stored)
    assert same_bits(whole(load(path)), whole(native(path)))


@compiled
def test_a_hugging_face_folder_runs_with_its_own_order_of_pairs(tmp_path: Path, load: Load) -> None:
    folder = write_tiny_folder(tmp_path / "folder")
    assert not open_checkpoint(folder).config.rope_interleaved
    assert same_bits(whole(load(folder)), whole(native(folder)))


@compiled
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15])
def test_numbers_far_from_one_stay_equal(tmp_path: Path, load: Load, size: float) -> None:
    """Denormal steps, squares below the smallest normal number, and squares beyond the largest."""
    embedding = tiny_weights(Tiny())["token_embd.weight"] * np.float32(size)
    stored = {"token_embd.weight": (embedding.view(np.uint8), Kind.F32)}
    path = write_tiny_gguf(tmp_path / "model.gguf", Tiny(tied_head=False), linear=Kind.F32, stored=stored)
    assert same_bits(whole(load(path)), whole(native(path)))


@compiled
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_the_cut_of_a_prompt_changes_no_bit(tiny: Path, load: Load, chunk: int) -> None:
    decoder, found = load(), []
    for at in range(0, len(PROMPT), chunk):
        tokens = PROMPT[at : at + chunk]
        found.append(decoder.logits(step_of((tokens, at, TABLE), samples=range(len(tokens)))))
    assert same_bits(np.concatenate(found), whole(native(tiny)))


@compiled
def test_a_prompt_longer_than_one_pass_changes_no_bit(tiny: Path, load: Load) -> None:
    prompt = np.random.default_rng(3).integers(0, 256, 150).tolist()
    inputs = step_of((prompt, 0, range(10)), samples=range(150))
    assert same_bits(load().logits(inputs), native(tiny).logits(inputs))


@compiled
def test_how_much_is_done_at_once_changes_no_bit(tiny: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "PANEL_OUTPUTS", 48)
    monkeypatch.setattr(packed, "TOGETHER", 100)
    monkeypatch.setattr(uncompiled, "TOGETHER", 32)
    monkeypatch.setattr(uncompiled, "VALUES_TOGETHER", 5)
    monkeypatch.setattr(uncompiled, "PASS_ROWS", 11)
    assert same_bits(whole(load()), whole(native(tiny)))


def test_threads_change_no_bit(load: Load) -> None:
    threads = torch.get_num_threads()
    try:
        assert same_bits(whole(load(threads=2)), whole(load(threads=1)))
    finally:
        torch.set_num_threads(threads)


@compiled
def test_neighbours_and_what_blocks_held_change_no_bit(tiny: Path, load: Load) -> None:
    decoder = load()
    poison = np.full(decoder.block_bytes, 0xFF, np.uint8)  # NaN in fp16
    for block in range(BLOCKS):
        decoder.write_block(block, poison)
    others = (PROMPT[::-1][:9], 0, (0,)), (PROMPT[3:30], 0, (1, 3))
    first = decoder.logits(step_of(others[0], (PROMPT[:20], 0, (9, 8, 7)), others[1], samples=range(9, 29)))
    second = decoder.logits(step_of((PROMPT[20:], 20, (9, 8, 7)), ([4], 9, (0,)), samples=range(len(PROMPT) - 20)))
    assert same_bits(np.concatenate((first, second)), whole(native(tiny)))


def test_a_block_copied_out_and_in_elsewhere_holds_the_same(load: Load) -> None:
    decoder = load()
    assert isinstance(decoder, BlockStore)
    expected = whole(decoder)[-1:]
    memory = np.empty(decoder.block_bytes, np.uint8)
    for block, other in zip(TABLE, (20, 21, 22), strict=True):
        decoder.read_block(block, memory)
        decoder.write_block(other, memory)
    moved = decoder.logits(step_of((PROMPT[-1:], len(PROMPT) - 1, (20, 21, 22))))
    assert same_bits(moved, expected)


@compiled
def test_tokens_are_the_native_step_s_whatever_the_sampling(tiny: Path, load: Load) -> None:
    inputs = mixed_sampling(0xF23456789ABCDEF)
    ours, theirs = load(), native(tiny)
    for seed in range(5):
        step = replace(inputs, seeds=inputs.seeds + np.uint64(seed))
        assert ours.step(step).tolist() == theirs.step(step).tolist()


@compiled
def test_a_stream_begun_by_one_goes_on_at_the_other(tiny: Path, load: Load) -> None:
    def said(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
        (part,) = lay_out([prompt], count, decoder)
        part.seed, part.temperature, part.top_p = 5, 0.9, 0.95
        generate(decoder, [part], count)
        return part.chosen

    begun = said(native(tiny), PROMPT, 10)
    assert said(native(tiny), PROMPT, 20) == begun + said(load(), PROMPT + begun, 10)


def test_steps_without_samples_and_without_rows_are_steps(load: Load) -> None:
    decoder = load()
    expected = whole(load())
    assert decoder.step(step_of(([], 0, ()), samples=[])).tolist() == []
    assert decoder.step(step_of((PROMPT[:-1], 0, TABLE), samples=[])).tolist() == []
    assert same_bits(decoder.logits(step_of((PROMPT[-1:], len(PROMPT) - 1, TABLE))), expected[-1:])


@pytest.mark.parametrize("change,words", BAD_INPUTS)
def test_bad_inputs_are_refused_and_change_nothing(tiny: Path, change: dict[str, object], words: str) -> None:
    decoder = UncompiledDecoder(open_checkpoint(tiny), blocks=4, threads=1)
    expected = decoder.logits(GOOD)
    with pytest.raises(ValueError, match=words):
        decoder.step(replace(GOOD, **change))
    assert same_bits(decoder.logits(GOOD), expected)


def test_broken_weights_choose_no_token(tmp_path: Path, load: Load) -> None:
    norm = np.full(64, np.nan, np.float32)
    path = write_tiny_gguf(tmp_path / "model.gguf", stored={"output_norm.weight": (norm, Kind.F32)})
    with pytest.raises(RuntimeError, match="not finite"):
        load(path).step(step_of((PROMPT, 0, TABLE)))


def test_it_has_the_face_of_the_native_decoder(tiny: Path) -> None:
    decoder: Decoder = UncompiledDecoder.load(tiny.parent, kv_bytes=1 << 20)
    assert (decoder.vocabulary_size, decoder.context_length, decoder.block_size_tokens) == (256, 1024, 16)
    assert decoder.blocks == (1 << 20) // (2 * 2 * 2 * 16 * 2 * 16)  # K and V, layers, ...
    assert decoder.recipe == NativeDecoder.recipe


def test_a_closed_decoder_says_so(load: Load) -> None:
    decoder = load()
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.step(step_of((PROMPT, 0, TABLE)))


def test_what_the_recipe_does_not_know_is_refused(tmp_path: Path) -> None:
    twos = {"blk.0.attn_q.weight": (np.zeros((256, 84), np.uint8), Kind.Q2_K)}
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=twos)
    with pytest.raises(ValueError, match=r"layers.0.attention.q.weight is stored as Q2_K"):
        UncompiledDecoder.load(path)
    path = write_tiny_gguf(tmp_path / "narrow.gguf", Tiny(heads=4, head_dim=8), linear=Kind.F32)
    with pytest.raises(ValueError, match="head_dim is 8"):
        UncompiledDecoder.load(path)


@compiled
@pytest.mark.slow
def test_the_default_model_gives_the_native_step_s_bits() -> None:
    tokens = np.random.default_rng(11).integers(0, 49152, 24).tolist()
    prompt, last = step_of((tokens[:-1], 0, (4, 1)), samples=range(0, 23, 5)), step_of((tokens[-1:], 23, (4, 1)))
    ours = UncompiledDecoder.load(default_model(), blocks=8, threads=1)
    theirs = NativeDecoder.load(default_model(), blocks=8, threads=1)
    assert same_bits(ours.logits(prompt), theirs.logits(prompt))
    assert same_bits(ours.logits(last), theirs.logits(last))
