"""Several processes that compute one model: who I am, and how numbers get from each to all.

Rule: every wait has an end. Whoever waits longer than `timeout_s` for the others, or finds one gone, raises RankLost.
"""

from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from kernels.shards import Cut

if TYPE_CHECKING:
    from torch import Tensor


class RankLost(RuntimeError):
    """A rank is dead or silent: no step can be computed any more."""


class Ranks(Protocol):
    rank: int
    size: int

    def exchange(self, own: "Tensor", everyone: "Tensor") -> None:
        """Fill `everyone` [size, ...] with what each rank has as `own` [...], all of one shape. Raises RankLost."""


class DistributedRanks:
    """Ranks over torch.distributed, on one machine: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, rank: int, size: int, meeting_point: str, *, device: str = "cpu", timeout_s: float) -> None:
        """Waits for the others. `meeting_point`: a path that all of them know and that does not exist before.

        Raises RankLost when they do not come in time.
        """
        import torch.distributed as distributed

        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        self._distributed = distributed
        # the newer name, where there is one
        self._gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        wait = timedelta(seconds=timeout_s)
        try:
            store = distributed.FileStore(meeting_point, size)
            store.set_timeout(wait)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
            self._words = distributed.group.WORLD
            self._numbers = distributed.new_group(backend="nccl", timeout=wait) if device == "cuda" else self._words
        except RuntimeError as error:
            raise self._lost("meet", error) from error

    def exchange(self, own: "Tensor", everyone: "Tensor") -> None:
        """As `Ranks`."""
        try:
            self._gather(everyone.view(-1), own.view(-1), group=self._numbers)
        except RuntimeError as error:
            raise self._lost("exchange numbers", error) from error

    def tell(self, words: "Tensor") -> None:
        """From rank 0 to all: a uint8 tensor on the CPU, of a length that they know. The others' is filled."""
        try:
            self._distributed.broadcast(words, 0, group=self._words)
        except RuntimeError as error:
            raise self._lost("tell or hear a step", error) from error

    def _lost(self, what: str, error: RuntimeError) -> RankLost:
        return RankLost(f"rank {self.rank} could not {what} with the others in {self._timeout_s:g} s: "
                        f"{str(error).strip().partition(chr(10))[0]}")  # fmt: skip

    def close(self) -> None:
        """Leave. The others' next exchange fails."""
        if self._distributed.is_initialized():
            self._distributed.destroy_process_group()


def gathered(own: "Tensor", cut: Cut, ranks: Ranks) -> "Tensor":
    """Rows [R, whole] out of each rank's columns [R, its width]."""
    import torch
    from torch.nn.functional import pad

    widest = max(cut.widths)
    own = pad(own, (0, widest - own.shape[1])).contiguous()
    everyone = own.new_empty((ranks.size, *own.shape))
    ranks.exchange(own, everyone)
    return torch.cat([part[:, :width] for part, width in zip(everyone, cut.widths, strict=True)], 1)
