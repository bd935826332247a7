# Written by `make export` from notebooks/4_practice/22_choices.py: edit that file.

"""Multiple choice, as HellaSwag asks it, and how far to trust the score."""

__all__ = [
    "Choice", "Example", "choices_of", "longest_row", "read_examples",
    "read_examples_json", "standard_error", "write_examples",
]


# imports of the choices
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


# an example
class Example(NamedTuple):
    """A multiple choice, in tokens.

    context: a 1-D integer array. endings: four of them. label: the index of
    the true one.

    Derived in chapter 4.22.
    """

    context: np.ndarray
    endings: list
    label: int


class Choice(NamedTuple):
    """What a model chose: by the mean, by the sum, and the truth.

    losses: of the four endings, (4,) means.

    Derived in chapter 4.22.
    """

    by_mean: int
    by_sum: int
    label: int
    losses: np.ndarray


# choose
def choices_of(model, examples):
    """Yield the `Choice` of a model for every `Example`.

    The four rows of an example, context and ending, are scored in the
    model's batches: in one if batch_size is 4. A row of more than
    model.seq_len + 1 tokens loses those on its left.

    Derived in chapter 4.22.
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
    """The tokens of an example's longest row.

    Derived in chapter 4.22.
    """
    return len(example.context) + max(map(len, example.endings))


# the error of an accuracy
def standard_error(accuracy, count):
    """The standard error of a fraction of `count` answers; (4.22.3).

    Derived in chapter 4.22.
    """
    return math.sqrt(accuracy * (1 - accuracy) / count)


# examples from JSON lines
def read_examples_json(path, encoding, skip_bad=False, tally=None):
    """The examples of a file of JSON lines: a list of `Example`.

    Each line has ctx, four endings, and label, from 0 to 3; the file may be
    packed (.gz, .zst). Raises ValueError, naming the file and the line, or
    with skip_bad passes over bad lines and notes them in `tally`, a `Tally`.

    Derived in chapter 4.22.
    """
    take = partial(_example_of, encoding=encoding)
    with open_stream(path) as (stream, _):
        lines = read_records(path, stream, take, skip_bad, tally)
        found = [example for _, example in lines]
    if not found:
        raise ValueError(f"{path}: holds no example")
    return found


# one line
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


# write llm.c's format
_EVAL_MAGIC, _EVAL_START, _EVAL_VERSION = 20240522, 65535, 1


def write_examples(path, examples):
    """Write a list of `Example` in llm.c's format.

    The file is written beside `path` and renamed. Raises ValueError for an
    example that takes 65,536 bytes or more or that `read_examples` would
    refuse, and for an empty list.

    Derived in chapter 4.22.
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


# read llm.c's format
def read_examples(path):
    """The examples of a file in llm.c's format: a list of `Example`.

    Raises ValueError, naming the file, what is wrong and what would be
    right.

    Derived in chapter 4.22.
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


# one example
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
