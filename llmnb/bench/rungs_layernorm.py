# Written by `make export` from notebooks/3_gpu/04_layernorm.py: edit that file.

"""Plainer versions of LayerNorm on a GPU, kept to be timed."""

__all__ = ["LAYERNORM_FORWARD", "forward_by_threads"]


# imports of the rungs
import math

import numpy as np

from llmnb.cuda.layernorm import EPS32, blocks
from llmnb.gpu.launch import DEVICE, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes


# a thread a row, the kernel
@kernel(launch_bounds=128)
def _forward_thread(out, mean, rstd, inp, weight, bias):
    n = cuda.grid(1)
    rows, C = inp.shape
    if n >= rows:
        return
    size, total, squares = np.float32(C), np.float32(0), np.float32(0)
    for i in range(C):
        total += inp[n, i]
    mu = total / size
    for i in range(C):
        away = inp[n, i] - mu
        squares += away * away
    r = np.float32(1) / math.sqrt(squares / size + EPS32)
    for i in range(C):
        out[n, i] = (inp[n, i] - mu) * r * weight[i] + bias[i]
    mean[n] = mu
    rstd[n] = r


# a thread a row, the launch
def _thread_a_row(out, mean, rstd, inp, weight, bias):
    grid = blocks(len(inp), 128)
    _forward_thread[grid, 128](out, mean, rstd, inp, weight, bias)


# the rungs
@shapes("B T C!, B T!, B T!, B T C, C, C", DEVICE)
def forward_by_threads(out, mean, rstd, inp, weight, bias):
    """layernorm_forward with a thread for each row.

    Derived in chapter 3.4.
    """
    rows, C = mean.size, len(weight)
    flat = mean.reshape(rows), rstd.reshape(rows)
    rows_in, rows_out = inp.reshape(rows, C), out.reshape(rows, C)
    _thread_a_row(rows_out, *flat, rows_in, weight, bias)


LAYERNORM_FORWARD = (forward_by_threads,)
