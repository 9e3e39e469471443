"""Tensors only: the operator table, its reference, the Triton kernels and the native CPU step."""
