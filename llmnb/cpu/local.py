# Written by `make export` from notebooks/5_modern/04_attention.py: edit that file.

"""Attention with a window, a scale and a soft cap; compiled."""

__all__ = ["local_attention_backward", "local_attention_forward"]


# imports of the CPU module
from llmnb.cpu.attention import prepared, team_backward, team_forward
from llmnb.cpu.panels import WORK
from llmnb.reference.local import check_rule
from llmnb.shapes import shapes


# attention with a window, compiled
@shapes("B T C!, B NH|C T!, B T QKV", work=WORK)
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None, work=None,
    bf16=False,
):  # fmt: skip
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scores, which the backward pass needs.
    window: how many positions a query sees, its own the last of them; None
    for all. scale: of the products, 1 / sqrt(hs) where None. softcap: c
    where scores become c tanh(score / c), or None. work, bf16: as for
    attention_forward. All float32 or all float64 and C-contiguous. Raises
    TypeError or ValueError before it computes anything.

    Derived in chapter 5.4.
    """
    layer = "local_attention_forward"
    rule = check_rule(layer, window, scale, softcap)
    made = prepared(layer, (out, lse, inp), rule, work, bf16)
    team_forward(out.reshape(-1), lse, inp.reshape(-1), *made)


@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", work=WORK)
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None,
    softcap=None, work=None, bf16=False,
):  # fmt: skip
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. add: False
    overwrites dinp instead of adding. window, scale, softcap, work, bf16:
    as in the forward pass. All float32 or all float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.4.
    """
    layer = "local_attention_backward"
    rule = check_rule(layer, window, scale, softcap)
    made = prepared(layer, (out, lse, inp), rule, work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out, lse))
    team_backward(*flat, add, *made)
