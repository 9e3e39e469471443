"""Every family of decoders computes what Hugging Face transformers computes, and every path computes the same."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from kernels import ops
from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError, DecoderConfig, yarn_rope
from kernels.decoder import TorchDecoder
from kernels.launch import INTERPRETED
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import StepInputs
from tests.kernels.families import FAMILIES
from tests.kernels.test_native_step import same_bits, step_of
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf

GOLDEN = {
    case["family"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "families.json").read_text())["cases"]
}
BLOCKS = 12
TABLE = (7, 2, 11, 0, 5, 9, 1)
needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))


def step(tokens: list[int], start: int = 0, samples: range | None = None) -> StepInputs:
    return step_of((tokens, start, TABLE), samples=samples)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_makes_the_tokens_and_logits_of_transformers(tmp_path: Path, family: str) -> None:
    case = GOLDEN[family]
    prompt = case["prompt"]
    decoder = TorchDecoder.load(write_tiny_folder(tmp_path / "model", FAMILIES[family]), blocks=BLOCKS)
    logits = decoder.logits(step(prompt, samples=range(len(prompt))))
    assert logits.argmax(-1).tolist() == case["largest"]
    assert np.abs(logits[-1, : len(case["last"])] - case["last"]).max() < 1e-3
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < len(case["output"]):
        tokens += decoder.step(step(tokens[-1:], len(prompt) + len(tokens) - 1)).tolist()
    assert tokens == case["output"]


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_step_is_the_specification_to_the_bit_however_it_is_cut(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "model", FAMILIES[family]))
    prompt = GOLDEN[family]["prompt"]
    every = range(len(prompt))
    expected = SpecifiedDecoder(checkpoint, blocks=BLOCKS).logits(step(prompt, samples=every))
    native = NativeDecoder(checkpoint, blocks=BLOCKS, threads=2)
    assert same_bits(native.logits(step(prompt, samples=every)), expected)
    native.logits(step(prompt[:37]))
    assert same_bits(native.logits(step(prompt[37:], 37, range(len(prompt) - 37))), expected[37:])
    plain = UncompiledDecoder(checkpoint, blocks=BLOCKS, threads=1)
    assert same_bits(plain.logits(step(prompt, samples=every)), expected)
    reference = TorchDecoder(checkpoint, blocks=BLOCKS).logits(step(prompt, samples=every))
    # float weights: only the order of additions and the fp16 cache lie between the two; else activations in int8 too
    quantised = any(checkpoint.kind(name) == "MXFP4" for name in checkpoint.names())
    apart = 0.05 if quantised else 5e-3
    assert rms(native.logits(step(prompt, samples=every)) - reference) < apart * rms(reference)


@needs_compiler
@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["mistral", "qwen3", "nemotron", "gpt_oss"])
def test_windows_head_norms_and_sinks_go_with_every_kv_format(tmp_path: Path, family: str, kv_format: str) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "model", FAMILIES[family]))
    prompt = GOLDEN[family]["prompt"]
    inputs = step(prompt, samples=range(len(prompt)))
    expected = SpecifiedDecoder(checkpoint, blocks=BLOCKS, kv_format=kv_format).logits(inputs)
    assert same_bits(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2, kv_format=kv_format).logits(inputs), expected)


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [
        Tiny(family="qwen2", qkv_bias=True, seed=3),
        Tiny(family="qwen3", qk_norm=True, head_dim=32, seed=4),
        Tiny(qkv_bias=True, output_bias=True, seed=5),
        Tiny(family="nemotron", layer_norm=True, gated=False, head_dim=32, rotary_dim=16, tied_head=False, seed=6),
    ],
)
def test_gguf_files_of_a_family_hold_the_same_model(tmp_path: Path, shape: Tiny) -> None:
    prompt = GOLDEN["qwen2"]["prompt"]
    inputs = step(prompt, samples=range(len(prompt)))
    gguf_file = write_tiny_gguf(tmp_path / "model.gguf", shape)
    native = NativeDecoder(open_checkpoint(gguf_file), blocks=BLOCKS, threads=1)
    assert same_bits(native.logits(inputs), SpecifiedDecoder(open_checkpoint(gguf_file), blocks=BLOCKS).logits(inputs))
    plain = write_tiny_gguf(tmp_path / "plain.gguf", shape, linear=Kind.F32, head=Kind.F32)
    settings = (("attention_bias", True),) if shape.output_bias else ()
    folder = write_tiny_folder(tmp_path / "folder", Tiny(**{**vars_of(shape), "settings": settings}))
    ours, theirs = (TorchDecoder.load(path, blocks=BLOCKS).logits(inputs) for path in (plain, folder))
    assert rms(ours - theirs) < 1e-5 * rms(theirs)


def vars_of(shape: Tiny) -> dict[str, object]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs its interpreter or a GPU")
@pytest.mark.parametrize(
    "family", ["mistral", "qwen2_windowed", "qwen3", "llama_biased", "llama_yarn", "nemotron", "gpt_oss"]
)
def test_the_triton_operators_make_the_reference_s_logits(tmp_path: Path, family: str) -> None:
    path = write_tiny_folder(tmp_path / "model", FAMILIES[family])
    prompt = GOLDEN[family]["prompt"]
    inputs = step(prompt, samples=range(60, len(prompt)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = TorchDecoder.load(path, blocks=BLOCKS).logits(inputs)
    found = TorchDecoder.load(path, blocks=BLOCKS, device=device, ops=ops.triton()).logits(inputs)
    assert rms(found - expected) < 1e-4 * rms(expected)


def test_a_window_is_read_as_its_family_means_it(tmp_path: Path) -> None:
    def config(family: str, **settings: object) -> DecoderConfig:
        shape = Tiny(family=family, layers=3, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
        shape = Tiny(**{**vars_of(shape), "settings": tuple(settings.items())})
        return open_checkpoint(write_tiny_folder(tmp_path / str(len(list(tmp_path.iterdir()))), shape)).config

    assert config("mistral", sliding_window=32).windows == (32, 32, 32)
    assert config("mistral", sliding_window=None).windows is None
    assert config("llama", sliding_window=32).windows is None
    assert config("qwen2", sliding_window=32, use_sliding_window=False).windows is None
    assert config("qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=2).windows == (0, 0, 32)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    windows = config("qwen3", sliding_window=32, use_sliding_window=True, layer_types=kinds).windows
    assert windows == (0, 32, 0)


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_seldom() -> None:
    yarn = yarn_rope(10_000.0, 64, factor=4.0, original_context_length=4096)
    assert yarn.factors[0] == 1.0
    assert yarn.factors[-1] == 4.0
    assert list(yarn.factors) == sorted(yarn.factors)
    assert yarn.magnitude == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert yarn_rope(10_000.0, 64, factor=1.0, original_context_length=4096).magnitude == 1.0


def test_an_unknown_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    known = "supported in safetensors: llama, mistral, qwen2, qwen3, qwen3_moe, nemotron"
    with pytest.raises(CheckpointError, match=known):
        open_checkpoint(write_tiny_folder(tmp_path / "model", Tiny(family="falcon")))
    with pytest.raises(CheckpointError, match="supported in GGUF: llama, qwen2, qwen3, nemotron"):
        open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf", Tiny(family="gpt2")))
