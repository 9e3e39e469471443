"""A recorder for a CPU with the manners of a CUDA graph: what ran is run again on the same memory, and nothing else is.

Every operation is noted below Python, with the tensors that it read and wrote. A replay knows no shape, no number and
no branch of the code that was recorded. What would make a device wait for the host, or read memory of the host, is
refused, as a graph refuses it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.lift_fresh.default,
    aten.masked_select.default,
}  # fmt: skip


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        if function in WAITS:
            raise RuntimeError(f"{function} cannot be recorded: the device would wait for the host, or read its memory")
        more = more or {}
        result = function(*arguments, **more)
        read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((arguments, more))}
        # a view, or what was written in place, is there again when the operation has run again
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in read]
        self.operations.append((function, arguments, more, made))
        return result


class CpuRecorder:
    """As `kernels.replay.Recorder`."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        run()
        with _Noting() as noted:
            run()

        def replay() -> None:
            self.replayed += 1
            for function, arguments, more, made in noted.operations:
                result = function(*arguments, **more)
                fresh = [tensor for tensor in _tensors(result)]
                if made:
                    for fixed, again in zip(made, fresh, strict=True):
                        fixed.copy_(again)

        return replay


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
