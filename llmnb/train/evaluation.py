# Written by `make export` from notebooks/4_practice/21_evaluation.py: edit that file.

"""What a model pays for a text: perplexity, bits a byte."""

__all__ = [
    "Score", "row_losses", "score_pieces", "score_text", "text_losses",
    "windows",
]


# imports of the evaluation
import math
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from llmnb.text.bpe import EOT
from llmnb.text.tokenizer import document_start, encode_text, text_start
from llmnb.train.group import ALONE


# the score of a text
class Score(NamedTuple):
    """What a model pays for a text.

    nats: in all. tokens, bytes: that were scored.

    Derived in chapter 4.21.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self):
        """Nats a token, the mean of -log p."""
        return self.nats / self.tokens

    @property
    def perplexity(self):
        """e to the loss; (4.21.1)."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self):
        """Bits of an ideal code for each byte of the text; (4.21.2)."""
        return self.nats / math.log(2) / self.bytes


# the losses of rows
def row_losses(model, rows):
    """Yield the losses of every row: -log p of its tokens but the first.

    model: a GPT2. rows: an iterable of 1-D integer arrays of 2 to
    model.seq_len + 1 tokens, taken model.batch_size at a time. Yields a
    float64 array of len(row) - 1 nats for each. Raises ValueError for a row
    of another length, and FloatingPointError at a loss that is not finite.

    Derived in chapter 4.21.
    """
    rows, shape = iter(rows), (model.batch_size, model.seq_len)
    while batch := list(islice(rows, model.batch_size)):
        tokens, targets = np.zeros((2, *shape), np.int32)
        for b, row in enumerate(batch):
            if not 2 <= len(row) <= model.seq_len + 1:
                raise ValueError(
                    f"row_losses: a row must have 2 to {model.seq_len + 1} "
                    f"tokens, got {len(row)}"
                )
            tokens[b, : len(row) - 1] = row[:-1]
            targets[b, : len(row) - 1] = row[1:]
        model.forward(tokens, targets)
        losses = np.asarray(model.memory["acts"]["losses"])
        for b, row in enumerate(batch):
            found = losses[b, : len(row) - 1].astype(np.float64)
            for wrong in found[~np.isfinite(found)]:
                raise FloatingPointError(
                    f"the loss of a token is {wrong}: the model computes no "
                    "numbers, its weights may be too large"
                )
            yield found


# the windows of a text
def windows(count, seq_len, stride):
    """Yield (start, first, end) of windows over `count` predictions.

    A window reads the tokens from start on; its predictions from first to
    end (past its last) are scored, each of the `count` in one window.
    Raises ValueError unless 1 <= stride <= seq_len.

    Derived in chapter 4.21.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(
            f"stride must lie in [1, {seq_len}], the length of the context, "
            f"got {stride}"
        )
    start = first = 0
    while first < count:
        end = min(start + seq_len, count)
        yield start, first, end
        start, first = start + stride, end


# the losses of a text
def text_losses(model, tokens, stride=None, bar=iter, group=ALONE):
    """Yield the losses of tokens[1:], window after window, float64 arrays.

    tokens: integers (N,), N of at least 2. stride: tokens that each window
    scores past the first, by default half the context. bar: wraps the
    list of windows, as tqdm does. Together the arrays have N - 1 numbers, in
    order; those of one process of a group are its share of the windows.

    Derived in chapter 4.21.
    """
    if len(tokens) < 2:
        raise ValueError("there must be at least one token to score")
    T = model.seq_len
    stride = max(1, T // 2) if stride is None else stride
    plan = list(windows(len(tokens) - 1, T, stride))
    mine = group.share(len(plan))
    plan = plan[mine.start : mine.stop]
    rows = (tokens[start : end + 1] for start, _, end in plan)
    pairs = zip(bar(plan), row_losses(model, rows), strict=True)
    for (start, first, _), loss in pairs:
        yield loss[first - start :]


# score a text
def score_text(model, encoding, documents, stride=None):
    """The `Score` of a text, and of nothing but the text.

    documents: a str, or an iterable of str, each read behind its
    `text_start`, such as `<|endoftext|>`, which is not scored. stride: as for
    text_losses. Raises ValueError when there is no text.

    Derived in chapter 4.21.
    """
    if isinstance(documents, str):
        documents = [documents]
    pieces = ((True, text) for text in documents)
    return score_pieces(model, encoding, pieces, stride)


def score_pieces(
    model, encoding, pieces, stride=None, bar=iter, endoftext=False,
    group=ALONE,
):  # fmt: skip
    """`score_text` of documents in pieces, as `text.documents` cuts them.

    pieces: an iterable of (whether a document begins, str). bar: wraps
    the list of windows, as tqdm does. endoftext: `<|endoftext|>` in a text
    is the token, behind which a document begins. group: the Group that
    shares the work, of which each process calls this.

    Derived in chapter 4.21.
    """
    parts, size, marks = [], 0, document_start(encoding)
    for first, text in pieces:
        parts.append(np.array([text_start(encoding)] * first, np.uint32))
        parts.append(encode_text(encoding, text, endoftext))
        text = text.replace(EOT, "") if endoftext else text
        size += len(text.encode("utf-8"))
    if not size:
        raise ValueError("there is no text to score")
    tokens = np.concatenate(parts).astype(np.int32)
    losses = text_losses(model, tokens, stride, bar, group)
    losses = _of_all(group, np.concatenate([np.empty(0), *losses]))
    scored = losses[~np.isin(tokens[1:], marks)]
    return Score(float(scored.sum()), len(scored), size)


# the losses of all
def _of_all(group, losses):
    """The losses of all processes in their order, from this one's."""
    if group.size == 1:
        return losses
    ends = np.cumsum([0, *group.gather(len(losses))]).tolist()
    whole, spans = np.empty(ends[-1]), [*pairwise(ends)]
    whole[slice(*spans[group.rank])] = losses
    group.spread(whole, spans)
    return whole
