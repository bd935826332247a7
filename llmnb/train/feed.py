# Written by `make export` from notebooks/4_practice/12_options.py: edit that file.

"""The text of a run as tokens, and its batches."""

__all__ = [
    "Data",
    "LANDMARK_TOKENS",
    "TOKENIZER_TEXT",
    "landmarks",
    "loaders",
    "make_encoding",
    "prepare",
]


# imports of feed
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_room
from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.shard import Shards, find_shards, sample_tokens
from llmnb.text.data import DataLoader
from llmnb.train.landmarks import unigram_entropy


# the data of a run
TOKENIZER_TEXT = 2_000_000  # characters the bpe tokenizer learns from


class Data(NamedTuple):
    """The tokens of a run: what `prepare` returns.

    encoding: a tiktoken.Encoding. train_tokens, val_tokens: 1-D uint16
    arrays, or the `Shards` of a folder. source: a sentence that
    says where the text came from.

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
    from llmnb.text import corpus, data
    from llmnb.text.reader import Tally

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
    documents = corpus.load(source, *how)
    encoding = make_encoding(config, documents)
    tokens = corpus.encode_documents(encoding, documents, config.endoftext)
    characters = sum(map(len, documents))
    source = corpus.describe(sources, len(documents), characters)
    source += tally.words(config.endoftext)
    return Data(encoding, *data.split(tokens), source)


def _text_bytes(path):
    """Bytes of text that must be in memory if this file or folder is read.

    At least: what is packed, or holds fields, may be less when it is read.
    """
    from llmnb.text.corpus import files_below

    path = Path(path)
    if path.is_file():
        known = path.suffix not in (".gz", ".zst", ".jsonl")
        return path.stat().st_size * known
    found = [x for x in files_below(path) if x.suffix == ".txt"]
    return sum(x.stat().st_size for x in found if x.is_file())


# from a folder of shards
def _from_shards(config):
    """The tokens of a folder, whose files are left closed."""
    folder = Path(config.shards)
    parts = [Shards(x) for x in find_shards(folder)]
    encoding = _encoding_of(config, folder)
    total = sum(len(x) for x in parts)
    return Data(encoding, *parts, f"shards in {folder}: {total:,} tokens")


def _encoding_of(config, folder):
    """The tokenizer in a folder, or the one that the run names."""
    from llmnb.text import tokenizer

    path = folder / "tokenizer.tiktoken"
    if path.exists():
        return tokenizer.load(path)
    if config.tokenizer == "bpe":
        raise FileNotFoundError(
            f"{folder} has no tokenizer.tiktoken: name the tokenizer of its "
            "tokens, such as --tokenizer gpt2"
        )
    return make_encoding(config, [])


# the tokenizer of a run
def make_encoding(config, documents):
    """The tokenizer that a TrainConfig names, trained if it is "bpe".

    documents: an iterable of str, of which the first `TOKENIZER_TEXT`
    characters are learnt from, with `config.endoftext` but for
    `<|endoftext|>`. Raises ValueError, OSError or RuntimeError,
    in one sentence.

    Derived in chapter 4.12.
    """
    from llmnb.text import tokenizer

    if config.tokenizer != "bpe":
        encoding = open_encoding(config.tokenizer)
        tokenizer.check_special(encoding)  # a run keeps its tokenizer
        return encoding
    learnt, left = [], TOKENIZER_TEXT
    for text in documents:
        text = text[:left]
        learnt += text.split(tokenizer.EOT) if config.endoftext else [text]
        left -= len(text)
        if not left:
            break
    return tokenizer.train(learnt, config.vocab_size)


# its batches
def loaders(config, data):
    """The DataLoaders of a run: shuffled for training, fixed to validate.

    A shard of fewer tokens than one batch takes is left out. Raises
    ValueError when all are.

    Derived in chapter 4.12.
    """
    return (
        _loader(config, data.train_tokens, seed=config.seed),
        _loader(config, data.val_tokens, shuffle=False),
    )


# a loader of an array or of shards
def _loader(config, tokens, **how):
    shape = config.batch_size, config.seq_len
    if not isinstance(tokens, Shards):
        return DataLoader([tokens], *shape, **how)
    pairs = zip(tokens.paths, tokens.lengths, strict=True)
    long = [path for path, n in pairs if n > math.prod(shape)]
    return DataLoader(long or tokens.paths, *shape, **how)


# the landmarks
LANDMARK_TOKENS = 8_000_000  # training tokens that are counted


def landmarks(config, data):
    """The losses a run is measured against, in nats a token.

    Returns a dict: "uniform", log V; "unigram", what the token frequencies
    of the training text pay on the tokens that validation uses. Of a long
    training text a sample of `LANDMARK_TOKENS` is counted.

    Derived in chapter 4.12.
    """
    V = data.encoding.n_vocab
    batches = _loader(config, data.val_tokens, shuffle=False)
    count = min(config.eval_batches, batches.batches_per_epoch)
    targets = [batches.next_batch()[1].ravel().copy() for _ in range(count)]
    sample = sample_tokens(data.train_tokens, LANDMARK_TOKENS)
    unigram = unigram_entropy(sample, np.concatenate(targets), V)
    return {"uniform": math.log(V), "unigram": unigram}
