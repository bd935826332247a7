# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.sharing: "Text that a group of processes encodes in turns."
# ---

# %% [markdown]
# # Sharing: text and scores
#
# > A group that can train together can also make shards and score a text
# > together; the files and the scores are, to the last bit, those of one process.
#
# *Reading time: 10 minutes. You need: [chapter 6.2](02_shards.ipynb), shards of any
# size ([chapter 4.11](../4_practice/11_anysize.ipynb)) and evaluation
# ([chapter 4.21](../4_practice/21_evaluation.ipynb)).*

# %% [markdown]
# ## Where we are
#
# Before a run on many machines stands the text, which somebody has to turn into
# tokens, and after it the question how good the model is. Neither needs
# gradients. Each is a list of things to do that do not know of each other. At the
# end of this chapter you can
#
# - say which list it is that ranks share, for a text to encode and for one to score;
# - say why shards written by a group have the bytes of those that one process
#   writes;
# - tell how many ranks a text is worth.
#
# ## Setup

# %% setup
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import llmnb
from llmnb.book.verify import verdict

place = TemporaryDirectory()
folder = Path(place.name)

# %% [markdown]
# ## Who encodes what
#
# One process reads a corpus in order, cuts it into *batches* of about a million
# characters, encodes these in threads, and writes the tokens in order (chapter
# 4.11). Encoding is nearly all of the work. A batch knows where it begins, and
# its tokens depend on nothing before it. So let every rank read the corpus and cut it
# alike, and let batch $j$ be encoded by rank $j \bmod R$, which keeps it and
# forgets the text of the others. That is the one global order: a batch has a
# number, and neither the number nor its tokens depend on $R$.
#
# | | batch 0 | 1 | 2 | 3 | 4 |
# |---|---|---|---|---|---|
# | one rank | 0 | 0 | 0 | 0 | 0 |
# | two | 0 | 1 | 0 | 1 | 0 |
# | three | 0 | 1 | 2 | 0 | 1 |
#
# *Table 6.4.1. The rank that encodes a batch.*
#
# The first rank writes. It needs the tokens in the order of the batches, and
# `collect` of chapter 6.1 brings the parts of all ranks in the order of ranks. So
# they meet in rounds of $R$ batches, and what arrives in a round is in order
# already. In the last round some ranks have nothing; when the first has nothing, all
# is done.
#
# What comes into `write_shards` is a sequence of blocks: where a batch begins, how
# much has been read behind it, its tokens. It cannot see who has encoded them, so
# the shards and the note from which an interrupted job goes on are the same.
# Only one thing has to be told to the others: the place at which the first one goes on.
# While it looks for that, and whenever one rank is ahead, the others `rest`.

# %% imports of sharing tags=["export"]
from functools import partial
from itertools import chain, islice, pairwise, repeat

import numpy as np

from llmnb.text.shards import START, Origin, encoded, in_order


# %% batches in turns tags=["export"]
def encoded_by(group):
    """An `encoded` for `write_shards`, whose batches a group shares.

    Every process of the group calls it, and comes to its end: the first,
    from `write_shards`, gets the blocks; the others get none, and go on from
    the first one's place.
    """

    def blocks(sources, encoding, options, place=START, workers=0):
        group.rest()
        place = Origin(*group.gather(place)[0])
        how = workers, partial(_turns, group)
        return encoded(sources, encoding, options, place, *how)

    return blocks


def _turns(group, function, items, workers):
    """`in_order` over a group, each process with its items, for the first."""
    own = islice(items, group.rank, None, group.size)
    for block in chain(in_order(function, own, workers), repeat(None)):
        group.rest()
        place, counts, tokens = block or (None, None, np.empty(0, np.uint16))
        heads = group.gather([place, counts, len(tokens)])
        lengths = [length for *_, length in heads]
        whole = group.collect(tokens, lengths)
        if not heads[0][0]:  # the first has none, and so has nobody
            return
        if group.first:
            yield from _blocks(heads, whole, lengths)


def _blocks(heads, whole, lengths):
    """What the first has collected, as blocks of `encoded`."""
    spans = pairwise(np.cumsum([0, *lengths]).tolist())
    for (place, counts, _), span in zip(heads, spans, strict=True):
        if place:
            yield Origin(*place), tuple(counts), whole[slice(*span)]


# %% [markdown]
# ## Proof
#
# Some files of made-up words, small batches, shards of 5,000 tokens; first by one
# process, then by groups of threads. The last group is left in the
# middle, as a kill would, and another number of ranks goes on.

# %% a corpus
from llmnb.text import shards
from llmnb.text.documents import sources
from llmnb.text.shards import shards_folder, write_shards
from llmnb.text.tokenizer import train
from llmnb.train.rehearsal import rehearse

draw = random.Random(6)
for k in range(6):
    words = ["".join(draw.choices("aehst", k=4)) for _ in range(3000)]
    (folder / f"{k}.txt").write_text(" ".join(words), "utf-8")
corpus = sources([folder / f"{k}.txt" for k in range(6)])
encoding = train("the tests' state, as these seas. " * 9, 270)
OPTIONS = {"limit": 0, "shard_tokens": 5000, "val_tokens": 0}
shards.BATCH = 10_000  # small, so that there are many


def write(group, out, left=None):
    """Write shards as one of a group; leave after some reports."""
    work, blocks = (corpus, encoding, OPTIONS), encoded_by(group)
    if not group.first:
        return len([*blocks(*work, workers=1)])
    out = shards_folder(folder / out)
    found = write_shards(out, *work, workers=1, blocks=blocks)
    if left:
        [*islice(found, left)]
        found.close()
        raise InterruptedError
    return len([*found])


def files(name):
    return {x.name: x.read_bytes() for x in sorted((folder / name).iterdir())}


# %% groups of several sizes
out = shards_folder(folder / "one")
for _ in write_shards(out, corpus, encoding, OPTIONS):
    pass
print(len(files("one")), "files:", *[*files("one")][:3], "...")
for R in (1, 2, 3):
    reports = rehearse(R, lambda group, R=R: write(group, f"ranks{R}"))
    verdict(f"{R} ranks", files(f"ranks{R}") == files("one"), "the same files")
    verdict(f"{R} ranks", not any(reports[1:]), "only the first has blocks")

# %% left, and on with others
try:
    rehearse(3, lambda group: write(group, "left", 12))
except InterruptedError:
    verdict("left", "unfinished.json" in files("left"), "half done")
rehearse(2, lambda group: write(group, "left"))
verdict("on with 2", files("left") == files("one"), "the same files")

# %% [markdown]
# A mistake that this would catch: ranks that encode but let the tokens arrive in the
# order in which they are ready.


# %% a mistake, caught
def hasty(heads, whole, lengths):
    return reversed([*in_turn(heads, whole, lengths)])


in_turn, _blocks = _blocks, hasty
rehearse(2, lambda group: write(group, "hasty"))
_blocks = in_turn
verdict("another order", files("hasty") != files("one"), "caught")

# %% [markdown]
# ## How many ranks a text is worth
#
# Every rank reads all of the text: it unpacks, takes lines apart, and cuts. Let
# reading a corpus take $r$ seconds, and encoding it $c$ seconds of one thread. Ranks
# of $w$ threads take, as long as the first can write what arrives,
#
# $$ t_R = \max\!\left(r, \frac{c}{w R}\right) , \tag{6.4.1} $$
#
# and more than $c / (w r)$ ranks gain nothing. How much is that?

# %% reading and encoding, timed tags=["nbval-ignore-output"]
import time

from llmnb.text.shards import pieces_from

shards.BATCH = 1 << 20
(library,) = sources(["../../tests/data/library.jsonl.gz"])
words = train([x for _, _, x, _ in islice(pieces_from([library]), 50)], 1024)
start = time.perf_counter()
size = sum(len(text) for _, _, text, _ in pieces_from([library]))
read = time.perf_counter() - start
start = time.perf_counter()
for _ in encoded([library], words, OPTIONS, workers=1):
    pass
both = time.perf_counter() - start
said = f"read in {read:.2f} s, read and encoded in {both:.2f} s"
print(f"{size / 1e6:.1f} million characters: {said}: {both / read:.0f} times")

# %% [markdown]
# Packed JSON lines are worth about so many threads, on one machine or on several.
# Beyond, cut the corpus: `--corpus` takes some of the files, and as many
# jobs as there are parts write folders of their own.
#
# ## Who scores what
#
# A text is scored in windows (chapter 4.21), HellaSwag in examples (chapter
# 4.22). Both are lists whose items cost about the same, so each of $R$ ranks
# gets one run of them, by `share` of chapter 4.13. All have the same text
# and the same weights. Then all tell each other their losses, in the order of
# the windows, and each adds them up in that order. A window's losses do not
# depend on the windows before it, so the sum has the bits of one process.

# %% a text, scored by groups
from llmnb.train.evaluation import score_pieces

cfg = llmnb.GPT2Config(16, encoding.n_vocab, 1, 2, 16)
text = (folder / "0.txt").read_text("utf-8")[:2000]


def score(group):
    model = llmnb.GPT2(cfg, 1, 16, "reference", seed=6)
    return score_pieces(model, encoding, [(True, text)], group=group)


(one,) = rehearse(1, score)
print(one.tokens, "tokens,", one.bytes, "bytes")
for R in (2, 3):
    same = all(x == one for x in rehearse(R, score))
    verdict(f"{R} ranks", same, "the same bits, in all")

# %% [markdown]
# The commands are those you know. `llmnb data` and `llmnb eval` notice the group as
# `llmnb train` does, refuse ranks that differ, and let the first speak:
#
#     mpirun -n 4 llmnb data shards --corpus dump.jsonl.zst
#     mpirun -n 4 llmnb eval gpt2/ --text page.txt --hellaswag hellaswag.bin
#
# ## What it does not do
#
# Every rank reads the text and the model itself, under the same path. A text must be
# the same file on all, down to the time of its last change, which `rsync -t` keeps.
# A text to score is encoded whole by each rank. Each rank holds the whole model:
# ranks of one machine do not share it.
#
# ## Take away
#
# - Number the things to do in one order that does not know of ranks; deal them out by
#   number; put the results back in that order. Then the number of ranks
#   cannot be seen in the result.
# - What all must do, here reading, bounds how many ranks are worth having.
#
# ## Design note
#
# Files could be dealt out in place of batches, and nobody would read what is another's.
# But a place in the stream counts the documents and characters before it, and
# `--limit` ends at one of them, so a rank would have to know of files that it
# has not read. And one large file, as dumps are, would be one rank's.
#
# ## Exercises
#
# **1** (★). Five batches, three ranks: how many rounds, and which ranks have nothing in
# the last? When does the group notice that all is done?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Two rounds; rank 2 has nothing in the second. In a third the first rank has
# nothing either, and all leave. The cell prints which batches each rank encodes,
# and how many rounds it begins.
# :::


# %% exercise 1, checked tags=["hide-cell"]
def met(group):
    """The batches that this rank encodes, and the rounds it begins."""
    done, meetings = [], []
    group.rest = lambda: meetings.append(len(done))

    def work(batch):
        done.append(batch)
        return START, (), np.array([batch])

    for _ in _turns(group, work, range(5), 1):
        pass
    return done, len(meetings)


for rank, (done, meetings) in enumerate(rehearse(3, met)):
    print(rank, done, meetings)

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

place.cleanup()
gained("6.4")
