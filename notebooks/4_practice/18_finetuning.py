# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.finetune: "A run that starts from the weights of a trained model."
# ---

# %% [markdown]
# # Fine-tuning: go on from a trained model
#
# > A model that has learnt one text learns the next one from fewer words, if it is
# > taught gently, and forgets some of the first.
#
# *Reading time: 14 minutes. You need: the folder of a run
# ([chapter 4.14](14_folders.ipynb)) and the loop
# ([chapter 4.13](13_loop.ipynb)).*

# %% [markdown]
# ## Where we are
#
# You have little text, and want a model that writes like it. Little text teaches
# little: a model trained on it alone learns which tokens are frequent and then
# learns the text by heart. But most of what it would have to learn, how words are
# spelt, which brackets close, is the same in other texts, and a model that has read
# those knows it. So begin with its weights instead of random ones. This is
# **fine-tuning**. At the end of this chapter you can
#
# - say what a run takes from a checkpoint, and what it must not take;
# - measure what a head start is worth, in loss and in text;
# - measure what the model forgets, and make it forget less.

# %% [markdown]
# ## Setup

# %% setup
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.files import own_folder
from llmnb.train.feed import loaders, prepare
from llmnb.train.folder import save_run
from llmnb.train.loop import evaluate, train
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

# %% [markdown]
# ## What a checkpoint decides
#
# | of the new run | comes from | because |
# |---|---|---|
# | weights | the checkpoint | they are what was learnt |
# | shape ($L$, $NH$, $C$) | the checkpoint | weights of another shape do not fit |
# | tokenizer | the checkpoint's | row 17 of `wte` means the token that was 17 then |
# | $T$ | you, up to `max_seq_len` | a position without a row in `wpe` is unknown |
# | AdamW's $m$ and $v$ | zero | averages of gradients of another loss |
# | learning rate | you; 1e-4 unless said | see the rest of this chapter |
# | text, steps, all else | you | it is a new run |
#
# The last row but two is what tells this from resuming
# ([chapter 4.16](16_resume.ipynb)): a resumed run is the same run and goes on with
# its averages, its place in the text and its schedule, to the same bits. A
# fine-tuned run is another one, which takes only the weights. That makes it the way
# out of a run whose loss is no number any more: the learning rate of a run in
# progress cannot be changed, but another run can begin where the last state was
# good, at a lower rate.
#
# The function refuses what the table forbids and fills in what it decides. The
# tokenizer is the difficult row: a run's folder holds it, and so do most folders of
# published models; where nothing tells
# ([chapter 4.4](04_published.ipynb)), it has to be named, for a wrong guess would
# train, and write nonsense.

# %% imports tags=["export"]
from dataclasses import replace
from pathlib import Path

from llmnb.formats.checkpoint import read_config
from llmnb.formats.vocabulary import tokenizer_beside, tokenizer_of
from llmnb.train.folder import weights_path
from llmnb.train.options import SHAPE, TrainConfig, check_range, depth_shape


# %% a run from a checkpoint tags=["export"]
def starting_from(init, **given):
    """The TrainConfig of a run that starts from a checkpoint's weights.

    init: the path of a run's folder, or of what GPT2.from_checkpoint reads.
    given: other fields. Unless given, the learning rate is 1e-4, the
    tokenizer that of `tokenizer_of`, and seq_len no more than the checkpoint
    allows. Raises OSError or ValueError when it cannot be read,
    has another shape than is given, or no tokenizer is certain.
    """
    cfg, usual = read_config(weights_path(init)), {"learning_rate": 1e-4}
    usual["seq_len"] = min(TrainConfig.seq_len, cfg.max_seq_len)
    shape = {name: getattr(cfg, name) for name in SHAPE} | _family(cfg)
    asked = dict(given)
    if asked.get("depth"):
        asked |= zip(SHAPE, depth_shape(asked["depth"]), strict=True)
    for name, value in shape.items():
        if asked.get(name) not in (None, value):
            raise ValueError(
                f"{init} has {name} {value}, not {asked[name]}: leave out "
                "the shape, or do not start from it"
            )
    config = TrainConfig(**{**usual, **given, **shape, "init": str(init)})
    check_range("seq_len", config.seq_len, 1, cfg.max_seq_len + 1)
    brought = config.shards and tokenizer_beside(Path(config.shards))
    if "tokenizer" in given or brought:
        return config
    return replace(config, tokenizer=tokenizer_of(init, cfg.vocab_size))


def _family(cfg):
    """The options that say which architecture it is, and how it attends."""
    if cfg.family == "gpt2":
        return {"arch": cfg.family, "num_kv_heads": 0, "window": 0}
    heads, window = cfg.num_kv_heads, cfg.window or 0
    return {"arch": cfg.family, "num_kv_heads": heads, "window": window}


# %% [markdown]
# ## A model that knows Python
#
# We train a small model on half a million characters of Python's library, keep its
# folder, and begin from it once without a step: the loss must be the one it ended
# with.

# %% trained on Python
python = TrainConfig(
    corpus=("../../tests/data/library.jsonl.gz",), limit=500_000,
    vocab_size=512, num_layers=2, channels=64, steps=300,
    eval_every=300, eval_batches=10,
)  # fmt: skip
code = prepare(python)
knows = new_model(python, code.encoding.n_vocab)
*_, last = train(python, knows, *loaders(python, code))
scratch = TemporaryDirectory()
trained = own_folder(Path(scratch.name, "python"))
save_run(trained, python, knows, code, [last])

# %% begin where it ended
again = starting_from(trained, steps=1)
model = new_model(again, code.encoding.n_vocab)
loss = evaluate(model, loaders(python, code)[1], python.eval_batches)
verdict("the beginning", loss == last.val_loss, "where the run ended")

# %% what is refused
for wrong in {"channels": 128}, {"seq_len": 128}:
    try:
        starting_from(trained, **wrong)
    except ValueError as error:
        print(str(error).replace(str(trained), "RUN"))

# %% [markdown]
# ## Little text
#
# The new text is English: what the chapters of Part 1 say between their cells, cut
# to 60,000 characters. It is another language than Python, and yet not all of it is
# new: the code was full of comments and docstrings.


# %% the prose of Part 1
def prose(path):
    """What a chapter says between its cells, without headings and tables."""
    lines = [
        x[2:] for x in path.read_text("utf-8").splitlines() if x[:2] == "# "
    ]
    return "\n".join(x for x in lines if x[:1].isalpha() and ":" not in x[:12])


pages = sorted(Path("../1_by_hand").glob("*.py"))
book = Path(scratch.name, "book.txt")
book.write_text("\n".join(map(prose, pages))[:60_000], "utf-8")
small = replace(
    python, corpus=(str(book),), limit=0, steps=200, eval_every=20,
    tokenizer=str(trained / "tokenizer.tiktoken"),
)  # fmt: skip
text = prepare(small)
verdict(
    "the text", len(text.train_tokens) < len(code.train_tokens) / 5, "short"
)

# %% [markdown]
# Two runs on it, with the same tokenizer, batches and number of steps: one from
# random weights, one from those that know Python, at a sixth of the rate. After
# every 20 steps both are asked for the loss on text of the book and on code of the
# library that no run has read.


# %% two runs
def follow(config, data):
    """Losses of a run on the book and on Python, after every 20 steps."""
    model = new_model(config, data.encoding.n_vocab)
    batches, _ = loaders(config, data)
    _, book = loaders(config, text)
    _, old = loaders(python, code)
    found = [], []
    for step in train(config, model, batches, book):
        if step.val_loss is not None:
            found[0].append(step.val_loss)
            found[1].append(evaluate(model, old, config.eval_batches))
    return found


def tuned(rate, data=text):
    """The same run from the weights that know Python."""
    config = replace(small, learning_rate=rate, init=str(trained))
    return follow(config, data)


new, _ = follow(small, text)
gentle, python_after = tuned(5e-4)
verdict("before a step", gentle[0] < new[0] - 1, "it knows something of it")
verdict("after 20 steps", gentle[1] < min(new[:4]), "60 from nothing lose")
verdict(
    "Python", python_after[-1] > python_after[0] + 0.2, "is being forgotten"
)

# %% [markdown]
# Between validation and the next step nothing is trained: `evaluate` leaves the
# gradients and the weights as they are, so asking does not change the run.
#
# ## What it forgets, and how to make it forget less
#
# Nothing in the new loss speaks for Python: a weight that mattered for it is moved
# as freely as any. Two things hold it back. The first is a **small rate**: the run
# ends before it has gone far, in what it learns as in what it forgets. The second
# is a **mixture**: if some of the new text is the old one, the loss speaks for
# both, and half of each step is spent on what is known. We try the rate at which
# the model was trained, and then, at the small rate, as many tokens of Python
# beside the book as the book has.

# %% three ways to learn the book
hasty, python_hasty = tuned(python.learning_rate)
older = code.train_tokens[: len(text.train_tokens)]
both = np.concatenate([text.train_tokens, older])
mixed, python_mixed = tuned(5e-4, text._replace(train_tokens=both))
verdict("a high rate", hasty[-1] < min(gentle[-1], new[-1]), "learns more")
ahead = all(a < b for a, b in zip(hasty, new, strict=True))
verdict("a high rate", ahead, "is never caught up from nothing")
verdict("a high rate", python_hasty[-1] > python_after[-1], "forgets more")
verdict("a mixture", max(python_mixed) < python_after[1], "forgets nothing")
verdict("a mixture", gentle[-1] < mixed[-1] < gentle[0], "and learns less")

# %% what is learnt and what is lost
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=100)
x = [20 * i for i in range(11)]
axes[0].plot(x, new, color=PALETTE["grey"], label="from nothing")
axes[0].plot(x, gentle, color=PALETTE["blue"], label="fine-tuned, 5e-4")
axes[0].plot(x, hasty, color=PALETTE["orange"], label="fine-tuned, 3e-3")
axes[0].plot(x, mixed, color=PALETTE["ink"], label="5e-4, half Python")
axes[1].plot(x, python_after, color=PALETTE["blue"], label="5e-4")
axes[1].plot(x, python_hasty, color=PALETTE["orange"], label="3e-3")
axes[1].plot(x, python_mixed, color=PALETTE["ink"], label="5e-4, half Python")
for ax, title in zip(axes, ("the book", "Python"), strict=True):
    ax.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.18.1. Left: what the runs learn. The head start is worth more than
# sixty steps from nothing, and at one rate, 3e-3, it is never caught up. Right: what
# they lose, which grows with the rate, and is nothing when half the text is the old
# one; then the book is learnt most slowly.*
#
# There is no free choice among the three. The high rate buys the book with Python,
# the mixture pays for Python with steps on the book. Which is right depends on
# whether you still need what the model knew; the usual rate of 1e-4 assumes that
# you do.

# %% [markdown]
# ## What it does not do
#
# All weights move, and every state holds all of them. Ways to train a few numbers
# beside frozen weights (LoRA is the best known) need less memory for AdamW and
# keep many tunings of one model in little space. At the sizes of this part they
# save nothing that is scarce; [chapter 5.10](../5_modern/10_lora.ipynb) derives
# them and tunes a larger model.
#
# On the command line it is one option,
# `llmnb train --init runs/python --corpus book.txt`
# ([chapter 4.24](24_train.ipynb)).
#
# ## Take away
#
# - Fine-tuning is a run that begins elsewhere; the loop need not know.
# - Shape and tokenizer are the checkpoint's; the averages of AdamW are not taken.
# - The head start is largest where text is scarce.
# - What is not in the new text is forgotten: lower the rate, or mix the old in.
#
# ## Exercises
#
# **1** (★). Begin from the trained model with a tokenizer of your own, of as many
# tokens, learnt from the book. What is the loss before the first step?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# About what a uniform guess pays: nearly all that was learnt is lost at once. The
# shape fits and nothing is refused, since the number of tokens is the same; but
# each row of `wte` now stands for another piece of text.
# :::

# %% exercise 1, checked tags=["hide-cell"]
own = replace(small, tokenizer="bpe", vocab_size=512, init=str(trained))
other = prepare(own)
model = new_model(own, other.encoding.n_vocab)
loss = evaluate(model, loaders(own, other)[1], 10)
near = abs(loss - np.log(512)) < 0.3
verdict("a wrong tokenizer", near, "pays about what a guess pays")
verdict("a wrong tokenizer", loss > gentle[0] + 0.8, "loses the head start")

# %% [markdown]
# **2** (★). Which rate, which $T$ and which tokenizer has a run of which nothing is
# said but the checkpoint?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# 1e-4; 64, the usual $T$, which the checkpoint allows; and the tokenizer that lies in
# the checkpoint's folder.
# :::

# %% exercise 2, checked tags=["hide-cell"]
usual = starting_from(trained)
own = usual.learning_rate, usual.seq_len, Path(usual.tokenizer)
want = 1e-4, 64, trained / "tokenizer.tiktoken"
verdict("what is usual", own == want, "what was not said")
scratch.cleanup()

# %% [markdown]
# ## Further reading
#
# - Howard and Ruder (2018),
#   [Universal Language Model Fine-tuning](https://arxiv.org/abs/1801.06146): the
#   head start, measured, and rates that warm up and fall.
# - Hu et al. (2021), [LoRA](https://arxiv.org/abs/2106.09685): few numbers beside
#   frozen weights.
# - Kirkpatrick et al. (2017),
#   [Overcoming catastrophic forgetting](https://arxiv.org/abs/1612.00796): a third
#   way to hold weights back, by how much the old loss needs each.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.18")
