# Written by `make export` from notebooks/5_modern/11_inbackward.py: edit that file.

"""A model that learns while it goes back."""

__all__ = ["InBackward", "in_backward_layout"]


# imports
import math
from typing import Any, NamedTuple

import numpy as np

from llmnb.model.gpt2 import GPT2
from llmnb.model.lora import HOSTS
from llmnb.model.tensors import full_shape, tensor_table


# what stands for a gradient
class Learner(NamedTuple):
    """What `matmul_learn` takes besides a weight, dout and inp."""

    m: Any
    v: Any
    squares: Any
    factors: Any
    aside: Any = None
    few: Any = None


class _Learning:
    """A backend's layers; a weight whose gradient is a Learner learns."""

    def __init__(self, ops):
        self._ops = ops

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def matmul_backward(
        self, dinp, dweight, dbias, dout, inp, weight,
        add_dinp=True, add_dweight=True, **how,
    ):  # fmt: skip
        """As the backend's; then the weight learns, if it is to."""
        learns = isinstance(dweight, Learner)
        arrays = dinp, None if learns else dweight, dbias, dout, inp, weight
        self._ops.matmul_backward(*arrays, add_dinp, add_dweight, **how)
        if learns:
            m, v, squares, *rest = dweight
            arrays = weight, m, v, squares, dout, inp, *rest
            self._ops.matmul_learn(*arrays, **how)


# who learns, and how
PART = 768  # tokens whose logits are there: two whole chains of the sums


def _at_once(cfg, tokens):
    """Whether all logits take no more than PART's and the table's gradient."""
    return tokens <= PART + cfg.channels


def _head(cfg):
    """The name of the table that makes the logits."""
    names = [x.name for x in tensor_table(cfg)]
    return "head" if "head" in names else "wte"


def _learners(cfg, tokens):
    """The tensors that learn as soon as their gradients are made."""
    head = _head(cfg) if _at_once(cfg, tokens) else None
    return [
        x for x in tensor_table(cfg)
        if (x.stacked and len(x.shape) == 2) or x.name == head
    ]  # fmt: skip


def _in_one_row(array):
    """An array (B, T, ...) as (1, B T, ...)."""
    return array.reshape(1, -1, *array.shape[2:])


# the layout of its memory
def in_backward_layout(cfg, layout):
    """The layout of a model's memory, with gradients of what learns later.

    cfg: of the model. layout: as gpt2_layout gives it.

    Derived in chapter 5.11.
    """
    dtype, shapes = layout["grads"]
    batch = layout["batch"][1]["tokens"]
    tokens = math.prod(batch)
    own = {x.name: full_shape(x, cfg)[:-1] for x in _learners(cfg, tokens)}
    layout = layout | {
        "grads": (dtype, {n: x for n, x in shapes.items() if n not in own}),
        "squares": (dtype, own),
        "factors": (dtype, dict.fromkeys(own, (7,))),
    }
    if "wte" in own:  # some of its rows learn later
        table = shapes["wte"]
        few = min(tokens, table[0]), table[1]
        layout["few"] = dtype, {"few": few}
        layout["places"] = np.int32, {"places": batch, "aside": table[:1]}
    return layout


# learn while going back
class InBackward(GPT2):
    """A model, of any architecture, whose matrices learn while it goes back.

    It learns as GPT2 does, to the bit (with NumPy's layers if a batch has at
    most 768 + channels tokens), by `step` alone and without clipping. cfg,
    batch_size, seq_len, backend, precision, seed: as for GPT2, on the host.
    grads has the gradients of what does not learn at once: all but the
    blocks' matrices and, in such a batch, the table of the logits.
    backward, update and clip_gradients raise RuntimeError, for they need
    all gradients.

    Derived in chapter 5.11.
    """

    backends = HOSTS

    def _allocate(self, layout):
        self._machine.ops = _Learning(self._machine.ops)
        layout = in_backward_layout(self.cfg, layout)
        super()._allocate(layout)
        self._later = list(self.memory["grads"])
        self._few = self.memory["few"]["few"] if "few" in layout else None
        for x in _learners(self.cfg, self.batch_size * self.seq_len):
            self.memory["grads"][x.name] = self._learner(x)

    def _learner(self, x):
        """A tensor's Learner, or the list of those of its blocks."""
        name, memory = x.name, self.memory
        groups = [memory[group][name] for group in ("m", "v", "squares")]
        factors, last = memory["factors"][name], ()
        if x.stacked:
            blocks = zip(*groups, strict=True)
            return [Learner(*own, factors) for own in blocks]
        if name == "wte":
            last = memory["places"]["aside"], self._few
        return Learner(*groups, factors, *last)

    def _whole_step(self, max_norm, decay):
        for name, factors in self.memory["factors"].items():
            decays = decay is None or name in decay
            factors[:] = self._settings[not decays].factors("InBackward.step")
        if self._few is not None:
            self._set_aside()
        self._again(self._stream)
        self._weigh_losses()
        self._again(self._backward)
        self._squares = self.memory.flat("squares").sum(dtype=np.float64)
        groups = [self.memory[g] for g in ("params", "grads", "m", "v")]
        for name in self._later:
            flat = (tensors[name].reshape(-1) for tensors in groups)
            self._learn(name, decay, *flat)
        if self._few is not None:
            self._learn_few(decay)

    def _set_aside(self):
        """Number the tokens of the batch, whose rows learn last."""
        tokens, memory = self._batch["tokens"], self.memory["places"]
        self._present, found = np.unique(tokens, return_inverse=True)
        memory["places"][...] = found.reshape(tokens.shape)
        memory["aside"].fill(-1)
        memory["aside"][self._present] = np.arange(self._present.size)

    def _logits_backward(self, dln, add):
        """Logits, losses and gradients of some tokens, then of the next."""
        p, g, ops, head = self.params, self.grads, self.ops, self._ends.head
        names = "lnf", "logits", "losses", "lse", "dlosses"
        every = {name: self._acts[name] for name in names} | {"dln": dln}
        every["targets"] = self._batch["targets"]
        tokens, V = every["targets"].size, self.cfg.vocab_size
        rows = tokens if _at_once(self.cfg, tokens) else PART
        if rows < tokens:
            every = {name: _in_one_row(x) for name, x in every.items()}
        for first in range(0, tokens, rows):
            a = {k: x[:, first : first + rows] for k, x in every.items()}
            logits = every["logits"][:, : a["targets"].shape[1]]
            a |= {"logits": logits, "V": V}  # the same place each time
            head.forward(ops, logits, a["lnf"], p, self._how)
            arrays = a["losses"], a["lse"], logits, a["targets"], V
            ops.crossentropy_softmax_forward(*arrays)
            how = add or first > 0, self._how
            head.backward(ops, a["dln"], a, a, p, g, *how)

    def _encoder_backward(self):
        grads, tokens = self.grads, self._batch["tokens"]
        if self._few is not None:
            grads = grads | {"wte": self._few}
            tokens = self.memory["places"]["places"]
        d = self._dacts["dstream"]
        self._ends.encoder.backward(self.ops, d, tokens, grads)

    def _learn(self, name, decay, params, grads, m, v):
        """AdamW on a tensor, or on some of its rows, as flat arrays."""
        decays = decay is None or name in decay
        settings = self._settings[not decays]
        self.ops.adamw_update(params, grads, m, v, settings)
        self._squares += self.ops.clip_gradients(grads, math.inf) ** 2

    def _learn_few(self, decay):
        """The rows of the batch's tokens, from both ends' gradients."""
        rows = self._present
        tables = [self.memory[group]["wte"] for group in ("params", "m", "v")]
        p, m, v = (table[rows].reshape(-1) for table in tables)
        grads = self._few[: rows.size].reshape(-1)
        self._learn("wte", decay, p, grads, m, v)
        for table, x in zip(tables, (p, m, v), strict=True):
            table[rows] = x.reshape(rows.size, -1)

    def _norm(self):
        return math.sqrt(self._squares)

    def step(self, tokens, targets, max_norm=math.inf, **settings):
        """As GPT2.step; raises ValueError for a max_norm that is not inf."""
        if max_norm != math.inf:
            raise ValueError(
                f"InBackward.step: max_norm must be inf, got {max_norm!r}: "
                f"weights learn before the norm of all gradients is known"
            )
        return super().step(tokens, targets, **settings)

    def backward(self, add=False, share=1.0):
        """Raises RuntimeError: call step."""
        self._check_gradients("backward")

    def _check_gradients(self, name):
        raise RuntimeError(
            f"InBackward.{name}: gradients are not kept; call step"
        )
