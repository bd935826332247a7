# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.inside: "Measures of what a trained model does inside."
# ---

# %% [markdown]
# # Looking inside: what the heads have learnt
#
# > A trained GPT-2 is opened: which heads look one token back, which find what
# > followed the last time, and how a guess ripens from block to block.
#
# *Reading time: 20 minutes. You need: the model on one page
# ([chapter 1.14](14_page.ipynb)), attention ([chapter 1.8](08_attention.ipynb))
# and the trained model of [chapter 1.18](18_training.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="attention")

# %% [markdown]
# *Figure 1.20.1. Attention is where tokens meet. Most of this chapter looks at the
# weights with which they do.*
#
# We know every number in this model and how it was computed. We do not know what
# it *does*: nobody wrote that down, the gradient found it. At the end of this
# chapter you can
#
# - draw the attention of any head on a text of your choice;
# - tell a head that looks back one token, and one that finds what followed
#   the last time, by a score;
# - read a guess out of the stream before the model has finished it;
# - show that a head matters, by taking it away.
#
# ## Setup
#
# The model is the one that trained for an hour in [chapter
# 1.18](18_training.ipynb): 6 layers of 6 heads, 192 channels. It runs here on the
# page of [chapter 1.14](14_page.ipynb), because that page keeps every array but the
# weights of attention, and hides none.

# %% setup
import json
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.book.verify import compare, verdict
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer

# %% imports of the measures tags=["export"]
import numpy as np

from llmnb.reference.gpt2 import attend, forward, layernorm, log_sum_exp

# %% the trained model tags=["fold-input"]
HOUR = "../../book/hour/"
trained = GPT2.from_checkpoint(
    HOUR + "model.bin", batch_size=1, seq_len=256, backend="reference"
)
params = {k: np.array(x, np.float64) for k, x in trained.params.items()}
cfg, NH = trained.cfg, trained.cfg.num_heads
encoding = tokenizer.load(HOUR + "tokenizer.tiktoken")
V = encoding.n_vocab
print(f"{cfg.num_layers} layers of {NH} heads, {V:,} tokens")

# %% [markdown]
# The text is a class that stands in no library. Two names to watch, `balance` and
# `amount`, come again and again. (With a text of your own, of up to 256 tokens, change
# them in the cells that look for them, too.)

# %% a text of your choice
TEXT = '''class Account:
    """An account with a balance."""

    def __init__(self, balance=0):
        self.balance = balance

    def deposit(self, amount):
        if amount < 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance
'''
ids = np.array([[encoding.eot_token, *encoding.encode_ordinary(TEXT)]])
words = [encoding.decode([i]) for i in ids[0]]
words[0] = "(start)"
print(ids.size, "tokens:", *map(repr, words[1:12]))

# %% [markdown]
# ## What surprises it
#
# Usually we see only the mean of the losses. Here is every token's own surprise, as
# the colour behind it, which is full at 8 nats and above.


# %% the surprise of every token tags=["export"]
def surprises(params, ids, num_heads, vocab_size):
    """How much each token of a text surprised the model, in nats.

    params: a dict of arrays, as `llmnb.reference.gpt2.forward` takes them.
    ids: integers (B, T). Returns (B, T - 1): -log p of ids[:, 1:].
    """
    _, kept = forward(params, ids[:, :-1], ids[:, 1:], num_heads, vocab_size)
    hit = np.take_along_axis(kept["logits"], ids[:, 1:, None], -1)
    return (kept["lse"] - hit)[..., 0]


# %% the surprise along the class tags=["fold-input"]
cost = surprises(params, ids, NH, V)[0]
loss, kept = forward(params, ids[:, :-1], ids[:, 1:], NH, V)
compare("their mean", cost.mean(), loss, tol=1e-5)


# %% draw the surprise tags=["hide-input"]
def draw_surprise(words, cost, scale=8, size=12):
    """The text, each token on a ground that darkens with its surprise."""
    wide = 60 * 0.602 * size / 72  # inches of 60 letters of this font
    fig = plt.figure(figsize=(wide, 3.6), dpi=100)
    ax, line, column = fig.add_axes((0, 0, 1, 1)), 0, 0
    shade = plt.matplotlib.colors.to_rgba
    for word, x in zip(words[1:], cost, strict=True):
        for part in word.splitlines(keepends=True):
            shown = part.rstrip("\n")
            place, width = (column, -line - 0.8), len(shown) or 0.6
            ground = shade(PALETTE["orange"], min(1, x / scale))
            ax.add_patch(plt.Rectangle(place, width, 0.9, fc=ground))
            ax.text(
                column, -line - 0.55, shown, family="monospace",
                fontsize=size, color=PALETTE["ink"],
            )  # fmt: skip
            column += len(shown)
            if part.endswith("\n"):
                line, column = line + 1, 0
    ax.set(xlim=(0, 60), ylim=(-line - 0.4, 0.6))
    ax.axis("off")
    plt.show()


draw_surprise(words, cost)

# %% [markdown]
# *Figure 1.20.2. The surprise of every token: strong where something new starts,
# faint where grammar or an earlier line foretells it.*
#
# Read it as you would read the text. New are `class` itself, `balance` the first
# time, and `deposit`, whose second piece is strongest of all. What grammar
# foretells is faint: indents, `def`, the `self` after a bracket. So is `amount` when
# it comes again, but for its first letters inside the quotation marks. `balance` is
# harder: strong a second time, paler from the third. Let us put a number on the two
# names, and add up the surprise of all pieces of each.


# %% a name the second time
def first_and_later(name):
    """The surprise of a whole name: the first time, and the mean of later."""
    spans, at = [], 0
    ends = np.cumsum([len(w) for w in words[1:]])
    while (at := TEXT.find(name, at)) >= 0:
        inside = (ends > at) & (ends <= at + len(name))
        spans.append(cost[inside].sum())
        at += len(name)
    return spans[0], np.mean(spans[1:])


for name in ("balance", "amount"):
    once, again = first_and_later(name)
    print(f"{name:<8}{once:6.1f} nats, later {again:.1f}")
    verdict(name, again < once / 2, "less than half when it comes again")

# %% [markdown]
# The weights are the same at the first `amount` and at the second. What has changed
# is the context, and only attention can look at the context.
#
# ## Every head, at once
#
# `attend` of the page gives the weights $a$ of (1.8.2) for every head, fourth of
# what it returns: row $t$ says how token $t$ divides its attention among the tokens
# up to itself. `forward` wants targets as well, but only for the loss; where we
# need its arrays alone, the tokens themselves stand in.
#
# Before you look at 36 such maps, know what shapes to expect. Above the diagonal
# nothing can stand, since no token sees a later one. A head that treats all tokens
# before it alike fills the triangle with one shade to a row, paler with every row,
# because each row shares out the same 1 among one token more. A column is a token
# that many later ones look at. A line beside the diagonal is a head that looks a
# fixed number of tokens back, whatever they are. And single dark spots are heads
# that choose by content.


# %% the attention of all heads tags=["export"]
def attention_maps(params, ids, num_heads, vocab_size):
    """The attention weights of every head on a text.

    ids: integers (B, T). Returns (L, B, NH, T, T); each row sums to 1.
    """
    _, kept = forward(params, ids, ids, num_heads, vocab_size)
    return np.stack(
        [attend(block["qkv"], num_heads)[3] for block in kept["blocks"]]
    )


# %% the maps of the class
maps = attention_maps(params, ids, NH, V)
print(maps.shape)
compare("rows", maps.sum(-1), np.ones(maps.shape[:-1]), tol=1e-5)

# %% draw all heads tags=["hide-input"]
L, T = cfg.num_layers, ids.size
sheet = maps[:, 0].transpose(0, 2, 1, 3).reshape(L * T, NH * T)
shades = plt.get_cmap("Blues", 8)(sheet**0.5, bytes=True)
fig, ax = plt.subplots(figsize=(6.4, 6.6), dpi=100)
ax.imshow(shades, interpolation="none", extent=(0, NH, L, 0))
for x in range(1, NH):
    ax.axvline(x, color=PALETTE["grey"], lw=1)
for y in range(1, L):
    ax.axhline(y, color=PALETTE["grey"], lw=1)
ax.set_xticks(np.arange(NH) + 0.5, [f"head {x}" for x in range(NH)])
ax.set_yticks(
    np.arange(L) + 0.5, [f"block {y}" for y in range(L)], rotation=90
)
ax.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
plt.setp(ax.get_yticklabels(), va="center")
ax.spines[:].set_color(PALETTE["grey"])
fig.tight_layout(pad=0.4)
plt.show()

# %% [markdown]
# *Figure 1.20.3. All heads on the class, from the query (down) to the key
# (across), darker for more weight; the shade is the root of the weight, so that
# small weights show. Heads look widely first, then near, and far again at the end.*
#
# The first two blocks spread widely over what came, though some of their heads
# prefer certain tokens: dark columns. In blocks 2 and 3, heads look at the last few
# tokens, and head 0 of block 4 at the one before and hardly anything else: a line
# beside the diagonal. The last block picks out single tokens far back. (The same
# maps for a text of your own are on [the first page](../../book/intro.md), where
# this model runs as you type.)
#
# One number a head says the same without a picture: how many tokens back it looks,
# each weighed by the attention that it gets. Printed is the mean of each block.

# %% how far they look tags=["fold-input"]
apart = np.arange(ids.size)[:, None] - np.arange(ids.size)
far = (maps[:, 0] * np.maximum(apart, 0)).sum(-1).mean(-1)  # (L, NH)
print("tokens back, mean of each block's heads:", np.round(far.mean(1), 1))
verdict(
    "blocks 2, 3", far[2:4].max() < far[:2].min(), "look less far than 0, 1"
)
verdict("block 5", far[5].min() > far[2:4].max(), "looks far back again")
verdict(
    "head 0", np.diagonal(maps[4, 0, 0], -1).mean() > 0.7, "looks back one"
)

# %% [markdown]
# ## Two habits with a score
#
# Pictures persuade whoever wants to see something in them. A score can come out
# low, and so can be trusted when it does not. Two habits deserve a score each.
#
# **Looking back one token.** The mean weight on the token before,
#
# $$ \text{previous} = \frac{1}{T - 1} \sum_{t=1}^{T-1} a_{t,\,t-1} .
#    \tag{1.20.1} $$
#
# **Finding what followed the last time.** Suppose the text is `... deposit ...
# deposit`. A head that finds the earlier `deposit` and looks at the token *after*
# it can propose what came next then. To see whether a head does this and nothing
# else, take away all that it could know otherwise: a random sequence of $R$ tokens,
# and the same sequence once more. In the second half, token $t$ stood at $t - R$
# before, and what followed it stands at $t - R + 1$:
#
# $$ \text{induction} = \frac{1}{R - 1} \sum_{t=R}^{2R-2} a_{t,\,t-R+1} .
#    \tag{1.20.2} $$
#
# The sum leaves out the last token, after which nothing is left to foretell. This
# is called **induction**, and no head of a first block can do it: a key there knows
# its own token and position, and not the token before it. A head of an *earlier*
# block must first write into each token's stream which token stood before it; then
# the key at $t - R + 1$ says "I follow `deposit`", and the query at $t$ asks for
# that.
#
# What is a high score? A head that spreads its weight evenly over the $t + 1$ tokens
# that it sees gives each $1 / (t + 1)$. With $R = 60$ the mean of that over the rows
# is 0.04 in (1.20.1) and 0.01 in (1.20.2); a head that does nothing else has 1.


# %% the two scores tags=["export"]
def previous_token_score(maps):
    """Mean weight on the token before, by (1.20.1).

    maps: (..., B, NH, T, T) attention weights. Returns (..., NH).
    """
    beside = np.diagonal(maps, -1, -2, -1)
    return beside.mean(-1).mean(-2)


def induction_score(maps, repeat):
    """Mean weight on what followed a token the last time, by (1.20.2).

    maps: (..., B, NH, T, T), of a text that repeats after `repeat` tokens,
    2 or more, T = 2 repeat. Returns (..., NH). Raises ValueError for another
    T.
    """
    length = maps.shape[-1]
    if repeat < 2 or length != 2 * repeat:
        raise ValueError(
            f"induction_score: maps must be of twice {repeat} tokens, "
            f"got {length}"
        )
    # row t and column t - repeat + 1, for t from `repeat` to T - 2; the
    # diagonal begins one row earlier
    followed = np.diagonal(maps, 1 - repeat, -2, -1)[..., 1:repeat]
    return followed.mean(-1).mean(-2)


# %% a text that repeats tags=["export"]
def repeated_tokens(vocab_size, repeat, batch_size=4, seed=0):
    """Random tokens, and the same once more: integers (B, 2 repeat)."""
    half = np.random.default_rng(seed).integers(
        0, vocab_size, (batch_size, repeat)
    )
    return np.concatenate([half, half], axis=1)


# %% [markdown]
# By hand, on three tokens that come twice. A perfect induction head puts all of
# the weight of tokens 3 and 4 on tokens 1 and 2:

# %% the scores by hand
perfect = np.eye(6)[[0, 0, 1, 1, 2, 4]][None, None]
print(perfect[0, 0].astype(int))
print("previous", previous_token_score(perfect), "of 5: rows 1, 2 and 5")
print("induction", induction_score(perfect, 3))

# %% the scores of all heads tags=["fold-input"]
R = 60
twice = repeated_tokens(V, R)
seen = attention_maps(params, twice, NH, V)
previous, induction = previous_token_score(seen), induction_score(seen, R)
back = np.unravel_index(previous.argmax(), previous.shape)
finder = np.unravel_index(induction.argmax(), induction.shape)
even = 1 / np.arange(1, 2 * R + 1)  # the weight that an even spread gives
print(f"even: {even[1:].mean():.2f} and {even[R:-1].mean():.2f}")
print("looks back most:", *back, " finds most:", *finder)

# %% who does what, checked tags=["hide-input"]
verdict("previous", previous.max() > 0.5, "a head looks back one token")
verdict("induction", (induction > 0.2).sum() == 4, "four heads find")
verdict("induction", induction[:-1].max() < 0.02, "none before the last block")
verdict("the order", back[0] < finder[0], "looking back comes in earlier")

# %% draw the scores tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=100, sharey=True)
for ax, scores, name in zip(
    axes, (previous, induction), ("looks back one token", "induction"),
    strict=True,
):  # fmt: skip
    ax.imshow(scores, cmap="Blues", vmin=0, vmax=1)
    for (layer, head), x in np.ndenumerate(scores):
        ax.text(
            head, layer, f"{x:.2f}", ha="center", va="center", fontsize=8,
            color="white" if x > 0.5 else "black",
        )  # fmt: skip
    ax.set(title=name, xlabel="head", ylabel="block")
    ax.label_outer()
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.20.4. Both scores of every head, on random tokens that come twice: the
# heads that look back sit in blocks 2 to 4, the four that find in block 5.*
#
# Who looks back comes before who finds, as it must. Even the best finder gives what
# followed only a third of its weight. That is little beside 1, and more than twenty
# times what an even spread would give.
#
# Nothing in random tokens can be learnt from the training text. If the model is
# better on the second half, then it has looked it up in the first: which tokens
# there were, or what followed what. To tell the two apart, shuffle the second half.
# The same tokens are then there, but hardly one follows what it followed before. (The
# first token of the second half is left out: no one can know that the text will
# repeat.)

# %% the second time tags=["fold-input"]
cost2 = surprises(params, twice, NH, V)
once, again = cost2[:, : R - 1].mean(), cost2[:, R:].mean()
mixed = twice.copy()
for row in mixed:
    np.random.default_rng(1).shuffle(row[R:])
other = surprises(params, mixed, NH, V)[:, R:].mean()
print(f"first {once:.2f}, again {again:.2f}, again but shuffled {other:.2f}")

# %% the second time, checked tags=["hide-input"]
verdict("random tokens", once > np.log(V), "worse than a uniform guess")
verdict("the same again", again < once - 2, "at least 2 nats cheaper")
verdict("the same again", again > np.log(V), "dearer than a uniform guess")
verdict(
    "shuffled", once - other < (once - again) / 2, "less than half of that"
)

# %% [markdown]
# So most of what is saved is saved by the order. But look at the height, too: a
# uniform guess would pay $\log V = 6.93$, both times. The model is sure of something
# else at every token, and its finders pull against that and win only in part. A
# model may have a habit and still be bad at the test that shows it.
#
# ## Taking a head away
#
# A score shows where a head looks, not that the model needs it. A head's output
# enters the stream through its own $hs$ columns of `attprojw` ([chapter
# 1.8](08_attention.ipynb)), so zeros in them silence it and nothing else. The price
# is taken on two of the four texts, for the sake of time. And because a model that
# is damaged anywhere may get worse everywhere, the heads are tried on the first half
# too, where there is nothing to find.


# %% silence a head tags=["export"]
def without_head(params, layer, head, num_heads):
    """The same parameters with one head silenced; the others are shared.

    Raises IndexError for a layer or a head that there is not.
    """
    weight = params["attprojw"].copy()
    heads = weight.reshape(*weight.shape[:2], num_heads, -1)  # a view
    heads[layer, :, head] = 0
    return params | {"attprojw": weight}


# %% what each head is worth for the second half tags=["fold-input"]
def halves(params):
    """The mean surprise in the first half, and in the second."""
    found = surprises(params, twice[:2], NH, V)
    return found[:, : R - 1].mean(), found[:, R:].mean()


silenced = [
    [halves(without_head(params, i, j, NH)) for j in range(NH)]
    for i in range(L)
]  # fmt: skip
worth_first, worth = np.moveaxis(np.array(silenced) - halves(params), -1, 0)

# %% who is missed, checked tags=["hide-input"]
verdict("looking back", worth[back] == worth.max(), "is missed most of all")
verdict("the finder", (worth > worth[finder]).sum() == 1, "comes second")
finders = induction > 0.2
verdict("all finders", worth[finders].min() > 0.4, "are missed")
verdict("first half", worth_first[finders].max() < 0.2, "they are not")
verdict("first half", worth_first[back] < 0.2, "nor is looking back")

# %% draw what each head is worth tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.8), dpi=100)
ax.scatter(induction, worth, color=PALETTE["grey"], s=24)
for (layer, head), colour, name in (
    (finder, "orange", "the best finder"), (back, "blue", "looks back most"),
):  # fmt: skip
    x, y = induction[layer, head], worth[layer, head]
    ax.scatter([x], [y], color=PALETTE[colour], s=48)
    ax.annotate(
        f"  {name}: block {layer}, head {head}  ", (x, y), va="center",
        color=PALETTE["ink"], ha="right" if x > 0.2 else "left",
    )  # fmt: skip
ax.set(xlabel="induction score", ylabel="nats lost without it")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.20.5. What the second half costs more when one head is silent, against
# that head's induction score. The finders, on the right, are missed.*
#
# Missed most of all is a head that finds nothing itself but looks back: without it
# all the finders find less (exercise 2). In the first half neither is missed: they
# serve to look something up, not to write in general. But the score does not explain
# everything: of the heads at the left some are missed nearly as much, and without
# one the second half gets cheaper by half a nat.
#
# ## When it learnt this
#
# The run kept its weights every 500 steps and once between, and the same two scores
# were taken of each (`tests/record_hour.py` records them).

# %% the heads over training tags=["fold-input"]
history = json.loads(Path(HOUR + "heads.json").read_text("utf-8"))
steps = [x["step"] for x in history]
gain = [x["first"] - x["again"] for x in history]
at_end = history[-1]
rise = {
    name: next(x["step"] for x in history if x[name] > 0.1)
    for name in ("previous", "induction")
}
print("past 0.1 at steps", rise)

# %% the rise, checked tags=["hide-input"]
compare("as recorded", at_end["induction"], induction.max(), tol=1e-3)
verdict("at first", abs(gain[0]) < 0.05, "the second half is as hard")
verdict("in the end", gain[-1] > 2, "it is looked up")
verdict("the order", rise["previous"] < rise["induction"], "looks back first")

# %% draw the rise tags=["hide-input"]
fig, (ax, low) = plt.subplots(1, 2, figsize=(8, 2.8), dpi=100, sharex=True)
for name, colour, label in (
    ("previous", "blue", "looks back one token"),
    ("induction", "orange", "induction"),
):
    ax.plot(
        steps, [x[name] for x in history], color=PALETTE[colour], label=label
    )
ax.set(ylabel="the best head's score", ylim=(0, 1))
ax.legend(frameon=False)
low.plot(steps, gain, color=PALETTE["ink"])
low.set(ylabel="nats saved the second time")
for one in (ax, low):
    one.set(xlabel="step", xticks=range(0, 12_001, 3000))
    one.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.20.6. First a head learns to look back; the heads that find come later,
# and with them (right) the second half of a repeated text becomes cheaper.*
#
# The order is what the mechanism asks for. A finder has nothing to gain before
# another head has written into each stream which token stood before. After step
# 8,000 both scores and the saving fall a little: the loss asks for Python, not for
# this.
#
# ## A guess ripens
#
# Every block adds to the stream and none replaces it, so we may ask at any block: if
# the model had to answer now, what would it say? Put the stream through the last
# LayerNorm, `wte` and the softmax, as if the rest of the blocks were not there. This
# is the **logit lens**: $\operatorname{softmax}(\mathrm{ln}_f(x)\, E^\top)$ for the
# stream $x$ of any block, with $E$ for `wte`.


# %% read the stream early tags=["export"]
def logit_lens(params, ids, num_heads, vocab_size):
    """Log-probabilities of the next token, read after each block.

    ids: integers (B, T). Returns (L + 1, B, T, V): the first before any
    block, the last what the model says.
    """
    _, kept = forward(params, ids, ids, num_heads, vocab_size)
    streams = [block["x"] for block in kept["blocks"]] + [kept["x"]]
    logits = np.stack(
        [layernorm(x, params, "lnf") @ params["wte"].T for x in streams]
    )[..., :vocab_size]
    return logits - log_sum_exp(logits)


# %% the loss after each block tags=["fold-input"]
lens = logit_lens(params, ids[:, :-1], NH, V)
picked = np.take_along_axis(lens, ids[None, :, 1:, None], -1)[..., 0]
by_block = -picked.mean((1, 2))
print("before, then after each block:", np.round(by_block, 2))
compare("the last", by_block[-1], loss, tol=1e-5)
echo = (lens[0, 0].argmax(-1) == ids[0, :-1]).mean()
verdict("before", echo > 0.95, "the token itself is the guess")
verdict("block 1", by_block[2] > by_block[1], "worse than block 0")
verdict(
    "from there", (np.diff(by_block[2:]) < 0).all(), "each block is better"
)

# %% [markdown]
# From block 2 on the loss falls with every block. After block 1 it is higher than
# after block 0: a block is not asked to leave a good guess, only something that later
# blocks can use. The lens reads the stream in a language that it need not speak until
# the end.

# %% draw the lens tags=["hide-input"]
WHERE = next(
    i for i in range(len(words))
    if "".join(words[1 : i + 1]).endswith("self.balance += ")
    or "".join(words[1 : i + 1]).endswith("self.balance +=")
)  # fmt: skip
span = range(WHERE - 6, WHERE + 3)


def show(word):
    return repr(word)[1:-1].replace(" ", "\u00b7")


fig, ax = plt.subplots(figsize=(8, 3.3), dpi=100)
p = np.exp(lens[:, 0, span].max(-1))
ax.imshow(p, cmap="Blues", vmin=0, vmax=1, aspect="auto")
best = lens[:, 0, span].argmax(-1)
for (layer, i), token in np.ndenumerate(best):
    shown = show(encoding.decode([int(token)]))
    right = token == ids[0, span[i] + 1]
    ax.text(
        i, layer, shown, ha="center", va="center", family="monospace",
        fontsize=8, color="white" if p[layer, i] > 0.5 else "black",
        weight="bold" if right else "normal",
    )  # fmt: skip
ax.set(yticks=range(L + 1), xticks=range(len(span)))
ax.set_yticklabels(["before"] + [f"block {i}" for i in range(L)])
ax.set_xticklabels([show(words[i]) for i in span], family="monospace")
ax.set(xlabel="after this token, the next is guessed to be ...")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.20.7. The likeliest next token, read after each block; bold where it is
# what came; a raised dot is a space; darker for more probability. Grammar comes
# early, names come last.*
#
# Read a column from the top down. Before any block the answer is the token
# itself, because the table that reads it is the table that answers. Grammar comes
# early: the dot after `self` is there from block 1. The pieces of `balance` and of
# `amount` come in the last block, where the heads are that find them, and not all of
# them do. In the first column the right guess of block 4 is lost again.
#
# ## Take away
#
# - Surprise, token by token, shows what a mean hides: some tokens are nearly free,
#   a few pay for the rest.
# - An attention map is a matrix that you can draw; a habit is a diagonal of it, and
#   a diagonal has a mean.
# - Induction takes two heads in two blocks, one to say what came before and one to
#   find it; it appears during training, and then repetition becomes cheaper.
# - Where a head looks is not what it is worth: silence it, and measure, also where
#   it should not matter.
# - The stream can be read after any block, with care.
#
# ## Design note
#
# We silenced a head with zeros. That takes away more than what the head found in
# this text: it also takes what the head adds to every text alike, a mean that the
# later blocks have learnt to reckon with. The alternative is to put that mean in the
# place of the output, or what the head did on another text, so that only what
# depends on *this* one is gone. It measures the more interesting thing, but needs a
# second text, whose choice then is part of the answer. Zeros need none, and the first
# half meets the objection: what a head adds to every text would be missed there too.
#
# ## Exercises
#
# **1** (★). A softmax makes every row sum to 1: a head with nothing to find still
# has to put its weight somewhere. Larger models often put it on the first token of
# the text. Does this one? Average the first column of each map over the later half
# of the queries.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# No: no head leaves even a fifth of its weight there. In this model the heads with
# little to find spread it over everything instead.
# :::

# %% exercise 1, checked tags=["hide-cell"]
resting = maps[:, 0, :, ids.size // 2 :, 0].mean(-1)
verdict("the first token", resting.max() < 0.2, "is no resting place")

# %% [markdown]
# **2** (★★). If the story is true, silencing the head that looks back most must
# lower the induction score of the finder. Does it?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Take the maps again with the changed parameters and compare the finder's score.
# It falls to less than half, and so do those of the other three: the key knows
# less of what came before it. It does not fall to nothing, because the heads of
# blocks 2 and 3 look back a little as well.
# :::

# %% exercise 2, checked tags=["hide-cell"]
silent = attention_maps(without_head(params, *back, NH), twice, NH, V)
fallen = induction_score(silent, R)[finders] / induction[finders]
verdict("all finders", fallen.max() < 0.5, "find less than half")
verdict("all finders", fallen.min() > 0.2, "but still find")

# %% [markdown]
# ## Further reading
#
# - Elhage et al. (2021),
#   [A Mathematical Framework for Transformer Circuits](https://transformer-circuits.pub/2021/framework/index.html):
#   heads as read and write operations on the stream; where induction heads were
#   first explained.
# - Olsson et al. (2022),
#   [In-context Learning and Induction Heads](https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/index.html):
#   when they appear, in models of many sizes.
# - nostalgebraist (2020),
#   [interpreting GPT: the logit lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens):
#   the stream, read early.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.20")
