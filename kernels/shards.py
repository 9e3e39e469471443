"""Which part of a model each of several ranks holds (tensor parallelism).

Rule: matrices are cut between outputs, never between inputs. A number is computed whole by one rank, out of inputs that
every rank has; what ranks exchange is results, never parts of a sum. So the number of ranks changes who computes a
number and not what it is (decision 0026).

    q, k, v            whole KV heads with the query heads that read them; where there are more ranks than KV heads, a
                       KV head is at several ranks, which share its query heads
    o, down            columns of the residual stream, in units of 16
    gate, up           columns between, in units of 32
    head               token ids, in units of 16; a tied one has rows of its own here
    embedding, norms   at every rank
"""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kernels.checkpoint import Checkpoint, Raw
from kernels.config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 16  # outputs that the native step computes together
GROUP = 32  # numbers that are quantised together


class Cut(NamedTuple):
    """Columns of a row of numbers: rank r computes those from starts[r] to starts[r + 1]."""

    starts: tuple[int, ...]

    def of(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank + 1])

    @property
    def widths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.starts)]

    @property
    def whole(self) -> int:
        return self.starts[-1]


class Cuts(NamedTuple):
    """All cuts of one model among so many ranks."""

    attention: Cut  # of query heads beside each other
    kv_heads: tuple[slice, ...]  # of each rank; the same one at several ranks where there are not enough
    hidden: Cut
    ffn: Cut
    head: Cut


def cuts(config: DecoderConfig, ranks: int) -> Cuts:
    """Raises ValueError when the model cannot be shared among so many ranks, with a number that would do."""
    if ranks < 1:
        raise ValueError(f"a model is shared among 1 rank or more, not {ranks}")
    if config.head_ids is not None and ranks > 1:
        raise ValueError("a model with a trimmed head is a drafter's, and runs on one rank")
    if config.experts is not None and ranks > 1:
        raise ValueError("ranks cannot share a mixture of experts: leave out --tensor-parallel")
    most = min(config.heads, _units(config.hidden, PANEL), _units(config.ffn, GROUP), _units(config.vocabulary, PANEL))
    if ranks > most or not _shares_heads(config, ranks):
        possible = [count for count in range(1, most + 1) if _shares_heads(config, count)]
        raise ValueError(
            f"{ranks} ranks cannot share {config.heads} query heads on {config.kv_heads} KV heads evenly: choose "
            f"--tensor-parallel {' or '.join(map(str, possible))}"
        )
    kv, group, dim = config.kv_heads, config.heads_per_kv_head, config.head_dim
    if ranks <= kv:
        bounds = _bounds(kv, ranks)
        kv_heads = tuple(slice(*pair) for pair in pairwise(bounds))
        heads = tuple(bound * group for bound in bounds)
    else:
        together = ranks // kv
        kv_heads = tuple(slice(rank // together, rank // together + 1) for rank in range(ranks))
        heads = tuple(rank * group // together for rank in range(ranks + 1))
    return Cuts(
        attention=Cut(tuple(head * dim for head in heads)),
        kv_heads=kv_heads,
        hidden=_cut(config.hidden, PANEL, ranks),
        ffn=_cut(config.ffn, GROUP, ranks),
        head=_cut(config.vocabulary, PANEL, ranks),
    )


class Shard:
    """A `kernels.checkpoint.Checkpoint`: the part of another one that a rank holds.

    Its config is what the rank computes: its own heads and width between, of a whole residual stream and vocabulary.
    """

    def __init__(self, whole: Checkpoint, rank: int, ranks: int) -> None:
        """Raises ValueError when the model cannot be shared so."""
        self.path = whole.path
        self.cuts = cuts(whole.config, ranks)
        self.rank, self.ranks = rank, ranks
        self.config = shard_config(whole.config, rank, ranks)
        self._whole = whole

    def names(self) -> list[str]:
        names = self._whole.names()
        return names if "head.weight" in names else [*names, "head.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        rows, *inputs = self._whole.shape(name)
        return (len(range(rows)[self._rows(name)]), *inputs)

    def kind(self, name: str) -> str:
        return self._whole.kind(name)

    def raw(self, name: str) -> Raw:
        kind, rows = self._whole.raw(name)
        if len(self._whole.shape(name)) > 1:
            return Raw(kind, rows[self._rows(name)])
        count = self._whole.shape(name)[0]  # a vector is one row of plain numbers
        return Raw(kind, rows.reshape(count, -1)[self._rows(name)].reshape(1, -1))

    def tensor(self, name: str) -> "Tensor":
        return self._whole.tensor(name)[self._rows(name)]

    def _rows(self, name: str) -> slice:
        """The outputs of a tensor that are this rank's."""
        part = name.rpartition(".")[0].split(".", 2)[-1]
        dim, kv = self.config.head_dim, self.cuts.kv_heads[self.rank]
        match part:
            case "attention.q":
                return self.cuts.attention.of(self.rank)
            case "attention.k" | "attention.v":
                return slice(kv.start * dim, kv.stop * dim)
            case "attention.o" | "mlp.down":
                return self.cuts.hidden.of(self.rank)
            case "mlp.gate" | "mlp.up":
                return self.cuts.ffn.of(self.rank)
            case "head":
                return self.cuts.head.of(self.rank)
            case "embedding" | "norm" | "attention_norm" | "mlp_norm" | "attention.q_norm" | "attention.k_norm":
                return slice(None)
        raise ValueError(f"{self.path} has {name}, which ranks cannot share: leave out --tensor-parallel")


def shard_config(config: DecoderConfig, rank: int, ranks: int) -> DecoderConfig:
    """What one rank computes of a model. Raises ValueError when it cannot be shared so."""
    if ranks == 1:
        return config
    shared = cuts(config, ranks)
    kv = shared.kv_heads[rank]
    return replace(
        config,
        heads=shared.attention.widths[rank] // config.head_dim,
        kv_heads=kv.stop - kv.start,
        ffn=shared.ffn.widths[rank],
        tied_head=False,
    )


def _shares_heads(config: DecoderConfig, ranks: int) -> bool:
    """Whether every rank gets whole query heads of whole KV heads, or its even share of one KV head's."""
    if ranks <= config.kv_heads:
        return True
    together, rest = divmod(ranks, config.kv_heads)
    return rest == 0 and config.heads_per_kv_head % together == 0


def _units(count: int, unit: int) -> int:
    return -(-count // unit)


def _bounds(count: int, ranks: int) -> list[int]:
    return [count * rank // ranks for rank in range(ranks + 1)]


def _cut(count: int, unit: int, ranks: int) -> Cut:
    return Cut(tuple(min(count, unit * bound) for bound in _bounds(_units(count, unit), ranks)))
