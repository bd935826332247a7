# Written by `make export` from notebooks/3_gpu/16_bf16_training.py: edit that file.

"""Training in bfloat16 on a GPU, with float32 masters."""

__all__ = ["HalfBackend", "MISSING", "PRECISE"]


# imports of the backend
from functools import partial

import numpy as np

from llmnb.arena import Arena
from llmnb.cuda import bf16_attention, bf16_layers, bf16_matmul, model
from llmnb.cuda.bf16_layers import round_bf16, widen_bf16
from llmnb.gpu.launch import address, missing
from llmnb.gpu.toolkit import numba_cuda
from llmnb.reference.bfloat16 import from_bfloat16


# the memory
# activations that stay float32, by how their names end
STATISTICS = "mean", "rstd", "lse", "losses"
# groups that are halves otherwise
HALVES = "acts", "dacts", "logits", "block"


def _half_layout(layout):
    """A model's groups, activations in bfloat16, with copies of weights."""
    (kind, weights), acts = layout["params"], layout["acts"][1]
    stats = {n: x for n, x in acts.items() if n.endswith(STATISTICS)}
    stream = {"stream": layout["dacts"][1]["dstream"]}
    found = {"copies": (np.uint16, weights), "stats": (kind, stats | stream)}
    found["rests"] = np.uint16, {"atty": acts["atty"]}
    for group, (kind, named, *over) in layout.items():
        if group in HALVES:
            kind = np.uint16
            named = {n: x for n, x in named.items() if n not in stats}
        found[group] = kind, named, *over
    return found


class _HalfArena(Arena):
    """The statistics answer among the activations that they belong to."""

    def __getitem__(self, group):
        found = super().__getitem__(group)
        if group == "acts":
            return found | super().__getitem__("stats")
        return found


# attention's layers
def _twin(array, whole, twins):
    """What lies among the twins where the array lies in the whole."""
    start = (address(array) - address(whole)) // array.dtype.itemsize
    return twins[start : start + array.size].reshape(*array.shape)


def _half_attention(ops, memory):
    """Give attention the place for what rounding leaves of its output."""
    forward, backward = ops.attention_forward, ops.attention_backward
    outputs, rests = memory["acts"]["atty"], memory.flat("rests")

    def attention(out, lse, inp):
        forward(out, lse, inp, _twin(out, outputs, rests))

    def attention_back(dinp, dout, inp, out, lse, add=True):
        rest = _twin(out, outputs, rests)
        backward(dinp, dout, inp, out, lse, add, rest=rest)

    ops.attention_forward, ops.attention_backward = attention, attention_back


# the layers
def _half_layers(ops, memory):
    """Put the layers in bfloat16 into ops, under the names of the others."""
    for name, layer in [*vars(ops).items()]:
        if name.endswith("_bf16"):
            setattr(ops, name.removesuffix("_bf16"), layer)
    masters, copies = memory.flat("params"), memory.flat("copies")
    stream = memory["stats"]["stream"]
    encode_back, embed_back = ops.encoder_backward, ops.embedding_backward
    forward, backward = ops.matmul_forward, ops.matmul_backward

    def copy(weight):
        return _twin(weight, masters, copies)

    def first(layer, *arrays):
        round_bf16(copies, masters)
        layer(*arrays)

    def widened(dout):
        widen_bf16(stream.reshape(-1), dout)
        return stream

    def last(dwte, dwpe, dout, inp):
        encode_back(dwte, dwpe, widened(dout), inp)

    def last_of_llama(dwte, dout, inp, scale):
        embed_back(dwte, widened(dout), inp, scale)

    def product(out, inp, weight, bias, residual=None):
        forward(out, inp, copy(weight), bias, residual)

    def product_back(dinp, dweight, dbias, dout, inp, weight, *rest, **more):
        given = dinp, dweight, dbias, dout, inp
        backward(*given, copy(weight), *rest, **more)

    ops.encoder_forward = partial(first, ops.encoder_forward)
    ops.embedding_forward = partial(first, ops.embedding_forward)
    ops.encoder_backward, ops.embedding_backward = last, last_of_llama
    ops.matmul_forward, ops.matmul_backward = product, product_back
    _half_attention(ops, memory)


# the backend
# what a model may ask for that has no layer in bfloat16
MISSING = (
    "qk_norm", "post_norms", "window", "attention_scale",
    "attention_softcap", "final_softcap",
)  # fmt: skip


def _check_generation():
    """Raise ValueError for a GPU whose tensor cores take no bfloat16."""
    if missing():
        return
    found = numba_cuda().get_current_device().compute_capability
    if tuple(found) < (8, 0):
        raise ValueError(
            "GPT2: precision 'bf16' needs a GPU of generation 8.0 or later, "
            f"and this is {'.'.join(map(str, found))}; take 'fp32'"
        )


class HalfBackend(model.Backend):
    """A GPU that trains in bfloat16: float32 parameters, halves elsewhere.

    For GPT-2's layers and those of chapter 5.12. Raises ValueError for a
    GPU before generation 8.0, for a model that has other layers, for
    channels that are no multiple of 8 and heads that tensor cores do not
    take.

    Derived in chapter 3.16.
    """

    def groups(self, cfg, batch_size, seq_len):
        """Scratch memory for the layers, and a place for AdamW's settings."""
        _check_generation()
        for name in MISSING:
            if getattr(cfg, name, None):
                raise ValueError(
                    f"GPT2: precision 'bf16' on a GPU has no layer for {name} "
                    f"= {getattr(cfg, name)!r}, which this {cfg.family!r} "
                    "has; take 'fp32' or 'tf32'"
                )
        bf16_matmul.check_eights("GPT2: channels", cfg.channels)
        hidden = getattr(cfg, "hidden", 4 * cfg.channels)
        bf16_matmul.check_eights("GPT2: hidden", hidden)
        if cfg.head_size not in bf16_attention.WIDTHS:
            raise ValueError(
                "GPT2: precision 'bf16' on a GPU takes heads of "
                f"{bf16_attention.WIDTHS} channels, got {cfg.head_size}"
            )
        B, T, C = batch_size, seq_len, cfg.channels
        heads = cfg.num_heads, cfg.num_kv_heads, cfg.head_size
        found = super().groups(cfg, B, T)
        floats = (
            found["work"][1]["floats"][0],
            bf16_layers.layernorm_scratch_bf16(B * T, C),
            bf16_attention.attention_scratch_bf16(B, T, *heads),
        )
        return found | {"work": (np.float32, {"floats": (max(floats),)})}

    def allocate(self, layout, needed):
        """An Arena on the GPU, and the layers that work in it."""
        memory = _HalfArena(_half_layout(layout), model.zeros)
        self._work = memory["work"]["floats"]
        self.ops = model.model_layers(self.ops, self._work)
        _half_layers(self.ops, memory)
        self._classifier = model.Classifier(self.ops)
        return memory

    def floats(self, array):
        """The host's float32 copy of an array in bfloat16."""
        return from_bfloat16(np.asarray(array))


# which backend for a precision
PRECISE = {"bf16": HalfBackend}  # where it is not `Backend`
