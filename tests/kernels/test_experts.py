"""Mixtures of experts: a row's experts and what they make of it depend on that row alone, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from deploy.models import BASE_MIB, KV_MIB, memory_needed
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.config import CheckpointError, Experts
from kernels.decoder import TorchDecoder
from kernels.native.build import INSTRUCTIONS, available, missing_features
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.native.specification import routed as specified_routes
from kernels.native.uncompiled import UncompiledDecoder
from kernels.reference import routed
from kernels.step import StepInputs
from tests.kernels.blocks import stored_as
from tests.kernels.test_native_step import same_bits, step_of
from tests.kernels.tiny import Tiny, tiny_weights, write_tiny_folder, write_tiny_gguf

BLOCKS = 24
# 20 experts: more than 16 lanes, and no multiple of them
MOE = Tiny(family="qwen3moe", qk_norm=True, layers=2, hidden=96, experts=20, experts_per_token=3, expert_ffn=64,
           tied_head=False, seed=3)
WIDE = Tiny(family="qwen3moe", qk_norm=True, layers=1, hidden=256, heads=4, kv_heads=2, head_dim=64, experts=5,
            experts_per_token=2, expert_ffn=256, vocabulary=77, tied_head=False)
PROMPT = np.random.default_rng(5).integers(0, 77, 40).tolist()
TABLE = (5, 2, 11)
KINDS = ("Q4_0", "Q8_0", "Q5_1", "MXFP4", "Q4_K", "Q6_K")
needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))


def every_row(tokens: list[int] = PROMPT) -> StepInputs:
    return step_of((tokens, 0, TABLE), samples=range(len(tokens)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny_gguf(tmp_path_factory.mktemp("moe") / "model.gguf", MOE))


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> NDArray[np.float32]:
    logits = SpecifiedDecoder(checkpoint, blocks=BLOCKS).logits(every_row())
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 1
    return logits


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_logits_are_the_specification_s_to_the_bit(
    checkpoint: Checkpoint, expected: NDArray[np.float32], instructions: str, threads: int
) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=threads, instructions=instructions)
    assert same_bits(decoder.logits(every_row()), expected)
    alone = [decoder.logits(step_of(([token], at, TABLE))) for at, token in enumerate(PROMPT)]
    assert same_bits(np.concatenate(alone), expected)


@needs_compiler
@pytest.mark.parametrize("chunk", [2, 3, 7, 16, 39])
def test_the_cut_of_a_prompt_changes_no_bit(
    checkpoint: Checkpoint, expected: NDArray[np.float32], chunk: int
) -> None:
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=2)
    parts = [PROMPT[at : at + chunk] for at in range(0, len(PROMPT), chunk)]
    found = [
        decoder.logits(step_of((part, at * chunk, TABLE), samples=range(len(part)))) for at, part in enumerate(parts)
    ]
    assert same_bits(np.concatenate(found), expected)


@needs_compiler
def test_neighbours_change_no_bit_however_many_go_in_a_step(
    checkpoint: Checkpoint, expected: NDArray[np.float32]
) -> None:
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=2)
    random = np.random.default_rng(1)
    for before, behind in ((1, 0), (0, 1), (30, 30), (100, 1)):  # 100: our rows begin in the second pass
        others = [random.integers(0, 77, count).tolist() for count in (before, behind)]
        inputs = step_of((others[0], 0, range(12, 19)), (PROMPT, 0, TABLE), (others[1], 0, (20, 21)),
                         samples=range(before, before + len(PROMPT)))
        assert same_bits(decoder.logits(inputs), expected)


@needs_compiler
def test_a_step_that_the_caller_does_alone_changes_no_bit(
    checkpoint: Checkpoint, expected: NDArray[np.float32]
) -> None:
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=3)
    decoder.go_alone(1000)
    assert same_bits(decoder.logits(every_row()), expected)
    assert decoder.crew == 1


def test_without_a_compiler_it_is_the_same(checkpoint: Checkpoint, expected: NDArray[np.float32]) -> None:
    decoder = UncompiledDecoder(checkpoint, blocks=BLOCKS, threads=1)
    assert same_bits(decoder.logits(every_row()), expected)
    assert same_bits(decoder.logits(step_of((PROMPT[-1:], len(PROMPT) - 1, TABLE))), expected[-1:])


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_served_in_every_kind_of_weights(tmp_path: Path, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=stored_as(kind, WIDE))
    expected = SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS).logits(every_row())
    assert np.isfinite(expected).all()
    decoder = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=2)
    assert same_bits(decoder.logits(every_row()), expected)
    reference = TorchDecoder(open_checkpoint(path), blocks=BLOCKS).logits(every_row())
    assert np.sqrt(np.mean((expected - reference) ** 2) / np.mean(reference**2)) < 0.05  # activations in int8


def twins(path: Path, broken: bool) -> Path:
    """A model whose every expert has a twin behind all others, with the same row of the router.

    `broken`: the twins are full of NaN.
    """
    shape = Tiny(family="qwen3moe", qk_norm=True, experts=8, experts_per_token=1, expert_ffn=32, tied_head=False)
    stored: dict[str, tuple[NDArray[np.uint8], Kind]] = {}
    for name, weight in tiny_weights(shape).items():
        if "ffn_gate_inp" in name:
            weight[4:] = weight[:4]
        elif "_exps" in name:
            weight[4:] = np.nan if broken else weight[:4]
        else:
            continue
        stored[name] = weight, Kind.F32
    return write_tiny_gguf(path, shape, stored=stored)


@needs_compiler
def test_of_equal_experts_the_first_is_chosen_and_others_are_not_even_read(tmp_path: Path) -> None:
    whole, broken = (open_checkpoint(twins(tmp_path / f"{broken}.gguf", broken)) for broken in (False, True))
    makers: list[Callable[[Checkpoint], NativeDecoder | SpecifiedDecoder | UncompiledDecoder | TorchDecoder]] = [
        lambda checkpoint: NativeDecoder(checkpoint, blocks=BLOCKS, threads=2),
        lambda checkpoint: SpecifiedDecoder(checkpoint, blocks=BLOCKS),
        lambda checkpoint: UncompiledDecoder(checkpoint, blocks=BLOCKS),
        lambda checkpoint: TorchDecoder(checkpoint, blocks=BLOCKS),
    ]
    for make in makers:
        found = make(broken).logits(every_row())
        assert np.isfinite(found).all()
        assert same_bits(found, make(whole).logits(every_row()))


@pytest.mark.parametrize("normalised", [True, False])
def test_routes_are_those_of_the_specification(normalised: bool) -> None:
    random = np.random.default_rng(2)
    logits = random.standard_normal((50, 20)).astype(np.float32)
    logits[::2] = np.round(logits[::2])  # ties
    weights, chosen = routed(torch.from_numpy(logits), 6, normalised)
    for row, of_row in enumerate(logits):
        routes = specified_routes(of_row, Experts(count=20, per_token=6, ffn=32, normalised=normalised))
        assert [expert for expert, _ in routes] == chosen[row].tolist()
        assert np.allclose([weight for _, weight in routes], weights[row].numpy(), rtol=1e-6)
        total = sum(weight for _, weight in routes)
        assert abs(total - 1.0) < 1e-6 if normalised else 0.5 < total < 0.999
        left_out = np.delete(of_row, chosen[row])
        assert of_row[chosen[row]].min() >= left_out.max()


def test_a_gguf_holds_the_model_of_a_folder(tmp_path: Path) -> None:
    plain = write_tiny_gguf(tmp_path / "plain.gguf", MOE, linear=Kind.F32, head=Kind.F32)
    shape = Tiny(**{**vars_of(MOE), "family": "qwen3_moe", "settings": (("norm_topk_prob", True),)})
    folder = write_tiny_folder(tmp_path / "folder", shape)
    one, other = (open_checkpoint(path) for path in (plain, folder))
    assert set(one.names()) == set(other.names())
    assert one.config.experts == other.config.experts == Experts(count=20, per_token=3, ffn=64, normalised=True)
    for name in one.names():
        assert one.shape(name) == other.shape(name)
        assert torch.equal(one.tensor(name), other.tensor(name))
    logits = [TorchDecoder(checkpoint, blocks=BLOCKS).logits(every_row()) for checkpoint in (one, other)]
    assert np.array_equal(*logits)


ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
GPT_OSS = Tiny(family="gpt_oss", qkv_bias=True, output_bias=True, layers=3, experts=5, experts_per_token=2,
               expert_ffn=96, tied_head=False, seed=6, settings=(("rope_scaling", ROPE), ("sliding_window", 12)))
PACKED = (("quantization_config", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),)


def gpt_oss(**changes: object) -> Tiny:
    return Tiny(**{**vars_of(GPT_OSS), **changes})


@pytest.mark.parametrize("packed", [True, False])
def test_gpt_oss_is_the_same_in_gguf_and_in_a_folder(tmp_path: Path, packed: bool) -> None:
    weights = {name: weight for name, weight in tiny_weights(GPT_OSS).items() if name.endswith("_exps.weight")}
    four = {name: (gguf.quants.quantize(weight, Kind.MXFP4), Kind.MXFP4) for name, weight in weights.items()}
    file = write_tiny_gguf(tmp_path / "model.gguf", gpt_oss(family="gpt-oss"), linear=Kind.F32, head=Kind.F32,
                           stored=four if packed else None)
    folder = write_tiny_folder(tmp_path / "folder", gpt_oss(settings=GPT_OSS.settings + PACKED * packed))
    one, other = (open_checkpoint(path) for path in (file, folder))
    assert one.config.windows == other.config.windows == (12, 0, 12)
    assert one.config.experts == other.config.experts
    assert one.config.rope_factors == other.config.rope_factors
    assert one.config.sinks
    assert other.config.sinks
    assert set(one.names()) == set(other.names())
    for name in one.names():
        assert one.shape(name) == other.shape(name)
        four_bits = packed and ".experts." in name and name.endswith("weight")
        assert one.kind(name) == other.kind(name) == ("MXFP4" if four_bits else "F32")
        assert np.array_equal(one.raw(name).rows, other.raw(name).rows)
        assert torch.equal(one.tensor(name), other.tensor(name))
    logits = [TorchDecoder(checkpoint, blocks=BLOCKS).logits(every_row()) for checkpoint in (one, other)]
    assert np.array_equal(*logits)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_neighbours_of_gpt_oss_change_no_bit(tmp_path: Path, instructions: str) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "folder", gpt_oss(settings=GPT_OSS.settings + PACKED)))
    expected = SpecifiedDecoder(checkpoint, blocks=BLOCKS).logits(every_row())
    assert np.isfinite(expected).all()
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=3, instructions=instructions)
    others = [PROMPT[::-1], PROMPT[7:12]]
    inputs = step_of((others[0], 0, (20, 21, 22)), (PROMPT, 0, TABLE), (others[1], 0, (23,)), samples=range(40, 80))
    assert same_bits(decoder.logits(inputs), expected)
    alone = [decoder.logits(step_of(([token], at, TABLE))) for at, token in enumerate(PROMPT)]
    assert same_bits(np.concatenate(alone), expected)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rope_scaling": None}, "lacks rope_scaling or rope_theta"),
        ({"rope_theta": None}, "lacks rope_scaling or rope_theta"),
        ({"swiglu_limit": -1.0}, "swiglu_limit should be a positive number"),
        ({"num_local_experts": None}, "num_local_experts should be a whole number"),
        ({"attention_bias": False}, "holds layers.0.attention.k.bias"),
        ({"model_type": "llama"}, "is quantised as .*; use the plain checkpoint"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised as .*; use the plain checkpoint"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 3 layers"),
    ],
)
def test_a_gpt_oss_that_is_not_whole_is_refused(tmp_path: Path, settings: dict[str, object], complaint: str) -> None:
    folder = write_tiny_folder(tmp_path / "folder", gpt_oss(settings=GPT_OSS.settings + PACKED))
    change(folder, settings)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["blocks", "scales"])
@pytest.mark.parametrize("how", ["gone", "short", "float"])
def test_blocks_and_exponents_that_do_not_fit_are_refused(tmp_path: Path, part: str, how: str) -> None:
    folder = write_tiny_folder(tmp_path / "folder", gpt_oss(settings=GPT_OSS.settings + PACKED))
    file, name = folder / "model.safetensors", f"model.layers.1.mlp.experts.down_proj_{part}"
    tensors = load_file(file)
    if how == "gone":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :, 1:] if how == "short" else tensors[name].astype(np.float32)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"lacks|does not fit|contradict|is stored as"):
        open_checkpoint(folder)


def test_experts_count_in_what_a_model_takes(checkpoint: Checkpoint) -> None:
    weights = memory_needed(checkpoint) - (KV_MIB + BASE_MIB << 20)
    counts = {name: weight.size for name, weight in tiny_weights(MOE).items()}
    plain = sum(count for name, count in counts.items() if "norm" in name or "ffn_gate_inp" in name)
    head = sum(counts[name] for name in ("token_embd.weight", "output.weight"))
    quantised = sum(counts.values()) - plain - head
    assert weights == 4 * plain + head / 32 * 34 + quantised / 32 * 20


def vars_of(shape: Tiny) -> dict[str, object]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def folder_with(tmp_path: Path, **settings: object) -> Path:
    shape = Tiny(**{**vars_of(MOE), "family": "qwen3_moe"})
    return change(write_tiny_folder(tmp_path / "folder", shape), settings)


def change(folder: Path, settings: dict[str, object]) -> Path:
    """None takes a setting away."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_experts_per_tok": 21}, "21 of 20 experts cannot work for a token"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok should be a whole number"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size should be a whole number"),
        ({"moe_intermediate_size": 96}, "shapes contradict the configuration"),
        ({"num_experts": 21}, "lacks layers.0.experts.20"),
        ({"num_experts": 19}, "holds layers.0.experts.19"),
        ({"num_experts": 1 << 40}, "num_experts is 1099511627776, more than"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers should be a list of layers"),
        ({"mlp_only_layers": [1]}, "lacks layers.1.mlp.down.weight"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step should be a whole number"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tmp_path: Path, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder_with(tmp_path, **settings))


def test_a_folder_says_which_layers_have_experts_and_how_they_are_weighed(tmp_path: Path) -> None:
    assert open_checkpoint(folder_with(tmp_path)).config.experts == Experts(20, 3, 64, normalised=False)
    config = open_checkpoint(folder_with(tmp_path / "other", num_experts=None, num_local_experts=20)).config
    assert [config.is_mixture(layer) for layer in range(2)] == [True, True]
    every_third = Experts(count=4, per_token=1, ffn=32, normalised=True, every=3, dense_layers=(5,))
    assert [layer for layer in range(9) if every_third.has(layer)] == [2, 8]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("expert_shared_count", 2, "expert_shared_count is 2, only 0 is supported"),
        ("expert_gating_func", 2, "expert_gating_func is 2, only 1 or 3 is supported"),
        ("expert_weights_scale", 2.5, "expert_weights_scale is 2.5, only 0.0 or 1.0 is supported"),
        ("leading_dense_block_count", 1, "leading_dense_block_count is 1, only 0 is supported"),
    ],
)
def test_a_router_that_is_not_done_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: float, complaint: str
) -> None:
    add = gguf.GGUFWriter.add_expert_count

    def and_more(writer: gguf.GGUFWriter, count: int) -> None:
        add(writer, count)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen3moe.{key}", value)

    monkeypatch.setattr(gguf.GGUFWriter, "add_expert_count", and_more)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf", MOE))


def test_a_mixture_of_another_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", MOE, architecture="llama")
    with pytest.raises(CheckpointError, match="of experts of architecture llama; supported: qwen3moe, gpt-oss"):
        open_checkpoint(path)
