# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.choices: "Multiple choice, as HellaSwag asks it, and how far to trust the score."
# ---

# %% [markdown]
# # Multiple choice: score an ending
#
# > A language model answers without being asked: it says how probable each
# > ending is. Two ways to compare endings, and how far to trust the result.
#
# *Reading time: 16 minutes. You need: [chapter 4.21](21_evaluation.ipynb).*

# %% [markdown]
# ## Where we are
#
# A loss on text says how well a model predicts, not what it knows. Questions
# with a right answer come nearer. At the end of this chapter you can
#
# - score a multiple choice with a language model, by sum and by mean, and say
#   which mistake each makes;
# - put a standard error on an accuracy;
# - read and write the questions in llm.c's format.

# %% [markdown]
# ## Setup

# %% setup
from tempfile import TemporaryDirectory

import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.model.gpt2 import GPT2

rng = np.random.RandomState(19)

# %% [markdown]
# The model of the hour again, and the text that it has not read
# ([chapter 4.21](21_evaluation.ipynb)):

# %% the model of the hour, and text that it has not read
from llmnb.text.corpus import encode_documents, load_corpus
from llmnb.train.folder import load_run

hour, encoding, _ = load_run("../../book/hour", batch_size=4, seq_len=64)
documents = load_corpus("../../tests/data/library.jsonl.gz", limit=200_000)
unread = encode_documents(encoding, documents)[:32_768]

# %% imports of the choices tags=["export"]
import math
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from llmnb.files import write_whole
from llmnb.formats.llmc import HEADER_BYTES, check_header
from llmnb.formats.llmc import header_of, read_header
from llmnb.text.reader import check_text, open_stream, read_records, text_of
from llmnb.text.tokenizer import encode_text
from llmnb.train.evaluation import row_losses

# %% [markdown]
# ## Multiple choice
#
# **HellaSwag** gives the beginning of a scene and four ways to go on, of which
# one is the true one. A language model answers without being asked: it says how
# probable each ending is. For a context $c$ and an ending $e$ of $n$ tokens
# the probability of the ending is
#
# $$ \log P(e \mid c) = \sum_{i=1}^{n} \log p(e_i \mid c, e_{<i}) . \tag{4.22.1} $$
#
# Choose the ending with the largest. This is `acc`. Its fault: each token
# multiplies $P$ by a number below 1, so a longer ending is less probable
# whatever it says. Suppose all tokens cost about the same, $\bar\ell$ nats. Then
# $-\log P \approx n \bar\ell$, and the shortest ending wins. Dividing by the
# length takes this out:
#
# $$ \hat e = \arg\min_e \; \frac1n \sum_{i=1}^{n} -\log p(e_i \mid c, e_{<i})
#    . \tag{4.22.2} $$
#
# That is `acc_norm`, as llm.c has it: the mean loss over the tokens of the
# ending, and the lowest wins. It errs the other way, a little: the later tokens
# of a long ending are easy, since the ending itself explains them. (Some
# programs divide by the bytes of the ending instead; their numbers differ.)
#
# A row that is longer than the context loses its beginning, as the last tokens
# before an ending say most about it. `llmnb eval` says how many examples were
# cut, for a model with a short context answers another question.


# %% an example tags=["export"]
class Example(NamedTuple):
    """A multiple choice, in tokens.

    context: a 1-D integer array. endings: four of them. label: the index of
    the true one.
    """

    context: np.ndarray
    endings: list
    label: int


class Choice(NamedTuple):
    """What a model chose: by the mean, by the sum, and the truth.

    losses: of the four endings, (4,) means.
    """

    by_mean: int
    by_sum: int
    label: int
    losses: np.ndarray


# %% choose tags=["export"]
def choices_of(model, examples):
    """Yield the `Choice` of a model for every `Example`.

    The four rows of an example, context and ending, are scored in the
    model's batches: in one if batch_size is 4. A row of more than
    model.seq_len + 1 tokens loses those on its left.
    """
    examples, most = list(examples), model.seq_len + 1
    rows = (
        np.concatenate([x.context, e])[-most:]
        for x in examples
        for e in x.endings
    )
    losses = row_losses(model, rows)
    for example in examples:
        four = list(islice(losses, 4))
        pairs = zip(four, example.endings, strict=True)
        ending = [row[-len(e) :] for row, e in pairs]
        means = np.array([x.mean() for x in ending])  # (4.22.2)
        sums = [x.sum() for x in ending]  # (4.22.1)
        best = int(np.argmin(means)), int(np.argmin(sums))
        yield Choice(*best, example.label, means)


def longest_row(example):
    """The tokens of an example's longest row."""
    return len(example.context) + max(map(len, example.endings))


# %% [markdown]
# How far can the fraction of right answers be trusted? Each answer is right
# with an unknown probability $q$, a random number $r \in \{0, 1\}$ with mean $q$
# and variance $\mathbb E r^2 - q^2 = q - q^2$. The mean of $n$ independent ones
# has the variance $q(1-q)/n$. Put the measured fraction in place of $q$:
#
# $$ \mathrm{SE} = \sqrt{\frac{\hat q (1 - \hat q)}{n}} . \tag{4.22.3} $$
#
# On HellaSwag's 10,042 examples, at $\hat q = 0.3$, that is 0.0046: two models
# that differ by less than a hundredth may be equal. On 100 examples it is
# 0.046, and a guess (0.25) cannot be told from GPT-2 124M (0.29).


# %% the error of an accuracy tags=["export"]
def standard_error(accuracy, count):
    """The standard error of a fraction of `count` answers; (4.22.3)."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


# %% ten thousand examinations
answers = rng.random_sample((10_000, 500)) < 0.3
spread = answers.mean(axis=1).std()
compare("standard error", standard_error(0.3, 500), spread, tol=1e-3)
print(
    round(standard_error(0.3, 10_042), 4), round(standard_error(0.3, 100), 3)
)

# %% [markdown]
# ### The file
#
# HellaSwag comes as JSON lines: `ctx`, four `endings`, and `label`. An ending
# is encoded with a space before it, as it would stand in the text. llm.c keeps
# the tokens in a file: a header of 256 int32, of which four are used, then
# uint16 numbers.
#
# | place | number |
# |---|---|
# | header 0 to 3 | 20240522, version 1, examples, bytes of the longest one |
# | example 0 to 4 | 65535, its bytes, its index, the label, 4 |
# | example 5 | tokens of the context, and then these tokens |
# | four times | tokens of the ending, and then these tokens |


# %% examples from JSON lines tags=["export"]
def read_examples_json(path, encoding, skip_bad=False, tally=None):
    """The examples of a file of JSON lines: a list of `Example`.

    Each line has ctx, four endings, and label, from 0 to 3; the file may be
    packed (.gz, .zst). Raises ValueError, naming the file and the line, or
    with skip_bad passes over bad lines and notes them in `tally`, a `Tally`.
    """
    take = partial(_example_of, encoding=encoding)
    with open_stream(path) as (stream, _):
        lines = read_records(path, stream, take, skip_bad, tally)
        found = [example for _, example in lines]
    if not found:
        raise ValueError(f"{path}: holds no example")
    return found


# %% one line tags=["exporti"]
def _example_of(where, record, encoding):
    """A HellaSwag record in tokens, or ValueError."""
    context = text_of(where, record, "ctx")
    endings, label = record.get("endings"), record.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"{where}: 'endings' must be a list of four texts")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"{where}: 'label' must be 0 to 3, got {label!r:.40}")
    if not context:
        raise ValueError(f"{where}: 'ctx' must not be empty")
    texts = [f" {check_text(f'{where}: an ending', e)}" for e in endings]
    first, *ids = (
        encode_text(encoding, x).astype(np.int32) for x in (context, *texts)
    )
    begins = getattr(encoding, "bos_token", None)
    if begins is not None:  # of a model that knows no text without it
        first = np.array([begins, *first], np.int32)
    return Example(first, ids, int(label))


# %% write llm.c's format tags=["export"]
_EVAL_MAGIC, _EVAL_START, _EVAL_VERSION = 20240522, 65535, 1


def write_examples(path, examples):
    """Write a list of `Example` in llm.c's format.

    The file is written beside `path` and renamed. Raises ValueError for an
    example that takes 65,536 bytes or more or that `read_examples` would
    refuse, and for an empty list.
    """
    blocks = []
    for i, example in enumerate(examples):
        body = [i % 65536, example.label, len(example.endings)]
        for tokens in [example.context, *example.endings]:
            body += [len(tokens), *map(int, tokens)]
        size = 2 * (len(body) + 2)
        if size > 65535 or max(body) > 65535 or min(body) < 0:
            raise ValueError(
                f"write_examples: example {i} must take less than 65536 "
                f"bytes and have tokens below 65536, it takes {size}"
            )
        blocks.append(np.array([_EVAL_START, size, *body], "<u2"))
        _parse(f"write_examples: example {i}", blocks[-1])
    if not blocks:
        raise ValueError("write_examples: there are no examples")
    longest = max(block.nbytes for block in blocks)
    header = header_of(_EVAL_MAGIC, _EVAL_VERSION, len(blocks), longest)
    write_whole(path, header.tobytes() + b"".join(x.data for x in blocks))


# %% [markdown]
# Reading trusts nothing: the file's size bounds the count, and each length is
# checked against what is left of its example before it is used.


# %% read llm.c's format tags=["export"]
def read_examples(path):
    """The examples of a file in llm.c's format: a list of `Example`.

    Raises ValueError, naming the file, what is wrong and what would be
    right.
    """
    size, _, count, longest = read_header(
        path, _EVAL_MAGIC, [_EVAL_VERSION], 3
    )
    most = (size - HEADER_BYTES) // 30  # an example has 15 numbers or more
    rows = (
        (size % 2 == 0, "size", "even", size),
        (0 < count <= most, "count", f"1 to {most} in {size} bytes", count),
    )
    check_header(path, _EVAL_MAGIC, rows)
    numbers, found = np.fromfile(path, "<u2", offset=HEADER_BYTES), []
    for i in range(count):
        example, used = _parse(f"{path}: example {i}", numbers)
        if 2 * used > longest:
            raise ValueError(
                f"{path}: example {i} has {2 * used} bytes, the header says "
                f"at most {longest}"
            )
        numbers = numbers[used:]
        found.append(example)
    if len(numbers):
        raise ValueError(
            f"{path}: {numbers.nbytes} bytes follow the last example"
        )
    return found


# %% one example tags=["exporti"]
def _parse(where, numbers):
    """The `Example` at the start of an array, and the numbers it takes."""
    if len(numbers) < 15 or numbers[0] != _EVAL_START:
        raise ValueError(
            f"{where} must begin with {_EVAL_START} and have 15 numbers"
        )
    size, _, label, four = numbers[1:5].tolist()
    if size % 2 or not 30 <= size <= 2 * len(numbers):
        raise ValueError(
            f"{where} must have an even size of 30 to {2 * len(numbers)} "
            f"bytes, got {size}"
        )
    if four != 4 or label > 3:
        raise ValueError(
            f"{where} must have 4 endings and a label of 0 to 3, got {four} "
            f"and {label}"
        )
    left, parts = numbers[5 : size // 2], []
    for _ in range(5):
        length = int(left[0]) if len(left) else 0
        if not 0 < length < len(left):
            raise ValueError(f"{where}: a text of {length} tokens cannot fit")
        parts.append(left[1 : length + 1].astype(np.int32))
        left = left[length + 1 :]
    if len(left):
        raise ValueError(f"{where}: {len(left)} numbers follow its endings")
    return Example(parts[0], parts[1:], label), size // 2


# %% [markdown]
# Three questions of our own, in both forms, which must give the same examples:

# %% three questions
import json
from pathlib import Path

QUESTIONS = [
    ("The kettle boiled, so she", ["made tea.", "ran.", "sold it.", "."], 0),
    ("He opened the umbrella as", ["if.", "the rain began.", "it.", "a"], 1),
    ("The bridge was shut, and", ["so", "birds", "they went round.", "a"], 2),
]
scratch = TemporaryDirectory(ignore_cleanup_errors=True)
folder = Path(scratch.name)
names = "ctx", "endings", "label"
lines = [json.dumps(dict(zip(names, q, strict=True))) for q in QUESTIONS]
_ = (folder / "three.jsonl").write_text("\n".join(lines), "utf-8")

# %% both forms
examples = read_examples_json(folder / "three.jsonl", encoding)
write_examples(folder / "three.bin", examples)
again = read_examples(folder / "three.bin")
same = all(
    np.array_equal(a.context, b.context)
    and all(map(np.array_equal, a.endings, b.endings))
    and a.label == b.label
    for a, b in zip(examples, again, strict=True)
)
verdict("two forms", same, "the same examples")
raw = (folder / "three.bin").read_bytes()
print(np.frombuffer(raw[:16], "<i4")[:3], len(raw) > 1024)

# %% [markdown]
# ## Try it
#
# Our model has read source code, and knows nothing of kettles. So we make it a
# test from text that it has not read: sixteen tokens, those that follow them, and
# three other stretches from elsewhere. Each ending has a length of its own, from 2 to
# 12 tokens.


# %% a test made from the text
def make_example(rng, tokens):
    at = rng.randint(0, len(tokens) - 30, 4)
    lengths = rng.randint(2, 13, 4)
    pairs = zip(at, lengths, strict=True)
    endings = [tokens[a + 16 : a + 16 + n] for a, n in pairs]
    order = rng.permutation(4)
    context = tokens[at[0] : at[0] + 16]
    label = int(np.flatnonzero(order == 0)[0])
    return Example(context, [endings[i] for i in order], label)


test = [make_example(rng, unread) for _ in range(400)]
choices = list(choices_of(hour, test))
right = np.mean([c.by_mean == c.label for c in choices])
error = standard_error(right, len(test))
verdict("the model", right > 0.25 + 3 * error, "is better than a guess")

# %% the length of what is chosen
lengths = np.array([[len(e) for e in x.endings] for x in test])
rows = np.arange(len(test))
by_sum = lengths[rows, [c.by_sum for c in choices]].mean()
by_mean = lengths[rows, [c.by_mean for c in choices]].mean()
verdict("the sum", by_sum < lengths.mean() - 1, "prefers short endings")
verdict("the mean", by_mean > by_sum + 1, "less so")
summed = np.mean([c.by_sum == c.label for c in choices])
verdict("the mean", right > summed + 3 * error, "is right more often")

# %% the numbers tags=["nbval-ignore-output"]
doubt = standard_error(summed, len(test))
print(f"acc_norm {right:.3f} +- {error:.3f}, acc {summed:.3f} +- {doubt:.3f}")
print(f"tokens chosen: {by_mean:.1f} by the mean, {by_sum:.1f} by the sum")

# %% [markdown]
# The bias of (4.22.1) on its own: a model without weights gives every token the
# same probability. All four means are $\log V$, so by the mean it has no
# preference, while by the sum it takes the shortest ending.

# %% no weights
guess = GPT2(hour.cfg, 4, 64, seed=None)
blank = list(choices_of(guess, test[:50]))
means = np.array([c.losses for c in blank])
compare(
    "the mean", means, np.full((50, 4), np.log(guess.cfg.vocab_size)), 1e-5
)
shortest = [
    c.by_sum == np.argmin(n) for c, n in zip(blank, lengths, strict=False)
]
verdict("the sum", all(shortest), "takes the shortest")

# %% [markdown]
# Four damaged files, and what is said about them:


# %% damaged files
def complaint(raw):
    path = folder / "bad.bin"
    path.write_bytes(raw)
    try:
        read_examples(path)
    except ValueError as error:
        return str(error).replace(f"{path}", path.name)
    raise AssertionError("no complaint")


number = (2**31 - 1).to_bytes(4, "little")
print(complaint(raw[:-2]))
print(complaint(raw[:8] + number + raw[12:]))
print(complaint(raw[:1034] + b"\xff\xff" + raw[1036:]))
print(complaint(raw + b"\0\0"))

# %% [markdown]
# ## Take away
#
# - Dividing an ending's loss by its length takes out the preference for short
#   endings.
# - An accuracy over $n$ questions has a standard error of
#   $\sqrt{\hat q(1-\hat q)/n}$. Without it, a difference says nothing.
#
# ## Design note
#
# Programs that run many benchmarks build a prompt for each, with worked
# examples in front and answers in letters, and compare what the model writes.
# That measures what people want from a large model. A small model cannot follow
# such a prompt, and all its answers look like chance. Asking for the
# probability of an ending needs no instruction, and is therefore what one
# watches while a small model trains.
#
# We score an example in four rows and compute the context four times. Keeping
# the keys and values of the context ([chapter 4.19](19_cache.ipynb)) would save
# most of that when contexts are long; HellaSwag's endings are about as long as
# its contexts, and four equal rows are one batch.
#
# ## Exercises
#
# **1** (★). A model is right in 0.30 of the questions. How many must it have answered
# until that lies two standard errors above a guess, 0.25?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Two standard errors are 0.05, so $0.3 \cdot 0.7 / n = 0.025^2$: 336 questions.
# :::

# %% exercise 1, checked tags=["hide-cell"]
enough = standard_error(0.30, 336)
compare("exercise 1", 0.30 - 2 * enough, 0.25, tol=1e-12)

# %% [markdown]
# **2** (★★). Two models answer the same $n$ questions. Why is the standard
# error of the *difference* of their accuracies often much smaller than (4.22.3)
# suggests? Compute it from the two lists of right and wrong.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Both meet the same hard questions, so their errors are correlated. Take the
# difference of each question, $-1$, 0 or 1, and the standard error of its mean:
# questions that both get right or both wrong add nothing.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def error_of_difference(a, b):
    d = np.asarray(a, float) - np.asarray(b, float)
    return d.std() / np.sqrt(len(d))


# %% exercise 2, checked
a = rng.random_sample(2000) < 0.4
b = np.where(rng.random_sample(2000) < 0.9, a, ~a)
paired = error_of_difference(a, b)
apart = np.hypot(*(standard_error(x.mean(), 2000) for x in (a, b)))
verdict("exercise 2", paired < 0.6 * apart, "much smaller")

# %% [markdown]
# ## Further reading
#
# - Zellers et al. (2019),
#   [HellaSwag: Can a Machine Really Finish Your Sentence?](https://arxiv.org/abs/1905.07830):
#   section 3, on how wrong endings were made that fool models and not people.
# - Gao (2021),
#   [Multiple Choice Normalization in LM Evaluation](https://blog.eleuther.ai/multiple-choice-normalization/):
#   the ways to divide by a length, and what each assumes.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.22")
