"""A mixture of experts in plain torch: the specification of `kernels.triton_experts`. Letters as there."""

from torch import Tensor

from kernels.reference import routed, swiglu
from kernels.triton_experts import Routes
from kernels.triton_layer import Matrix
from kernels.weight4 import Weight4, dequantised
from kernels.weight8 import Weight8, dequantised8


def mixture(x: Tensor, logits: Tensor, gate_up: Matrix, down: Matrix, most: int, normalised: bool = True) -> Tensor:
    """x [R, C] through its `most` best experts of E: [R, C]; each product is rounded to the type of x."""
    routes = route(logits, most, normalised)
    gate, up = multiply_experts(x.repeat_interleave(most, 0), gate_up, routes.experts, logits.shape[1]).chunk(2, dim=1)
    return merge(multiply_experts(swiglu(gate, up), down, routes.experts, logits.shape[1]), routes.weights)


def route(logits: Tensor, most: int, normalised: bool) -> Routes:
    weights, experts = routed(logits, most, normalised)
    return Routes(experts.int(), weights)


def multiply_experts(x: Tensor, matrices: Matrix, chosen: Tensor, experts: int) -> Tensor:
    """A row of x [R * T, C] for each pair, with the matrix of its expert in chosen [R, T]."""
    if isinstance(matrices, Weight4):
        whole = dequantised(matrices)
    else:
        whole = dequantised8(matrices) if isinstance(matrices, Weight8) else matrices.double()
    of_pairs, outputs = chosen.flatten(), whole.shape[0] // experts
    product = x.new_empty((len(x), outputs))
    for expert, matrix in enumerate(whole.split(outputs)):
        mine = of_pairs == expert
        product[mine] = (x[mine].double() @ matrix.T).to(x.dtype)
    return product


def merge(outputs: Tensor, weights: Tensor) -> Tensor:
    rows, most = weights.shape
    return (outputs.view(rows, most, -1).double() * weights.double()[..., None]).sum(1).to(outputs.dtype)
