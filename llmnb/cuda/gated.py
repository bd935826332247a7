# Written by `make export` from notebooks/5_modern/03_gated.py: edit that file.

"""Gated feed-forward layers on a GPU."""

__all__ = [
    "geglu_backward", "geglu_forward", "swiglu_backward", "swiglu_forward",
]


# imports of the GPU module
import math

from llmnb.cuda.gelu import CUBIC32, ONE, SLOPE32, THREE, ZERO
from llmnb.cuda.matmul import as_rows
from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# bends of one number, and their slopes
@device
def _silu(x):
    q = math.exp(-abs(x))
    r = ONE / (ONE + q)
    sigma = (ONE if x > ZERO else q) * r
    return x * sigma, sigma + x * q * r * r


@device
def _gelu(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    sigma = (ONE if x > ZERO else q) * r
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return x * sigma, sigma + x * dv * q * r * r


# kernels around a bend, forward
def _forward_kernels(bend):
    @kernel
    def by_one(out, inp):
        i = cuda.grid(1)
        rows, H = out.shape
        if i < rows * H:
            n, c = i // H, i % H
            bent, _ = bend(inp[n, c])
            out[n, c] = bent * inp[n, H + c]

    @kernel
    def by_four(out, inp):
        i = 4 * cuda.grid(1)
        rows, H = out.shape
        if i < rows * H:
            at = i // H * 2 * H + i % H  # the gates; the values are H later
            a, b, c, d = load4(inp, at)
            e, f, g, h = load4(inp, at + H)
            (a, _), (b, _), (c, _), (d, _) = bend(a), bend(b), bend(c), bend(d)
            store4(out, i, a * e, b * f, c * g, d * h)

    return by_one, by_four


# kernels around a bend, backward
def _backward_kernels(bend):
    @device
    def back(dy, gate, up):
        bent, slope = bend(gate)
        return dy * up * slope, dy * bent

    @kernel
    def by_one(dinp, dout, inp):
        i = cuda.grid(1)
        rows, H = dout.shape
        if i < rows * H:
            n, c = i // H, i % H
            dgate, dup = back(dout[n, c], inp[n, c], inp[n, H + c])
            dinp[n, c], dinp[n, H + c] = dgate, dup

    @kernel
    def by_four(dinp, dout, inp):
        i = 4 * cuda.grid(1)
        rows, H = dout.shape
        if i < rows * H:
            at = i // H * 2 * H + i % H
            a, b, c, d = load4(dout, i)
            p, q, r, s = load4(inp, at)
            e, f, g, h = load4(inp, at + H)
            (a, e), (b, f) = back(a, p, e), back(b, q, f)
            (c, g), (d, h) = back(c, r, g), back(d, s, h)
            store4(dinp, at, a, b, c, d)
            store4(dinp, at + H, e, f, g, h)

    return by_one, by_four


# the launch
BLOCK = 256  # threads of a block
_swiglu, _swiglu_back = _forward_kernels(_silu), _backward_kernels(_silu)
_geglu, _geglu_back = _forward_kernels(_gelu), _backward_kernels(_gelu)


def _launch(kernels, *arrays):
    """Run a kernel on rows; kernels: for one channel a thread, and for four.

    arrays: in their order; the last, inp, has 2 H channels.
    """
    (by_one, by_four), inp = kernels, arrays[-1]
    run, threads = by_one, inp.size // 2
    if inp.shape[-1] % 8 == 0 and aligned(*arrays):
        run, threads = by_four, inp.size // 8
    run[-(-threads // BLOCK), BLOCK](*map(as_rows, arrays))


# SwiGLU on a GPU
@shapes("B T H!, B T 2H", DEVICE)
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 on a device and C-contiguous. Raises TypeError or
    ValueError before it launches anything.

    Derived in chapter 5.3.
    """
    _launch(_swiglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", DEVICE)
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 on a device and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it launches anything.

    Derived in chapter 5.3.
    """
    _launch(_swiglu_back, dinp, dout, inp)


# GeGLU on a GPU
@shapes("B T H!, B T 2H", DEVICE)
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 on a device and C-contiguous; GELU in the tanh form. Raises
    TypeError or ValueError before it launches anything.

    Derived in chapter 5.3.
    """
    _launch(_geglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", DEVICE)
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 on a device and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it launches anything.

    Derived in chapter 5.3.
    """
    _launch(_geglu_back, dinp, dout, inp)
