"""Checkpoints: what is read is what was written, and whatever is damaged or foreign is refused with a reason."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError, DecoderConfig, llama3_rope_factors
from kernels.gguf_header import BLOCK_TYPES, SkippedStrings, read_gguf_header
from kernels.tensor_names import expected_shapes
from tests.kernels.families import FAMILIES
from tests.kernels.tiny import Tiny, tiny_weights, write_tiny_folder, write_tiny_gguf
from tests.models import default_model

SHAPE = Tiny(head_dim=32, tied_head=False)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", SHAPE)


def test_config_of_a_gguf_is_what_was_written(tiny_gguf: Path):
    config = open_checkpoint(tiny_gguf).config
    assert config == DecoderConfig(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        ffn=128,
        vocabulary=256,
        context_length=1024,
        norm_eps=float(np.float32(1e-5)),
        rope_base=10_000.0,
        rotary_dim=32,
        rope_interleaved=True,
        tied_head=False,
    )


def test_names_and_shapes_are_the_expected_ones(tiny_gguf: Path, tmp_path: Path):
    for checkpoint in (open_checkpoint(tiny_gguf), open_checkpoint(write_tiny_folder(tmp_path / "folder", SHAPE))):
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        assert shapes == expected_shapes(checkpoint.config)
        assert all(checkpoint.tensor(name).shape == shape for name, shape in shapes.items())


def test_raw_bytes_and_tensors_are_those_of_the_gguf_library(tiny_gguf: Path):
    checkpoint = open_checkpoint(tiny_gguf)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    for ours, theirs, kind in [
        ("layers.1.mlp.down.weight", "blk.1.ffn_down.weight", "Q4_1"),
        ("layers.0.attention.q.weight", "blk.0.attn_q.weight", "Q4_1"),
        ("head.weight", "output.weight", "Q8_0"),
        ("norm.weight", "output_norm.weight", "F32"),
    ]:
        raw = checkpoint.raw(ours)
        assert raw.kind == kind
        assert raw.rows.tobytes() == stored[theirs].data.tobytes()
        expected = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        assert torch.equal(checkpoint.tensor(ours), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_every_block_type_gives_back_the_weights_but_for_its_rounding(tmp_path: Path, kind: Kind):
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", linear=kind))
    weight = torch.from_numpy(tiny_weights(Tiny())["blk.0.ffn_up.weight"])
    error = (checkpoint.tensor("layers.0.mlp.up.weight") - weight).norm() / weight.norm()
    assert error <= {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01}.get(kind.name, 0.1)


def test_block_sizes_are_those_of_ggml():
    for number, block in BLOCK_TYPES.items():
        assert (block.elements, block.size_bytes) == gguf.GGML_QUANT_SIZES[Kind(number)]
        assert block.name == Kind(number).name


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_super_blocks_can_be_read(tmp_path: Path, kind: str):
    """No encoder for these is at hand: bytes are drawn at random, with small finite scales."""
    elements, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = np.random.default_rng(0).integers(0, 256, (256, size), np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for start in {"Q4_K": (0, 2), "Q6_K": (size - 2,)}[kind]:
        blocks[:, start : start + 2] = scale
    shape = Tiny(hidden=elements, heads=8, head_dim=32, kv_heads=2, layers=1)
    stored = {"blk.0.attn_output.weight": (blocks, Kind[kind])}
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "super.gguf", shape, stored=stored))
    read = checkpoint.tensor("layers.0.attention.o.weight")
    assert torch.equal(read, torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind])))
    assert torch.isfinite(read).all()


def test_tied_head_is_the_embedding(tmp_path: Path):
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tied.gguf"))
    assert checkpoint.config.tied_head
    assert "head.weight" not in checkpoint.names()
    assert torch.equal(checkpoint.tensor("head.weight"), checkpoint.tensor("embedding.weight"))


def test_default_model_is_described():
    checkpoint = open_checkpoint(default_model())
    config = checkpoint.config
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.vocabulary, config.context_length, config.rope_base, config.tied_head) == (49152, 8192, 1e5, True)
    assert {checkpoint.raw(name).kind for name in checkpoint.names()} == {"Q4_1", "Q8_0", "F32"}


def test_vocabulary_is_stepped_over(tiny_gguf: Path):
    metadata = read_gguf_header(tiny_gguf).metadata
    assert metadata["tokenizer.ggml.tokens"] == SkippedStrings(256)
    assert metadata["tokenizer.ggml.token_type"].tolist() == [1] * 256


def test_opening_and_reading_bytes_imports_neither_torch_nor_gguf(tiny_gguf: Path):
    program = (
        "import sys, pathlib; from kernels.checkpoint import open_checkpoint\n"
        "raw = open_checkpoint(pathlib.Path(sys.argv[1])).raw('head.weight')\n"
        "print(raw.kind, *sorted({'torch', 'gguf', 'safetensors'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", program, tiny_gguf], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == ["Q8_0"]


def test_names_that_do_not_exist_are_key_errors(tiny_gguf: Path):
    with pytest.raises(KeyError):
        open_checkpoint(tiny_gguf).tensor("layers.2.mlp.up.weight")


def test_other_architectures_are_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"'falcon'; supported in GGUF: llama"):
        open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", architecture="falcon"))
    folder = write_tiny_folder(tmp_path / "folder")
    change(folder, model_type="gpt2")
    with pytest.raises(CheckpointError, match=r"'gpt2'; supported in safetensors: llama, mistral"):
        open_checkpoint(folder)


def change(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention_bias": True}, r"attention\.\w\.bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [8.0]}, "rope_scaling"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": ["linear_attention"] * 2}, "layer_types"),
        ({"model_type": "gpt_neox"}, "supported in safetensors: llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_hidden_layers": 2**40}, "layers"),
        ({"num_hidden_layers": 1}, r"layers\.1"),
        ({"num_attention_heads": 3}, "heads"),
        ({"intermediate_size": 96}, "shapes contradict"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"head_dim": 2**30, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "head_dim"),
        ({"model_type": "mistral", "sliding_window": 64, "num_hidden_layers": 2**30}, "num_hidden_layers"),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": 2}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": [["full_attention"], {}]}, "layer_types"),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": "all"},
         "max_window_layers"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope base above 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}}, "high_freq_factor"),
    ],
)
def test_settings_that_no_decoder_here_runs_are_refused(tmp_path: Path, settings: dict[str, object], reason: str):
    folder = write_tiny_folder(tmp_path / "folder")
    change(folder, **settings)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_keep_their_type_as_raw_and_widen_as_tensor(tmp_path: Path, dtype: torch.dtype):
    folder = write_tiny_folder(tmp_path / "folder")
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    stored = weights["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(checkpoint.tensor("layers.1.mlp.up.weight"), stored.float())
    raw = checkpoint.raw("layers.1.mlp.up.weight")
    assert raw.kind == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert raw.rows.shape == (128, 64 * dtype.itemsize)
    assert raw.rows.tobytes() == stored.view(torch.uint8).numpy().tobytes()


def test_missing_shards_tensors_and_foreign_types_are_named(tmp_path: Path):
    folder = write_tiny_folder(tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        open_checkpoint(folder)
    index.unlink()
    removed = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight"):
        open_checkpoint(folder)
    save_file(weights | {"model.norm.weight": removed.to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        open_checkpoint(folder)
    save_file(weights | {"model.norm.weight": removed, "model.extra": removed.clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        open_checkpoint(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(folder)


def test_llama3_rope_scaling_stretches_long_waves_and_keeps_short_ones(tmp_path: Path):
    folder = write_tiny_folder(tmp_path / "folder", Tiny(head_dim=32))
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    change(folder, rope_scaling=scaling)
    factors = open_checkpoint(folder).config.rope_factors
    assert factors is not None
    assert factors == llama3_rope_factors(
        1e4, 32, factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=512
    )
    assert factors[0] == 1.0 and factors[-1] == 8.0
    assert list(factors) == sorted(factors)
    assert any(1.0 < factor < 8.0 for factor in factors)


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "", "..", "a/b.safetensors", "config.json", 1,
                                  None, [], "x" * 300 + ".safetensors"])
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path: Path, name: object):
    folder = write_tiny_folder(tmp_path / "folder")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    listed = {"weight_map": {"a": "model.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"index\.json (names|is damaged)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "d2t.json"])
def test_json_far_too_deep_is_damage(tmp_path: Path, file: str):
    folder = write_tiny_folder(tmp_path / "folder")
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"\.json is (no JSON|damaged)"):
        open_checkpoint(folder)


def test_a_stack_of_experts_cannot_multiply_a_long_name(tiny_gguf: Path, tmp_path: Path):
    data = tiny_gguf.read_bytes()
    name = b"blk." + b".experts.*." * 20_000 + b".ffn_gate_exps.weight"
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 20_000, 0, 0)
    first, count = data.index(b"token_embd.weight") - 8, int.from_bytes(data[8:16], "little") + 1
    path = tmp_path / "long.gguf"
    path.write_bytes(data[:8] + count.to_bytes(8, "little") + data[16:first] + info + data[first:])
    with pytest.raises(CheckpointError, match="the name of a tensor has"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (b"split.count", "split GGUF"),
        (b"llama.expert_count", "mixture of experts"),
        (b"llama.attention.sliding_window", "an array of 3 uint32"),
        (b"llama.rope.scaling.type", "an array of 3 uint32"),
        (b"llama.block_count", "an array of 3 uint32"),
    ],
)
def test_an_array_in_place_of_a_number_is_refused(tiny_gguf: Path, tmp_path: Path, key: bytes, reason: str):
    data = tiny_gguf.read_bytes()
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQIII", 9, 4, 3, 1, 2, 3)
    count = int.from_bytes(data[16:24], "little") + 1
    path = tmp_path / "array.gguf"
    first = data.index(b"token_embd.weight") - 8  # last among the metadata: it replaces what was there
    path.write_bytes(data[:16] + count.to_bytes(8, "little") + data[24:first] + array + data[first:] + bytes(32))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


def test_layers_of_experts_are_counted_before_they_are_named(tmp_path: Path):
    folder = write_tiny_folder(tmp_path / "folder", FAMILIES["qwen3_moe"])
    found = len(load_file(folder / "model.safetensors"))
    change(folder, num_experts=found)
    with pytest.raises(CheckpointError, match=f"layers of {found} experts but holds"):
        open_checkpoint(folder)


def test_places_without_a_model_are_explained(tmp_path: Path, tiny_gguf: Path):
    with pytest.raises(CheckpointError, match="there is no model"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(tmp_path)
    (tmp_path / "text.gguf").write_text("once upon a time there was no model")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tiny_gguf.parent).path == tiny_gguf
    (tmp_path / "second.gguf").write_text("")
    with pytest.raises(CheckpointError, match=r"several GGUF files; name one of second\.gguf, text\.gguf"):
        open_checkpoint(tmp_path)


def test_files_cut_short_anywhere_are_refused(tiny_gguf: Path, tmp_path: Path):
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, 400, 7), *range(400, len(data) - 32, 997), len(data) - 32]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="download it again"):
            open_checkpoint(path)


def test_damaged_heads_are_refused_or_read_but_never_break_the_reader(tiny_gguf: Path, tmp_path: Path):
    data = tiny_gguf.read_bytes()
    head = read_gguf_header(tiny_gguf).tensors["token_embd.weight"].start
    path = tmp_path / "damaged.gguf"
    choose = random.Random(5)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 1, 4])):
            damaged[choose.randrange(head)] = choose.choice([0, 0xFF, choose.randrange(256)])
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100
