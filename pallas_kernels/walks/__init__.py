"""Machinery that operations share; nothing here imports an operation.

    contract, canonical   what implementations are given, and the way there
    hidden                what masks hide has no influence, also where it is NaN
    numerics, int32       soft caps and element masks; indices of 32 bits
    blocks                the XLA path: loops over the lists of a layout
    lists, sides          lists and static sizes as kernels read them
    tpu_*                 the TPU kernels: plan, operands, streams, tiles, calls
    gpu_*                 the GPU kernels: the same, sums, and what runs them
"""
