# Written by `make export` from notebooks/appendix/14_heads.py: edit that file.

"""Soft caps of logits, compiled for the processor's cores."""

__all__ = ["capped_crossentropy_backward", "softcap_forward"]


# imports of the CPU's caps
from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp, fast_tanh
from llmnb.shapes import COMPILED, shapes


# the kernels of the caps
@team
def _softcap(part, parts, address):
    x, softcap = arguments(address)
    cap, mine = x.dtype.type(softcap), share(x.size, part, parts)
    for i in range(mine.start, mine.stop):
        x[i] = cap * fast_tanh(x[i] / cap)


@team
def _capped_backward(part, parts, address):
    dlogits, dlosses, logits, lse, targets, V, softcap = arguments(address)
    number, mine = logits.dtype.type, share(len(logits), part, parts)
    one, cap = number(1), number(softcap)
    for n in range(mine.start, mine.stop):
        scale, shift, k = dlosses[n], lse[n], targets[n]
        t = logits[n, k] / cap
        hit = scale * (one - t * t)
        for i in range(V):
            t = logits[n, i] / cap
            slope = scale * (one - t * t)
            dlogits[n, i] = slope * fast_exp(logits[n, i] - shift)
        dlogits[n, k] -= hit
        dlogits[n, V:] = 0


# soft caps, compiled
@shapes("B T Vp!", softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x into c tanh(x / c), in place; softcap: c.

    x: (B, T, Vp), float32 or float64, C-contiguous. Raises TypeError or
    ValueError before it computes anything.

    Derived in chapter A.14.
    """
    _softcap(x.reshape(-1), float(softcap))


@shapes(
    "B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED,
    softcap="above 0",
)  # fmt: skip
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: (B, T, Vp), overwritten; it may be `logits` itself, which then
    is lost. logits: float32 or float64, after the cap. dlosses, lse: (B,
    T), lse from the forward pass. targets: int32 (B, T). Columns from V on
    receive 0. Raises TypeError or ValueError before it computes anything.

    Derived in chapter A.14.
    """
    arrays = dlogits, dlosses, logits, lse, targets
    rows = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    _capped_backward(*rows, V, float(softcap))
