"""Models as strangers publish them: GGUF files, folders of safetensors, their configurations.

What may come of them is a checkpoint, whose tensors can all be read, or a CheckpointError; and for what a gateway makes
of the same files a card, or UnusableModel.
"""

import contextlib
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy import hub
from gateway.model_files import UnusableModel
from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError
from tests.kernels.families import FAMILIES
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf
from tests.laws.mutations import DEEP, bent, changed, nested

Play = Callable[[int], None]
MOST_READ = 8  # tensors of one checkpoint
SHARDS = ("../model.safetensors", "/dev/zero", "", ".", "..", "model.safetensors/", "\x00", "sub/model.safetensors", 1,
          None, [], "x" * 300, "model.safetensors", "config.json")


SHAPES = (Tiny(layers=1), Tiny(layers=1, family="qwen3", qk_norm=True, tied_head=False),
          Tiny(layers=2, family="qwen3moe", qk_norm=True, experts=4, experts_per_token=2, expert_ffn=64),
          replace(FAMILIES["gpt_oss"], family="gpt-oss"))


def _opened(path: Path, chooser: random.Random) -> None:
    with contextlib.suppress(CheckpointError):
        checkpoint = open_checkpoint(path)
        names = checkpoint.names()
        with np.errstate(all="ignore"):  # scales that are no numbers
            for name in chooser.sample(names, min(MOST_READ, len(names))):
                assert checkpoint.tensor(name).shape == checkpoint.shape(name)
                checkpoint.raw(name)


@contextlib.contextmanager
def gguf() -> Iterator[Play]:
    """The head of a file, at the places where its numbers and names stand."""
    with tempfile.TemporaryDirectory() as folder:
        whole = [write_tiny_gguf(Path(folder) / f"{number}.gguf", shape).read_bytes()
                 for number, shape in enumerate(SHAPES)]
        path = Path(folder) / "bent" / "model.gguf"
        path.parent.mkdir()

        def play(seed: int) -> None:
            chooser = random.Random(seed)
            data = chooser.choice(whole)
            head = data.rfind(b".weight") + 64
            match seed % 10:
                case 0:
                    path.write_bytes(_stack_of_long_names(data, chooser))
                case 1 | 2 | 3 | 4:
                    path.write_bytes(_retyped(data, chooser))
                case _:
                    path.write_bytes(bent(data, chooser, head))
            _opened(path, chooser)
            with contextlib.suppress(UnusableModel, CheckpointError):
                hub.prepare(path.parent)

        yield play


def _retyped(data: bytes, chooser: random.Random) -> bytes:
    """With one to three values of its metadata that are of another type, far larger, or an array."""
    for _ in range(chooser.randint(1, 3)):
        key = chooser.choice(KEYS)
        at = data.find(key)
        if at < 0:
            continue
        at += len(key)
        (kind,) = struct.unpack_from("<I", data, at)
        end = at + 4 + VALUE_BYTES[kind] if kind in VALUE_BYTES else at + 12 + struct.unpack_from("<Q", data, at + 4)[0]
        data = data[:at] + chooser.choice(VALUES) + data[end:]
    return data


KEYS = (b"general.architecture", b".block_count", b".context_length", b".embedding_length", b".feed_forward_length",
        b".head_count", b".head_count_kv", b".key_length", b".value_length", b".freq_base", b".dimension_count",
        b".sliding_window", b"rms_epsilon", b".expert_count", b".expert_used_count", b".scaling.type",
        b".scaling.factor", b"tokenizer.ggml.model")
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
VALUES = (*(struct.pack("<IQ", 10, number) for number in (0, 1, 2**32, 2**63)), struct.pack("<Iq", 11, -1),
          *(struct.pack("<Id", 12, number) for number in (0.0, 1e-308, 1e308, float("inf"), float("nan"))),
          struct.pack("<I?", 7, True), struct.pack("<IQ", 8, 5) + b"llama", struct.pack("<IQ", 8, 2) + b"\xff\xfe",
          struct.pack("<IIQIII", 9, 4, 3, 1, 2, 3), struct.pack("<IIQ", 9, 4, 0), struct.pack("<IIQ", 9, 8, 0),
          struct.pack("<IIQ", 9, 9, 1), struct.pack("<IIQ", 9, 4, 2**62), struct.pack("<IIQ", 9, 8, 2**62))


def _stack_of_long_names(data: bytes, chooser: random.Random) -> bytes:
    """With one more tensor, of many experts, under a name in which each of them is to be written many times."""
    name = b".experts.*." * chooser.choice((1, 100, 20_000)) + b".ffn_gate_exps.weight"
    name = b"blk." + b"0" * (-(len(name) + 36) % 32) + name  # what is behind it stays aligned
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, chooser.choice((1, 1000, 20_000)), 0, 0)
    first = data.index(b"token_embd.weight") - 8
    (count,) = struct.unpack_from("<Q", data, 8)
    return data[:8] + struct.pack("<Q", count + 1) + data[16:first] + info + data[first:]


@contextlib.contextmanager
def safetensors() -> Iterator[Play]:
    """The header of the tensors as a document, the file as bytes, and an index that names other places."""
    with tempfile.TemporaryDirectory() as parent:
        folder = write_tiny_folder(Path(parent) / "model")
        file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        whole = file.read_bytes()
        size = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:size])

        def play(seed: int) -> None:
            chooser = random.Random(seed)
            index.unlink(missing_ok=True)
            match seed % 3:
                case 0:
                    said = json.dumps(changed(header, chooser, HEADERS)).encode()
                    file.write_bytes(len(said).to_bytes(8, "little") + said + whole[size:])
                case 1:
                    file.write_bytes(bent(whole, chooser, size + 64))
                case _:
                    file.write_bytes(whole)
                    shards = {name: chooser.choice(SHARDS) for name in chooser.sample([*header], 3)}
                    listed = {name: "model.safetensors" for name in header} | shards
                    index.write_bytes(_written({"weight_map": listed}, chooser))
            _opened(folder, chooser)

        yield play


# what stands for a shape, a type or a place of a tensor
HEADERS: tuple[Any, ...] = (
    None, 0, -1, 2**40, 2**63, 2**64, "F32", "F8_E4M3", "U8", "I64", [], [0], [0, 0], [2**40, 2**40], [2**64 - 1],
    [1] * 4000, [0, 2**63], {}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})


@contextlib.contextmanager
def config() -> Iterator[Play]:
    """config.json, tokenizer_config.json and generation_config.json."""
    with tempfile.TemporaryDirectory() as parent:
        shapes = [Tiny(), *(shape for shape in FAMILIES.values())]
        folders = [write_tiny_folder(Path(parent) / str(number), shape) for number, shape in enumerate(shapes)]
        documents = [json.loads((folder / "config.json").read_text()) for folder in folders]

        def play(seed: int) -> None:
            chooser = random.Random(seed)
            number = chooser.randrange(len(folders))
            folder = folders[number]
            document = documents[number] | {key: chooser.choice(MORE[key]) for key in chooser.sample([*MORE], 2)}
            (folder / "config.json").write_bytes(_written(changed(document, chooser, JSON), chooser))
            _opened(folder, chooser)

        yield play


# values that JSON can have; NaN and Infinity too, which Python's reader takes
JSON: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**62, 2**63, 10**30, 10**400, 0.0, 1e-308, 1e308, float("inf"),
    float("nan"), "", "x", "llama", [], [1], ["full_attention"], ["x", []], [{}], {}, {"a": 1}, {"rope_type": []},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, {"type": "linear", "factor": 1e300},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 8})
MORE: dict[str, tuple[Any, ...]] = {
    "rope_scaling": JSON, "sliding_window": (1, 2**40), "use_sliding_window": (True,), "layer_types": JSON,
    "max_window_layers": JSON, "num_hidden_layers": (1, 2, 2**33, 10**30), "mlp_only_layers": JSON,
    "quantization_config": JSON, "head_dim": (16, 2**40, 10**30), "decoder_sparse_step": JSON,
    "partial_rotary_factor": JSON, "rope_theta": (1.0, 1, 10**400), "num_experts": (1, 2**31),
}


def _written(document: Any, chooser: random.Random) -> bytes:
    """As JSON; now and then cut, bent, or far too deep."""
    text = json.dumps(document).encode()
    match chooser.randrange(12):
        case 0:
            return bent(text, chooser)
        case 1:
            return nested(DEEP, chooser)
        case 2:
            return text[:-1] + b', "more": ' + nested(DEEP, chooser) + b"}"
        case _:
            return text
