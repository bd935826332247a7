# Written by `make export` from notebooks/5_modern/03_gated.py: edit that file.

"""SwiGLU and GeGLU, compiled for the processor's cores."""

__all__ = [
    "geglu_backward", "geglu_forward", "swiglu_backward", "swiglu_forward",
]


# imports of the CPU module
from llmnb.cpu.gelu import CUBIC, SLOPE
from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.cpu.math import fast_exp
from llmnb.shapes import shapes


# two bends and their slopes
@inlined
def _silu(x, number):
    """SiLU of x, and its slope there."""
    q, one = fast_exp(-abs(x)), number(1)
    r = one / (one + q)
    sigma = (one if x > 0 else q) * r
    return x * sigma, sigma + x * q * r * r


@inlined
def _gelu(x, number):
    """GELU of x, in the tanh form, and its slope there."""
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
    r = one / (one + q)
    sigma = (one if x > 0 else q) * r
    dv = slope * (one + (cubic + cubic + cubic) * x * x)
    return x * sigma, sigma + x * dv * q * r * r


# kernels around a bend
def _kernels(bend):
    @team
    def forward(part, parts, address):
        out, inp = arguments(address)
        (rows, H), number = out.shape, inp.dtype.type
        mine = share(rows, part, parts)
        for n in range(mine.start, mine.stop):
            for i in range(H):
                bent, _ = bend(inp[n, 0, i], number)
                out[n, i] = bent * inp[n, 1, i]

    @team
    def backward(part, parts, address):
        dinp, dout, inp = arguments(address)
        (rows, H), number = dout.shape, inp.dtype.type
        mine = share(rows, part, parts)
        for n in range(mine.start, mine.stop):
            for i in range(H):
                bent, slope = bend(inp[n, 0, i], number)
                dinp[n, 0, i] = dout[n, i] * inp[n, 1, i] * slope
                dinp[n, 1, i] = dout[n, i] * bent

    return forward, backward


_swiglu, _swiglu_back = _kernels(_silu)
_geglu, _geglu_back = _kernels(_gelu)


# SwiGLU, compiled
@shapes("B T H!, B T 2H")
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 or both float64 and C-contiguous. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter 5.3.
    """
    H = out.shape[-1]
    _swiglu(out.reshape(-1, H), inp.reshape(-1, 2, H))


@shapes("B T 2H!, B T H, B T 2H")
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 or all float64 and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it computes anything.

    Derived in chapter 5.3.
    """
    H = dout.shape[-1]
    dx, x = dinp.reshape(-1, 2, H), inp.reshape(-1, 2, H)
    _swiglu_back(dx, dout.reshape(-1, H), x)


# GeGLU, compiled
@shapes("B T H!, B T 2H")
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 or both float64 and C-contiguous; GELU in the tanh form.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.3.
    """
    H = out.shape[-1]
    _geglu(out.reshape(-1, H), inp.reshape(-1, 2, H))


@shapes("B T 2H!, B T H, B T 2H")
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 or all float64 and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it computes anything.

    Derived in chapter 5.3.
    """
    H = dout.shape[-1]
    dx, x = dinp.reshape(-1, 2, H), inp.reshape(-1, 2, H)
    _geglu_back(dx, dout.reshape(-1, H), x)
