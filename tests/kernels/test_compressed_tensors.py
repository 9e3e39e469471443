"""Checkpoints in compressed-tensors: what the library packed is read as it reads it; contradictions are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from kernels import compressed_tensors, ops
from kernels.checkpoint import Raw, SafetensorsCheckpoint, open_checkpoint
from kernels.compressed_tensors import FOUR_BIT_KINDS, KINDS
from kernels.config import CheckpointError
from kernels.decoder import TorchDecoder
from kernels.matrix import four_bits
from kernels.native.as_blocks import BLOCKS, AsBlocks
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.weight4 import Weight4, dequantised, unpacked
from tests.kernels.compressed import SHAPE, quantisation, read_back, write_compressed_folder
from tests.kernels.steps import Paged, step_inputs

GOLDEN = Path(__file__).parent / "golden" / "compressed_tensors.safetensors"
PROMPT = np.random.default_rng(3).integers(0, 256, 9).tolist()
UP = "model.layers.1.mlp.up_proj"

Tensors = dict[str, torch.Tensor]


def logits(decoder: TorchDecoder | NativeDecoder | UncompiledDecoder | SpecifiedDecoder) -> np.ndarray:
    part = Paged(list(PROMPT), [5])
    return decoder.logits(step_inputs([(part, len(PROMPT))], sample=[[0, 4, 8]]))


def change(folder: Path, edit: Callable[[Tensors], object] | None = None, **settings: object) -> None:
    """Tensors edited in place, and settings of quantization_config replaced."""
    tensors = load_file(folder / "model.safetensors")
    if edit is not None:
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_packed_is_read_as_the_library_reads_it(kind: str, dtype: str) -> None:
    prefix = f"{kind}.{dtype}."
    parts = {name.removeprefix(prefix): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(prefix)}
    expected = parts.pop("unpacked")
    if "weight" in parts:
        rows = compressed_tensors.channel_rows(
            parts["weight"].view(torch.uint8).numpy(), parts["weight_scale"].float().numpy()
        )
    else:
        zeros = parts.get("weight_zero_point")
        rows = compressed_tensors.grouped_rows(
            parts["weight_packed"].numpy(),
            parts["weight_scale"].float().numpy(),
            None if zeros is None else zeros.numpy(),
        )
    read = torch.from_numpy(compressed_tensors.dequantised(kind, rows))
    assert torch.equal(read.to(expected.dtype), expected)


def test_every_byte_of_fp8_has_torch_s_value() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)[None]
    rows = compressed_tensors.channel_rows(bytes_, np.ones(1, np.float32))
    expected = torch.from_numpy(bytes_).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(compressed_tensors.dequantised("FP8", rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_a_folder_are_what_its_parts_mean(tmp_path: Path, kind: str) -> None:
    folder = write_compressed_folder(tmp_path / "m", kind)
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    parts = {name.rpartition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{UP}.")}
    name = "layers.1.mlp.up.weight"
    assert checkpoint.kind(name) == checkpoint.raw(name).kind == kind
    assert checkpoint.shape(name) == (SHAPE.ffn, SHAPE.hidden) == checkpoint.tensor(name).shape
    assert torch.equal(checkpoint.tensor(name), read_back(parts))
    assert checkpoint.kind("embedding.weight") == checkpoint.kind("head.weight") == "F32"
    # Rows stand alone, as ranks cut them.
    some = compressed_tensors.dequantised(kind, checkpoint.raw(name).rows[5:9])
    assert torch.equal(torch.from_numpy(some), checkpoint.tensor(name)[5:9])


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", FOUR_BIT_KINDS)
def test_a_matrix_stays_in_four_bits_to_the_last_bit(tmp_path: Path, kind: str, scales: torch.dtype) -> None:
    checkpoint = open_checkpoint(write_compressed_folder(tmp_path / "m", kind, scales=scales))
    name = "layers.1.mlp.up.weight"
    weight = four_bits(checkpoint.raw(name), torch.device("cpu"))
    assert weight.group == int(kind.partition("_G")[2]) and weight.kind == (0 if kind.startswith("INT") else 1)
    assert torch.equal(dequantised(weight).float(), checkpoint.tensor(name))
    assert weight.scales.dtype == (torch.float16 if scales == torch.bfloat16 else torch.float32)


def test_scales_too_small_for_sixteen_bits_stay_in_thirty_two() -> None:
    scales = np.array([[2.0**-30, 1.0]], np.float32)
    rows = compressed_tensors.grouped_rows(np.arange(16, dtype=np.int32)[None], scales, None)
    weight = four_bits(Raw("INT4_G64", rows), torch.device("cpu"))
    assert torch.equal(unpacked(weight)[1], torch.from_numpy(scales))


@pytest.mark.parametrize("kind", FOUR_BIT_KINDS)
def test_a_decoder_in_four_bits_gives_the_dense_one_s_logits(tmp_path: Path, kind: str) -> None:
    folder = write_compressed_folder(tmp_path / "m", kind)
    dense, kept = (TorchDecoder.load(folder, blocks=8, dtype=torch.float16, four_bits=four) for four in (False, True))
    layer = kept.layers[0]
    for matrix in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down):
        assert isinstance(matrix, Weight4)
        assert matrix.nbytes < matrix.outputs * matrix.inputs * 2 * 0.36
    expected = logits(dense)
    spread = float(np.abs(expected).max())
    np.testing.assert_allclose(logits(kept), expected, atol=spread * 5e-3)
    if kind in ("INT4_G64", "UINT4_G128"):  # the interpreter takes seconds
        launched = TorchDecoder.load(folder, blocks=8, dtype=torch.float16, four_bits=True, ops=ops.triton())
        np.testing.assert_allclose(logits(launched), expected, atol=spread * 5e-3)


@pytest.mark.parametrize("kind", ["INT4_G32", "INT4_G64", "INT4_G128", "INT8"])
def test_the_cpu_step_keeps_symmetric_matrices_as_they_are(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(write_compressed_folder(tmp_path / "m", kind))
    for name in ("layers.0.attention.k.weight", "layers.1.mlp.down.weight"):
        blocks = AsBlocks(checkpoint).raw(name)
        assert blocks.kind == AsBlocks(checkpoint).kind(name) == BLOCKS[kind]
        read = quants.dequantize(blocks.rows, GGMLQuantizationType[blocks.kind])
        assert torch.equal(torch.from_numpy(read), checkpoint.tensor(name))
    expected = logits(SpecifiedDecoder(checkpoint, blocks=8))
    assert np.array_equal(logits(UncompiledDecoder(checkpoint, blocks=8, threads=1)), expected)
    if available() is None:
        assert np.array_equal(logits(NativeDecoder(checkpoint, blocks=8, threads=1)), expected)
    near = logits(TorchDecoder(checkpoint, blocks=8))
    assert_close(expected, near, rtol=0, atol=0.05 * float(np.abs(near).max()))


@pytest.mark.skipif(available() is not None, reason=str(available()))
@pytest.mark.parametrize("kind", ["UINT4_G64", "FP8"])
def test_the_cpu_step_refuses_what_it_cannot_keep(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(write_compressed_folder(tmp_path / "m", kind))
    with pytest.raises(ValueError, match=rf"attention\.q\.weight is stored as {kind}; the native step serves"):
        NativeDecoder(checkpoint, blocks=8)
    wide = open_checkpoint(write_compressed_folder(tmp_path / "wide", "INT4_G64", scales=torch.float32))
    with pytest.raises(ValueError, match="has scales that fp16 does not hold"):
        NativeDecoder(wide, blocks=8)


def test_one_scale_for_all_outputs_is_read(tmp_path: Path) -> None:
    folder = write_compressed_folder(tmp_path / "m", "FP8")

    def one_scale(tensors: Tensors) -> None:
        tensors[f"{UP}.weight_scale"] = torch.tensor(0.5)

    change(folder, one_scale)
    codes = load_file(folder / "model.safetensors")[f"{UP}.weight"]
    assert torch.equal(open_checkpoint(folder).tensor("layers.1.mlp.up.weight"), codes.float() * 0.5)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), r"consists of weight_packed, weight_shape, weight_zero_point"),
        (lambda t: t.pop(f"{UP}.weight_zero_point"), "pack-quantized has weight_packed, weight_scale, weight_shape, w"),
        (lambda t: t.update({f"{UP}.weight_g_idx": torch.arange(128)}), "consists of weight_g_idx, weight_packed"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(256, 128)}), "twice, plain and quantised"),
        (lambda t: t[f"{UP}.weight_shape"].copy_(torch.tensor([256, 64])), r"says that it is \[256, 64\]"),
        (lambda t: t[f"{UP}.weight_shape"].copy_(torch.tensor([-256, -128])), r"says that it is \[-256, -128\]"),
        (lambda t: t[f"{UP}.weight_shape"].copy_(torch.tensor([2**62, 2**62])), "says that it is"),
        (lambda t: t.update({f"{UP}.weight_shape": torch.tensor([256.0, 128.0])}), "two whole numbers"),
        (lambda t: t.update({f"{UP}.weight_shape": torch.arange(3)}), "two whole numbers"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.zeros(256 * 16, dtype=torch.int32)}), "is no matrix"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.zeros(256, 16)}), r"is F32 \(256, 16\), not I32"),
        (lambda t: t.update({f"{UP}.weight_scale": torch.zeros(256, 1)}), r"not F32 or F16 or BF16 \(256, 2\)"),
        (lambda t: t.update({f"{UP}.weight_scale": torch.zeros(256, 2, dtype=torch.int32)}), "not F32 or F16 or BF16"),
        (lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(31, 2, dtype=torch.int32)}), r"not I32 \(32, 2\)"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.zeros(256, 12, dtype=torch.int32),
                             f"{UP}.weight_shape": torch.tensor([256, 96])}), "no groups of 64"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, edit: object, reason: str) -> None:
    folder = write_compressed_folder(tmp_path / "m", "UINT4_G64")
    open_checkpoint(folder)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_a_matrix_of_another_shape_than_the_model_s_is_refused(tmp_path: Path) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")

    def widen(tensors: Tensors) -> None:
        for part in ("packed", "scale"):
            tensors[f"{UP}.weight_{part}"] = torch.cat([tensors[f"{UP}.weight_{part}"]] * 2, 1)
        tensors[f"{UP}.weight_shape"] = torch.tensor([256, 256])

    change(folder, widen)
    with pytest.raises(CheckpointError, match=r"shapes contradict .*mlp\.up\.weight \(256, 256\), not \(256, 128\)"):
        open_checkpoint(folder)


def test_scales_that_are_no_numbers_are_refused_when_read(tmp_path: Path) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")
    change(folder, lambda tensors: tensors[f"{UP}.weight_scale"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale holds what is no number"):
        open_checkpoint(folder).tensor("layers.1.mlp.up.weight")


MIXED = {kind: quantisation(kind)["config_groups"]["group_0"] for kind in ("UINT4_G64", "INT4_G32")}


def with_weights(**more: object) -> dict[str, object]:
    said = quantisation("UINT4_G64")
    said["config_groups"]["group_0"]["weights"] |= more
    return said


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "marlin-24"}, "has format 'marlin-24'; pack-quantized, int-quantized, float-quantized can be read"),
        ({"format": ["pack-quantized"]}, "has format"),
        ({"quant_method": "gptq"}, "is quantised as 'gptq'"),
        ({"config_groups": {}}, "should have config_groups"),
        ({"config_groups": {"group_0": {"weights": None}}}, "should say what weights are"),
        ({"config_groups": MIXED},
         "mixes INT4_G32, UINT4_G64"),
        ({"config_groups": {"group_0": {"input_activations": {"dynamic": False}}}}, "scales of their own"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "has a sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "has a transform_config"),
        (with_weights(num_bits=3), "num_bits of pack-quantized weights is 3; supported: 4"),
        (with_weights(type="float"), "type of pack-quantized weights is 'float'"),
        (with_weights(group_size=96), "group_size of pack-quantized weights is 96; supported: 32, 64, 128"),
        (with_weights(group_size=2**70), "group_size"),
        (with_weights(strategy="channel"), "strategy of pack-quantized weights is 'channel'"),
        (with_weights(symmetric="no"), "symmetric"),
        (with_weights(dynamic=True), "dynamic"),
        (with_weights(actorder="group"), "actorder"),
        (with_weights(symmetric=True), r"consists of .*weight_zero_point"),
        (quantisation("INT8"), "int-quantized has weight, weight_scale"),
    ],
)  # fmt: skip
def test_settings_that_are_not_done_here_are_refused(tmp_path: Path, settings: dict[str, object], reason: str) -> None:
    folder = write_compressed_folder(tmp_path / "m", "UINT4_G64")
    change(folder, **settings)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_parts_without_a_word_of_them_in_the_config_are_refused(tmp_path: Path) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is stored as I32"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "model.bin",
                                  "model.safetensors\0", 7, None, ["model.safetensors"]])  # fmt: skip
def test_shards_outside_of_the_folder_are_refused(tmp_path: Path, name: object) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"not \.safetensors files beside it|is damaged"):
        SafetensorsCheckpoint(folder)


def test_a_pickle_under_a_shard_s_name_is_no_checkpoint_and_runs_nothing(tmp_path: Path) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return ran.touch, ()

    torch.save(Malicious(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        open_checkpoint(folder)
    assert not ran.exists()


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, 60000])
def test_files_cut_short_are_refused(tmp_path: Path, cut: int) -> None:
    folder = write_compressed_folder(tmp_path / "m", "INT4_G64")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        open_checkpoint(folder)
