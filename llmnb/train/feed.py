# Written by `make export` from notebooks/4_practice/12_options.py: edit that file.

"""The text of a run as tokens, and its batches."""

__all__ = [
    "Data", "TOKENIZER_TEXT", "landmarks", "loaders", "make_encoding",
    "prepare",
]


# imports of feed
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_room
from llmnb.formats.vocabulary import open_encoding, tokenizer_beside
from llmnb.formats.shard import Shards, find_shards, sample_tokens
from llmnb.text import corpus, tokenizer
from llmnb.text.data import DataLoader, split
from llmnb.text.reader import Tally
from llmnb.train.landmarks import unigram_entropy


# the data of a run
class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding, or one of llmnb.formats.foreign.
    train_tokens, val_tokens: 1-D arrays of uint16 or uint32, or the `Shards`
    of a folder. source: a sentence that says where the text came from.

    Derived in chapter 4.12.
    """

    encoding: object
    train_tokens: np.ndarray
    val_tokens: np.ndarray
    source: str


# from text to tokens
def prepare(config):
    """Load the text of a run and turn it into tokens; returns a `Data`.

    Raises ValueError, OSError or RuntimeError, in one sentence, when the
    text is missing, too short, or cannot be downloaded.

    Derived in chapter 4.12.
    """
    if config.shards:
        return _from_shards(config)
    sources, tally = [*config.corpus], Tally()
    source = sources[0] if len(sources) == 1 else sources
    size = sum(map(_text_bytes, config.corpus))
    check_room(
        min(size, config.limit or size),
        "a limit, or shards made with `llmnb data`, take less",
    )
    how = config.limit or None, config.field, config.skip_bad, tally
    documents = corpus.load_corpus(source, *how)
    encoding = make_encoding(config, documents)
    tokens = corpus.encode_documents(encoding, documents, config.endoftext)
    characters = sum(map(len, documents))
    source = corpus.describe(sources, len(documents), characters)
    source += tally.words(config.endoftext)
    return Data(encoding, *split(tokens), source)


def _text_bytes(path):
    """Bytes of text that must be in memory if this file or folder is read.

    At least: what is packed, or holds fields, may be less when it is read.
    """
    path, kinds = Path(path), (".gz", ".zst", ".jsonl")
    if path.is_file():
        return path.stat().st_size * (path.suffix not in kinds)
    found = corpus.files_below(path)
    return sum(x.stat().st_size for x in found if x.suffix == ".txt")


# from a folder of shards
def _from_shards(config):
    """The tokens of a folder, whose files are left closed."""
    folder = Path(config.shards)
    own = tokenizer_beside(folder)
    train, val = (Shards(paths) for paths in find_shards(folder))
    if own:
        encoding = open_encoding(own)
    elif config.tokenizer == "bpe":
        raise FileNotFoundError(
            f"{folder} has no tokenizer: name the one of its tokens, "
            "such as --tokenizer gpt2"
        )
    else:
        encoding = make_encoding(config, [])
    top = max(int(sample_tokens(x, 1 << 20).max()) for x in (train, val))
    if top >= encoding.n_vocab:
        raise ValueError(
            f"{folder} has the token {top}, its tokenizer, "
            f"{own or config.tokenizer}, has {encoding.n_vocab}: another one "
            "wrote these shards"
        )
    source = f"shards in {folder}: {len(train) + len(val):,} tokens"
    return Data(encoding, train, val, source)


# the tokenizer of a run
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.

    Derived in chapter 4.12.
    """
    if config.tokenizer != "bpe":
        encoding = open_encoding(config.tokenizer)
        if not hasattr(encoding, "files"):  # a run keeps its tokenizer
            tokenizer.check_special(encoding)
        return encoding
    learnt, left = [], TOKENIZER_TEXT
    for text in documents:
        text = text[:left]
        learnt += text.split(tokenizer.EOT) if config.endoftext else [text]
        left -= len(text)
        if not left:
            break
    if not any(learnt):
        raise ValueError("there is no text for a tokenizer to learn from")
    return tokenizer.train(learnt, config.vocab_size)


# its batches
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.

    Derived in chapter 4.12.
    """
    train, val = data.train_tokens, data.val_tokens
    batches = _loader(config, train, "train on", seed=config.seed)
    return batches, _loader(config, val, "validate on", shuffle=False)


# a loader of an array or of shards
def _loader(config, tokens, what, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        if len(tokens) <= math.prod(shape):
            raise ValueError(
                f"the text has {len(tokens)} tokens to {what}, a batch of "
                f"{shape[0]} x {shape[1]} needs {math.prod(shape) + 1}: give "
                "more text, or a smaller batch_size or seq_len"
            )
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# the landmarks
_LANDMARK_TOKENS = 8_000_000  # training tokens that are counted


def landmarks(config, data):
    """The losses a run is measured against, in nats a token.

    Returns a dict: "uniform", log V; "unigram", what the token frequencies
    of the training text pay on the tokens that validation uses. Of a long
    training text a sample of eight million tokens is counted.

    Derived in chapter 4.12.
    """
    V = data.encoding.n_vocab
    batches = _loader(config, data.val_tokens, "validate on", shuffle=False)
    count = min(config.eval_batches, batches.batches_per_epoch)
    targets = [batches.next_batch()[1].ravel().copy() for _ in range(count)]
    sample = sample_tokens(data.train_tokens, _LANDMARK_TOKENS)
    unigram = unigram_entropy(sample, np.concatenate(targets), V)
    return {"uniform": math.log(V), "unigram": unigram}
