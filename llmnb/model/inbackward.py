# Written by `make export` from notebooks/5_modern/11_inbackward.py: edit that file.

"""A model whose blocks learn while it goes back."""

__all__ = ["InBackward", "in_backward_layout"]


# imports
import math

import numpy as np

from llmnb.model.gpt2 import GPT2
from llmnb.model.lora import HOSTS
from llmnb.model.tensors import full_shape, tensor_table


# every block the same
def _for_every_block(array, L):
    """An array (L, ...) of which every [i] is the array given."""
    shape, strides = (L, *array.shape), (0, *array.strides)
    return np.lib.stride_tricks.as_strided(array, shape, strides)


# some tokens at a time
ROWS = 768  # of the logits: two whole chains of the sums over tokens


def _in_one_row(array):
    """An array (B, T, ...) as (1, B T, ...)."""
    return array.reshape(1, -1, *array.shape[2:])


# the layout of its memory
def in_backward_layout(cfg, layout):
    """The layout of a model's memory, with gradients for one block.

    cfg: of the model. layout: as gpt2_layout gives it. The gradients of what
    is in no block stay where they are; one block's are among what blocks
    take turns with.

    Derived in chapter 5.11.
    """
    rows, (dtype, turns, over) = tensor_table(cfg), layout["block"]
    ends = {x.name: full_shape(x, cfg) for x in rows if not x.stacked}
    turns = turns | {x.name: x.shape for x in rows if x.stacked}
    return layout | {"grads": (dtype, ends), "block": (dtype, turns, over)}


# learn while going back
class InBackward(GPT2):
    """A model, of any architecture, that holds one block's gradients.

    It learns as GPT2 does, to the bit (with NumPy's layers: up to 768 tokens
    in a batch), by `step` alone and without clipping: a block learns as soon
    as its gradients are there, and the next overwrites them. cfg, batch_size,
    seq_len, backend, precision, seed: as for GPT2, on the host. grads[name][i]
    of what every block has is the same memory for every i, and that of the
    logits: after a step it holds what the last block left. backward, update
    and clip_gradients raise RuntimeError, for they need all gradients at once.

    Derived in chapter 5.11.
    """

    backends = HOSTS

    def _allocate(self, layout):
        rows = tensor_table(self.cfg)
        self._in_blocks = [x for x in rows if x.stacked]
        self._at_ends = [x for x in rows if not x.stacked]
        super()._allocate(in_backward_layout(self.cfg, layout))
        grads, block = self.memory["grads"], self.memory["block"]
        for x in self._in_blocks:
            own = block.pop(x.name)
            grads[x.name] = _for_every_block(own, self.cfg.num_layers)

    def _whole_step(self, max_norm, decay):
        self._decay, self._squares = decay, 0.0
        self._again(self._stream)
        self._weigh_losses()
        self._backward()
        for x in self._at_ends:
            self._learn(x, ...)

    def _clear(self, rows):
        """At the beginning of a pass only the ends: the logits are there."""
        super()._clear(self._at_ends)

    def _head_backward(self, add):
        self._again(super()._head_backward, add)

    def _logits_backward(self, dln, add):
        """Logits, losses and gradients of ROWS tokens, then of the next."""
        p, g, ops, head = self.params, self.grads, self.ops, self._ends.head
        names = "lnf", "logits", "losses", "lse", "dlosses"
        every = {name: self._acts[name] for name in names} | {"dln": dln}
        every["targets"] = self._batch["targets"]
        tokens, V = every["targets"].size, self.cfg.vocab_size
        if tokens > ROWS:
            every = {name: _in_one_row(x) for name, x in every.items()}
        for first in range(0, tokens, ROWS):
            a = {k: x[:, first : first + ROWS] for k, x in every.items()}
            logits = every["logits"][:, : a["targets"].size]
            a |= {"logits": logits, "V": V}  # the same place each time
            head.forward(ops, logits, a["lnf"], p, self._how)
            arrays = a["losses"], a["lse"], logits, a["targets"], V
            ops.crossentropy_softmax_forward(*arrays)
            how = add or first > 0, self._how
            head.backward(ops, a["dln"], a, a, p, g, *how)

    def _block_backward(self, i, add):
        super()._clear(self._in_blocks)
        self._again(super()._block_backward, i, add)
        for x in self._in_blocks:
            self._learn(x, i)

    def _learn(self, x, i):
        """AdamW on a tensor, or on block i of it."""
        groups = [self.memory[g] for g in ("params", "grads", "m", "v")]
        flat = [tensors[x.name][i].reshape(-1) for tensors in groups]
        decays = self._decay is None or x.name in self._decay
        getattr(self.ops, self._machine.update)(
            *flat, self._settings[not decays]
        )
        self._squares += self.ops.clip_gradients(flat[1], math.inf) ** 2

    def _norm(self):
        return math.sqrt(self._squares)

    def step(self, tokens, targets, max_norm=math.inf, **settings):
        """As GPT2.step; raises ValueError for a max_norm that is not inf."""
        if max_norm != math.inf:
            raise ValueError(
                f"InBackward.step: max_norm must be inf, got {max_norm!r}: "
                f"blocks learn before the norm of all gradients is known"
            )
        return super().step(tokens, targets, **settings)

    def backward(self, add=False, share=1.0):
        """Raises RuntimeError: call step."""
        self._check_gradients("backward")

    def _check_gradients(self, name):
        raise RuntimeError(
            f"InBackward.{name}: gradients are not kept; call step"
        )
