# Written by `make export` from notebooks/5_modern/11_inbackward.py: edit that file.

"""A model whose blocks learn while it goes back."""

__all__ = ["InBackward"]


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


# learn while going back
class InBackward(GPT2):
    """A model, of any architecture, that holds one block's gradients.

    It learns as GPT2 does, to the bit, by `step` alone and without clipping:
    a block learns as soon as its gradients are there, and the next
    overwrites them. cfg, batch_size, seq_len, backend, precision, seed: as
    for GPT2, on the host. grads[name][i] of what every block has is the same
    memory for every i: what the last block left, zeros for norms. backward,
    update and clip_gradients raise RuntimeError, for they need all gradients
    at once.

    Derived in chapter 5.11.
    """

    backends = HOSTS

    def _allocate(self, layout):
        dtype, _ = layout["params"]
        rows = tensor_table(self.cfg)
        own = {x.name: x.shape if x.stacked else full_shape(x, self.cfg)
               for x in rows}  # fmt: skip
        super()._allocate(layout | {"grads": (dtype, own)})
        grads, L = self.memory["grads"], self.cfg.num_layers
        for name in [x.name for x in rows if x.stacked]:
            grads[name] = _for_every_block(grads[name], L)

    def _whole_step(self, max_norm, decay):
        self._decay, self._squares = decay, 0.0
        self._forward()
        self._classify()
        self._weigh_losses()
        self._backward()
        for x in tensor_table(self.cfg):
            if not x.stacked:
                self._learn(x, self.memory, ...)

    def _block_backward(self, i, add):
        super()._block_backward(i, add)
        for x in tensor_table(self.cfg):
            if x.stacked:
                self._learn(x, self.memory, i)
                if x.added:
                    self._machine.fill(self.grads[x.name][i], 0)

    def _learn(self, x, memory, i):
        """AdamW on a tensor, or on block i of it."""
        groups = [memory[g][x.name][i] for g in ("params", "grads", "m", "v")]
        flat = [array.reshape(-1) for array in groups]
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
