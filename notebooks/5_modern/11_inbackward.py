# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.inbackward: "A model whose blocks learn while it goes back."
# ---

# %% [markdown]
# # In backward: learn while going back
#
# > A block's gradient is needed until the block has learnt. If it learns at
# > once, a model holds one block's gradients, and those of its two ends.
#
# *Reading time: 10 minutes. You need: the model's passes ([chapter
# 1.17](../1_by_hand/17_model.ipynb)), AdamW ([chapter
# 1.12](../1_by_hand/12_adamw.ipynb)), Llama's tensors ([chapter
# 5.5](05_architectures.ipynb)) and what fine-tuning takes ([chapter
# 5.10](10_lora.ipynb)).*

# %% [markdown]
# ## Where we are
#
# LoRA trains a large model in little memory, but its thin matrices cannot
# learn everything. This chapter keeps all weights learning and asks what can be
# left out instead. At the end of it you can
#
# - say when a gradient is written, when it is read, and when it is dead;
# - let the blocks of any model take turns with one block's gradients;
# - say which three things a training run gives up for it.
#
# ## Setup

# %% setup
import json
from pathlib import Path

import matplotlib.pyplot as plt

import llmnb
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

# %% imports tags=["export"]
import math

import numpy as np

from llmnb.model.gpt2 import GPT2
from llmnb.model.lora import HOSTS
from llmnb.model.tensors import full_shape, tensor_table

# %% [markdown]
# ## When a gradient is dead
#
# Count the numbers that training holds for each parameter: itself, its
# gradient, and AdamW's two averages. The averages outlive a step and so does the
# parameter. The gradient does not. In block $i$, going back,
#
# - the block's backward functions write $dw_i$;
# - AdamW reads $dw_i$, and then the next step overwrites it.
#
# Who else reads gradients? Clipping needs the norm of all before it scales the
# first ([chapter 1.12](../1_by_hand/12_adamw.ipynb)); the norm that a step only reports
# can be added up block by block. The backward pass of block $i - 1$ reads the
# activations, $w_{i-1}$ and the stream's gradient. That was made with the old $w_i$,
# but $w_i$ itself is never read again. And AdamW computes each parameter from its own
# weight, gradient and averages only, so the order in which tensors learn cannot
# matter. So without clipping the two loops
#
# $$ \text{for } i = L-1, \dots, 0: \; dw_i \qquad
# \text{then for all } i: \; w_i \leftarrow \mathrm{AdamW}(w_i, dw_i)
# \tag{5.11.1} $$
#
# may be one loop with the same numbers for each parameter:
#
# $$ \text{for } i = L-1, \dots, 0: \; dw_i, \quad
# w_i \leftarrow \mathrm{AdamW}(w_i, dw_i). \tag{5.11.2} $$
#
# In it all $dw_i$ can lie in the same place. What is in no block keeps a place of
# its own and learns at the end. A tied token table has to: its gradient comes from
# both ends of the model.
#
# ## The same place for every block
#
# The model asks for the gradients of block $i$ as `grads[name][i]`. An array with
# a stride of zero, no bytes from one $i$ to the next, gives it the same memory for
# every $i$:


# %% every block the same tags=["exporti"]
def _for_every_block(array, L):
    """An array (L, ...) of which every [i] is the array given."""
    shape, strides = (L, *array.shape), (0, *array.strides)
    return np.lib.stride_tricks.as_strided(array, shape, strides)


# %% some tokens at a time tags=["exporti"]
ROWS = 768  # of the logits: two whole chains of the sums over tokens


def _in_one_row(array):
    """An array (B, T, ...) as (1, B T, ...)."""
    return array.reshape(1, -1, *array.shape[2:])


# %% one place, three names
place = np.zeros(2, np.float32)
gradients = _for_every_block(place, 3)
gradients[2] = 7
print(gradients.shape, place, gradients[0])

# %% [markdown]
# Which memory? When the first block goes back, the classifier is done with the
# logits and their gradient. What the blocks take turns with lies over them already
# ([chapter 1.16](../1_by_hand/16_memory.ipynb)), and a block's gradients are one
# more thing of that kind. As long as the logits are the larger they cost nothing.
#
# And the logits themselves? They are the largest activation, $V$ numbers for each
# token, and a step needs them no longer than their gradient lives. So take 768
# tokens at a time: their logits, losses and gradients, and then those of the next
# 768 in the same place. The gradient of the table is a sum over tokens, and the
# compiled product adds it up in chains of 384
# ([chapter 2.4](../2_cpu/04_matmul.ipynb)). So two whole chains at a time give the
# same bits. (NumPy's product has its own order; there the last bits may differ from
# 769 tokens on.) The room for all logits is there still, for whoever asks for them after
# `forward`; but a system hands out memory when it is first written
# ([chapter 1.16](../1_by_hand/16_memory.ipynb)), and a step writes the first 768
# rows only.
#
# The table's panels are packed anew, and its gradient is read again, for every 768
# tokens. That is a small part of what these tokens cost.
#
# The model does the rest as it always does, block after block. A few methods
# differ: gradients are allocated for one block; the logits come with their
# gradients; a block's backward pass ends with its learning; a step ends with the
# learning of the ends alone; and what backward functions *add* to, the gradients of
# norms, is zeroed before each block and not at the beginning, when the logits are
# still there. The norm that `step`
# returns is put together from the tensors' norms: their squares add.
#
# Most of what depends on nothing but its arrays is replayed from the second step on
# ([appendix A.13](../appendix/13_backend.ipynb)): the forward pass up to the last norm,
# the head with its logits, and each block's backward pass. AdamW's numbers change, so
# its calls are made anew.


# %% the layout of its memory tags=["export"]
def in_backward_layout(cfg, layout):
    """The layout of a model's memory, with gradients for one block.

    cfg: of the model. layout: as gpt2_layout gives it. The gradients of what
    is in no block stay where they are; one block's are among what blocks
    take turns with.
    """
    rows, (dtype, turns, over) = tensor_table(cfg), layout["block"]
    ends = {x.name: full_shape(x, cfg) for x in rows if not x.stacked}
    turns = turns | {x.name: x.shape for x in rows if x.stacked}
    return layout | {"grads": (dtype, ends), "block": (dtype, turns, over)}


# %% learn while going back tags=["export"]
class InBackward(GPT2):
    """A model, of any architecture, that holds one block's gradients.

    It learns as GPT2 does, to the bit (with NumPy's layers: up to 768 tokens
    in a batch), by `step` alone and without clipping: a block learns as soon
    as its gradients are there, and the next overwrites them. cfg, batch_size,
    seq_len, backend, precision, seed: as for GPT2, on the host. grads[name][i]
    of what every block has is the same memory for every i, and that of the
    logits: after a step it holds what the last block left. backward, update
    and clip_gradients raise RuntimeError, for they need all gradients at once.
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


# %% [markdown]
# ## Proof
#
# Not a tolerance this time: after three steps of either model the losses and
# every parameter must be the same bits. Only the norm has one, for its squares are
# added in another order. With GPT-2 and with a tied Llama, and with weight decay on
# all tensors or on some, as the lines say. A batch has 816 tokens, whose logits
# come in two parts:

# %% the same bits
gpt2 = llmnb.GPT2Config(
    max_seq_len=16, vocab_size=97, num_layers=3, num_heads=2, channels=32
)
llama = llmnb.LlamaConfig(
    max_seq_len=16, vocab_size=97, num_layers=3, num_heads=4, channels=32,
    num_kv_heads=2, tied=True,
)  # fmt: skip
rng = np.random.default_rng(511)
tokens = rng.integers(0, 97, (3, 51, 17))


def three_steps(made, cfg, decay):
    """Losses, norms and parameters after three steps."""
    model, told = made(cfg, 51, 16), []
    for step, batch in enumerate(tokens, 1):
        how = {"step": step, "learning_rate": 1e-2, "decay": decay}
        told.append(model.step(batch[:, :-1], batch[:, 1:], **how))
    losses, norms = zip(*told, strict=True)
    return losses, norms, model.params


for name, cfg in ("GPT-2", gpt2), ("Llama", llama):
    for decay in None, ("fcw", "wte"):
        want = three_steps(llmnb.GPT2, cfg, decay)
        got = three_steps(InBackward, cfg, decay)
        same = all(np.array_equal(got[2][x], want[2][x]) for x in want[2])
        where = f"{name}, {'some' if decay else 'all'}"
        verdict(f"{where} losses", got[0] == want[0], "the same bits")
        verdict(f"{where} weights", same, "the same bits")
        compare(f"{where} norms", np.array(got[1]), want[1], tol=1e-5)

# %% [markdown]
# A mistake that is easy to make: to leave the norms' gradients as they are for
# the next block, which adds to them. (The first to go back even adds to what is left
# of the logits.) The losses of later steps give it away.


# %% a mistake, caught
class Unzeroed(InBackward):
    def _block_backward(self, i, add):
        GPT2._block_backward(self, i, add)
        for x in self._in_blocks:
            self._learn(x, i)


losses = three_steps(Unzeroed, llama, None)[0]
wrong = losses[1:] != three_steps(llmnb.GPT2, llama, None)[0][1:]
verdict("not zeroed", wrong, "caught")

# %% [markdown]
# ## Count it
#
# With $P$ parameters, $Q$ of them in each block and $E$ at both ends, training
# holds $4P$ numbers besides activations. Now it is
#
# $$ 3P + Q + E, \tag{5.11.3} $$
#
# and $3P + E$ where the logits are larger than the $Q$ gradients and what the blocks
# take turns with. For SmolLM2 on 256 tokens they are, for its vocabulary has 49,152
# tokens:

# %% numbers held
smollm2 = llmnb.PRESETS["smollm2-135m"]
rows = tensor_table(smollm2)
P = sum(math.prod(full_shape(x, smollm2)) for x in rows)
block = sum(math.prod(x.shape) for x in rows if x.stacked)
ends = P - smollm2.num_layers * block
print(f"{4 * 4 * P / 1e6:,.0f} MB before")
print(f"{4 * (3 * P + block + ends) / 1e6:,.0f} MB in backward")
print(f"{4 * block / 1e6:,.0f} MB of them over the logits,")
print(f"which take {4 * 256 * smollm2.padded_vocab_size / 1e6:,.0f} MB")

# %% [markdown]
# `tests/record_lora.py` asked the system for the peak of a process that
# fine-tunes it on 256 tokens at a time, in the three ways that you know now:

# %% measured
measured = json.loads(Path("../../book/lora.json").read_text("utf-8"))
for kind in "whole", "inbackward", "lora":
    row = measured[kind]
    print(f"{kind:10} peak {row['peak'] / 1e9:.2f} GB, "
          f"gradients {row['sizes']['grads'] / 1e9:.2f}, "
          f"third loss {row['losses'][2]:.2f}")  # fmt: skip
same = measured["inbackward"]["losses"] == measured["whole"]["losses"]
verdict("SmolLM2, losses", same, "the bits of the whole")

# %% [markdown]
# `llmnb train --in-backward --clip 0` makes a run of it, which can be stopped and
# resumed as any other. It gives the weights of the run without `--in-backward`, to
# the bit. Its validations run `forward`, which writes all logits: a batch of more
# than 768 tokens takes their whole room again.
#
# `llmnb bench --in-backward` lets such a model race with the plain one and with
# PyTorch. Here GPT-2 124M learns from 4 rows of 64 tokens, and from one of 1,024
# ([results page](../../book/results.md)):

# %% a race
path = Path("../../book/results/7-zen5-lean.json")
for contest in json.loads(path.read_text("utf-8"))["contests"]:
    print(contest["name"])
    for row in contest["contestants"]:
        ms, size = 1e3 * row["step_seconds"], row["memory_bytes"] / 1e6
        print(f"  {row['name']:<24}{size:6,.0f} MB{ms:8,.0f} ms a step")

# %% [markdown]
# With 256 tokens a step takes 3 % longer: AdamW is called for each tensor of each
# block, and the norm is taken, which the plain model does not do in this race. With
# 1,024 tokens the two differ by less than the rounds of the race do.

# %% what is held, and when tags=["hide-input"]
L = smollm2.num_layers
moments = np.arange(L + 1)  # the head, then the blocks from last to first
both = {
    "all, then learn": (ends + moments * block, "orange"),
    "in backward": (ends + np.minimum(moments, 1) * block, "blue"),
}
fig, ax = plt.subplots(figsize=(7.5, 2.6), dpi=100)
for name, (held, colour) in both.items():
    ax.step(moments, 4 * held / 1e6, where="post", color=PALETTE[colour])
    ax.text(L, 4 * held[-1] / 1e6 + 14, name, ha="right",
            color=PALETTE[colour])  # fmt: skip
ax.set(xlabel="blocks that have gone back", ylabel="MB of gradients",
       ylim=(0, 620), xlim=(0, L))  # fmt: skip
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.11.1. Gradients that SmolLM2 has written as it goes back through its 30
# blocks. All of them come to 538 MB; where blocks learn at once it is 127 MB, 113
# of them the token table's, from the first block on.*
#
# The processes shrank by what was counted. LoRA takes less still, for it needs no
# averages of the frozen weights either, but at the same rate of learning it has learnt
# less after three steps.
#
# ## What it does not do
#
# It cannot clip: the first block to learn would have to know the norm of those
# that have not gone back yet. For the same reason it cannot drop a step whose norm
# is a spike or no number: blocks have learnt before it is known. So a long run is
# safer with clipping ([chapter 1.18](../1_by_hand/18_training.ipynb)); a short one
# at a low rate may do without. And it cannot add up the gradients of several
# batches, for nothing of the first would be left to add to. It runs on the CPU.
#
# ## Take away
#
# - A gradient lives from its backward function to its update.
# - Let the update follow at once, and the blocks need one place for theirs.
# - The same bits from $3P + Q + E$ numbers instead of $4P$, and $Q$ of them may lie
#   over the logits; no clipping, no dropped steps, no accumulation.
#
# ## Design note
#
# Could activations go the same way? What a block's backward pass has read is dead
# too, but the forward pass writes all of them before the first is read. To hold
# fewer, one has to compute them again, which is one more forward pass: about a third
# more work. Only what is cheap is computed twice here, the outputs of a block's two
# norms and of its bend ([chapter 1.16](../1_by_hand/16_memory.ipynb)). No product is.
#
# ## Exercises
#
# **1** (★). Plain gradient descent has no averages. What fraction of its memory for
# parameters and gradients is left, for a model of many equal blocks and small
# ends?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $2P$ become $P + Q + E$: a little more than half.
# :::

# %% [markdown]
# ## Further reading
#
# - Lv et al. (2023),
#   [Full Parameter Fine-tuning for Large Language Models with Limited
#   Resources](https://arxiv.org/abs/2306.09782): the same loop with plain gradient
#   descent, and two passes where the norm is wanted.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.11")
