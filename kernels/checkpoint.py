"""A model's weights on disk, under one set of names, read when asked for.

Rule: opening reads no weight, but checks all there is to check without one: architecture, names, shapes, lengths of
files. A checkpoint that this decoder family cannot run is refused here, with the reason. torch is imported only to make
tensors, and gguf only to dequantise: the native step starts without either.

    embedding.weight [vocabulary, hidden]         norm.weight [hidden]         head.weight [vocabulary, hidden]
    layers.N.attention_norm.weight [hidden]       layers.N.attention.q.weight [heads * head_dim, hidden]
    layers.N.mlp_norm.weight [hidden]             layers.N.attention.{k,v}.weight [kv_heads * head_dim, hidden]
    layers.N.mlp.{gate,up}.weight [ffn, hidden]   layers.N.attention.o.weight [hidden, heads * head_dim]
    layers.N.mlp.down.weight [hidden, ffn]          families of layer norms: a bias for each norm, and no mlp.gate
    layers.N.router.weight [experts, hidden], layers.N.experts.M.{gate,up,down}.weight    of a mixture, instead of mlp
    layers.N.attention.sinks.weight [heads]       .bias beside .weight, where the config has one

With a tied head, `head.weight` is another name of `embedding.weight`. Rows of q and k stand as stored; the config's
`rope_interleaved` says which elements of a head turn together.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels import compressed_tensors
from kernels.checkpoint_config import gguf_config, hugging_face_config, hugging_face_scheme
from kernels.compressed_tensors import Part
from kernels.config import CheckpointError, DecoderConfig
from kernels.gguf_header import TensorInfo, read_gguf_header
from kernels.packed_experts import Cut, as_ggml, cuts
from kernels.tensor_names import check_shapes, experts_of, from_gguf, from_hugging_face, some

if TYPE_CHECKING:
    from torch import Tensor

# safetensors and GGML give them the same names.
_PLAIN_KINDS = ("F32", "F16", "BF16")
# a block of 32 weights: an fp16 scale, then 32 of int8
_Q8_0_BYTES = 34
_LONGEST_FILE = 255  # bytes of a name, on most systems


class Raw(NamedTuple):
    """A tensor as stored: GGML's name of its type (Q4_1, F16, ...), and the bytes [rows, bytes of a row].

    Or a kind of `kernels.compressed_tensors`, in the rows that it describes.
    """

    kind: str
    rows: NDArray[np.uint8]


class Checkpoint(Protocol):
    """The weights of one model; `tensor` and `raw` raise KeyError for a name that `names` lacks."""

    config: DecoderConfig
    path: Path

    def names(self) -> list[str]:
        """Every name there is, once: a tied head only as the embedding."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first."""

    def kind(self, name: str) -> str:
        """The kind that `raw` has, without reading it."""

    def tensor(self, name: str) -> "Tensor":
        """A float32 tensor of its own, dequantised where needed."""

    def raw(self, name: str) -> Raw:
        """The stored bytes, read-only; a vector is one row. Of a mapped file where the format allows."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a folder with one, or a Hugging Face folder of config.json and safetensors.

    Raises CheckpointError, which says what is wrong and what to do.
    """
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() and any(path.glob("*.safetensors")):
            return SafetensorsCheckpoint(path)
        if len(ggufs) == 1:
            return GgufCheckpoint(ggufs[0])
        if ggufs:
            names = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path} holds several GGUF files; name one of {names}")
        raise CheckpointError(f"{path} holds no model: neither a .gguf file nor config.json with .safetensors files")
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}; pull one with `tokenmill pull`")
    return GgufCheckpoint(path)


class GgufCheckpoint:
    """One GGUF file, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        self.config = gguf_config(path, header)
        self._file = header.file
        self._infos: dict[str, TensorInfo] = {}
        for stored, info in header.tensors.items():
            name = from_gguf(stored)
            if (experts := experts_of(name, info.shape[0])) is not None:
                self._infos |= dict(zip(experts, _unstacked(info), strict=True))
            elif stored != "rope_freqs.weight":
                self._infos[name] = info
        check_shapes(path, self.config, {name: info.shape for name, info in self._infos.items()})

    def names(self) -> list[str]:
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[self._stored(name)].shape

    def kind(self, name: str) -> str:
        return self._infos[self._stored(name)].block.name

    def raw(self, name: str) -> Raw:
        info = self._infos[self._stored(name)]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        return Raw(info.block.name, self._file[info.start : info.start + info.size_bytes].reshape(rows, -1))

    def tensor(self, name: str) -> "Tensor":
        return _dequantised(self.raw(name)).view(self.shape(name))

    def _stored(self, name: str) -> str:
        return _stored(name, self.config)


class SafetensorsCheckpoint:
    """A Hugging Face folder with weights in float32, float16 or bfloat16, or matrices of bytes: rows of Q8_0 blocks.

    Experts may be in MXFP4, as `kernels.packed_experts` says, and matrices as `kernels.compressed_tensors` says.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.config = hugging_face_config(path)
        self._files: dict[str, Any] = {}  # by the name of a stored tensor
        self._stored_names: dict[str, str] = {}
        self._cuts: dict[str, Cut] = {}
        self._scheme = hugging_face_scheme(path)
        self._parts: dict[str, dict[str, Part]] = {}  # of a matrix in several tensors
        gpt_oss = self.config.experts is not None and self.config.experts.clamped is not None
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        for shard in _shards(path):
            try:
                file = safe_open(shard, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{shard} is damaged or cut short ({error}); download it again") from error
            for stored in file.keys():  # noqa: SIM118 - a file is no dictionary
                if stored.endswith("rotary_emb.inv_freq"):
                    continue
                module, _, last = stored.rpartition(".")
                in_parts = self._scheme is not None and last.startswith("weight_")
                name = from_hugging_face(f"{module}.weight" if in_parts else stored)
                if name == "head.weight" and self.config.tied_head:
                    continue
                self._files[stored] = file
                piece = file.get_slice(stored)
                shape, kind = tuple(piece.get_shape()), piece.get_dtype()
                eight_bits = self._scheme is not None and kind in compressed_tensors.EIGHT_BIT_TYPES
                if in_parts or (eight_bits and last == "weight"):
                    self._parts.setdefault(name, {})[last] = Part(stored, kind, shape)
                    continue
                experts = cuts(stored, shape) if gpt_oss else None
                packed = experts is not None and all(cut.kind for cut in experts.values())  # exponents too
                if experts is None and kind == "U8" and len(shape) == 2 and shape[1] % _Q8_0_BYTES == 0:
                    shape, kind = (shape[0], shape[1] // _Q8_0_BYTES * 32), "Q8_0"
                elif kind not in (("U8",) if packed else _PLAIN_KINDS):
                    can = "U8" if packed else ", ".join(_PLAIN_KINDS)
                    raise CheckpointError(f"{shard}: {stored} is stored as {kind}; {can} can be read")
                if experts is None:
                    self._stored_names[name], shapes[name] = stored, shape
                    kinds[name] = "F32" if self._exceeds_one(name) else kind
                    continue
                self._cuts |= experts
                shapes |= {expert: cut.shape for expert, cut in experts.items()}
                kinds |= {expert: cut.kind or kind for expert, cut in experts.items()}
        self._check_scales()
        for name in self._parts:
            if name in shapes:
                raise CheckpointError(f"{path} holds {name} twice, plain and quantised; download it again")
            shapes[name], kinds[name] = self._shape_in_parts(name), self._scheme.kind if self._scheme else ""
        check_shapes(path, self.config, shapes)
        self._shapes, self._kinds = shapes, kinds

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[_stored(name, self.config)]

    def kind(self, name: str) -> str:
        return self._kinds[_stored(name, self.config)]

    def raw(self, name: str) -> Raw:
        import torch

        if self._exceeds_one(name):
            return Raw("F32", self.tensor(name).view(1, -1).numpy().view(np.uint8))
        if (parts := self._parts.get(_stored(name, self.config))) is not None:
            return Raw(self.kind(name), self._rows_in_parts(parts))
        stored = self._plain(name)
        if (cut := self._cuts.get(name)) and cut.scales:
            return Raw(cut.kind, as_ggml(stored.numpy(), self._of_expert(cut.scales, cut).numpy()))
        rows = stored.shape[0] if stored.dim() > 1 else 1
        return Raw(self.kind(name), stored.contiguous().view(torch.uint8).view(rows, -1).numpy())

    def tensor(self, name: str) -> "Tensor":
        if _stored(name, self.config) in self._parts:
            return _dequantised(self.raw(name))
        stored = self._plain(name)
        if self._exceeds_one(name):
            return stored.float() + 1.0
        return _dequantised(self.raw(name)) if stored.element_size() == 1 else stored.float()

    def _exceeds_one(self, name: str) -> bool:
        """Whether what is stored is by how much a norm's weights exceed 1, as it is for layer norms."""
        return self.config.layer_norm and name.endswith("norm.weight")

    def _plain(self, name: str) -> "Tensor":
        name = _stored(name, self.config)
        if cut := self._cuts.get(name):
            return self._of_expert(cut.stored, cut)
        stored = self._stored_names[name]
        plain: Tensor = self._files[stored].get_tensor(stored)
        return plain

    def _of_expert(self, stored: str, cut: Cut) -> "Tensor":
        whole: Tensor = self._files[stored].get_slice(stored)[cut.expert]
        return (whole.T if cut.transposed else whole)[cut.rows].contiguous()

    def _shape_in_parts(self, name: str) -> tuple[int, int]:
        assert self._scheme is not None
        parts, said = self._parts[name], []
        if (part := parts.get("weight_shape")) is not None:
            if part.shape != (2,) or part.kind not in ("I64", "I32"):
                raise CheckpointError(f"{self.path}: {part.stored} should be two whole numbers; download it again")
            said = self._read(part).tolist()
        return compressed_tensors.shape_of(self.path, name, self._scheme, parts, said)

    def _rows_in_parts(self, parts: dict[str, Part]) -> NDArray[np.uint8]:
        import torch

        scales = self._read(parts["weight_scale"]).float()
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{self.path}: {parts['weight_scale'].stored} holds what is no number")
        if "weight" in parts:
            codes = self._read(parts["weight"]).view(torch.uint8).numpy()
            return compressed_tensors.channel_rows(codes, scales.numpy())
        zeros = self._read(parts["weight_zero_point"]).numpy() if "weight_zero_point" in parts else None
        return compressed_tensors.grouped_rows(self._read(parts["weight_packed"]).numpy(), scales.numpy(), zeros)

    def _read(self, part: Part) -> "Tensor":
        stored: Tensor = self._files[part.stored].get_tensor(part.stored)
        return stored

    def _check_scales(self) -> None:
        """Every tensor of MXFP4 blocks has one of exponents, of its shape."""
        for blocks, scales in {(cut.stored, cut.scales) for cut in self._cuts.values() if cut.scales}:
            if scales not in self._files:
                raise CheckpointError(f"{self.path} lacks {scales}; download it again")
            sizes, found = (tuple(self._files[name].get_slice(name).get_shape()) for name in (blocks, scales))
            if found != sizes[:-1] or self._files[scales].get_slice(scales).get_dtype() != "U8":
                raise CheckpointError(f"{self.path}: {scales} does not fit {blocks}; download it again")


def _unstacked(info: TensorInfo) -> list[TensorInfo]:
    """The tensors [...] of a stack [count, ...]."""
    count, *shape = info.shape
    size = info.size_bytes // count
    return [TensorInfo(info.block, tuple(shape), info.start + size * at, size) for at in range(count)]


def _stored(name: str, config: DecoderConfig) -> str:
    return "embedding.weight" if name == "head.weight" and config.tied_head else name


def _dequantised(raw: Raw) -> "Tensor":
    """Float32 [rows, elements]."""
    import torch

    if raw.kind in compressed_tensors.KINDS:
        return torch.from_numpy(compressed_tensors.dequantised(*raw))
    if raw.kind == "F32":
        return torch.from_numpy(raw.rows.view(np.float32).copy())
    if raw.kind == "F16":
        return torch.from_numpy(raw.rows.view(np.float16).astype(np.float32))
    if raw.kind == "BF16":
        return torch.from_numpy((raw.rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(raw.rows, GGMLQuantizationType[raw.kind]))


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a folder; those of its index where it has one."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    foreign = [repr(name) for name in names if not _is_shard(name)]
    if foreign:
        raise CheckpointError(f"{index} names {some(foreign)}, not .safetensors files beside it: use another model")
    shards = [path / name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}; download the rest")
    return shards


def _is_shard(name: object) -> bool:
    """Whether an index may name it: a file of its own folder, nowhere else."""
    return (isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") and "\0" not in name
            and len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_FILE)
