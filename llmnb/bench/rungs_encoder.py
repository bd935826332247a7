# Written by `make export` from notebooks/3_gpu/03_encoder.py: edit that file.

"""Plain versions of the encoder's kernels, for the ladder."""

__all__ = ["ENCODER_BACKWARD", "ENCODER_FORWARD"]


# imports of the rungs
from llmnb.cuda.encoder import (
    THREADS, forward_by_one, positions_by_one, tokens_by_one,
)
from llmnb.gpu.launch import kernel
from llmnb.gpu.simulator import cuda


# forward, the rung
def _forward_an_element(out, inp, wte, wpe):
    """encoder_forward with a thread for each element."""
    B, T, C = out.shape
    rows, places = out.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-out.size // THREADS)
    forward_by_one[grid, THREADS](rows, places, wte, wpe, T)


ENCODER_FORWARD = (_forward_an_element,)


# backward, atomics
@kernel
def _backward_atomic(dwte, dwpe, dout, inp, T):
    i = cuda.grid(1)
    rows, C = dout.shape
    if i < rows * C:
        n, c = i // C, i % C
        dy = dout[n, c]
        cuda.atomic.add(dwte, (inp[n], c), dy)
        cuda.atomic.add(dwpe, (n % T, c), dy)


def _backward_with_atomics(dwte, dwpe, dout, inp, work=None):
    """encoder_backward by atomics, in an order that changes run by run."""
    B, T, C = dout.shape
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    grid = -(-dout.size // THREADS)
    _backward_atomic[grid, THREADS](dwte, dwpe, rows, places, T)


# backward, the rungs
def _backward_a_place(dwte, dwpe, dout, inp, work=None):
    """encoder_backward with a thread for each channel, token by token."""
    B, T, C = dout.shape
    rows, places = dout.reshape(B * T, C), inp.reshape(B * T)
    tokens_by_one[(B * T, -(-C // THREADS)), THREADS](dwte, rows, places)
    positions_by_one[-(-T * C // THREADS), THREADS](dwpe, rows, T)


ENCODER_BACKWARD = (_backward_with_atomics, _backward_a_place)
