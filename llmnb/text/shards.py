# Written by `make export` from notebooks/4_practice/11_anysize.py: edit that file.

"""Text of any size turned into shards on all cores."""

__all__ = [
    "Encoded", "Origin", "START", "conditions", "encoded", "in_order",
    "pieces_from", "shards_folder", "write_shards",
]


# imports of the shard writer
import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.files import BESIDE, Lock, own_folder, read_json, write_whole
from llmnb.formats.shard import shard_length, write_shard
from llmnb.formats.vocabulary import KEPT, keep_encoding
from llmnb.text.bpe import EOT
from llmnb.text.data import check_int, split
from llmnb.text.tokenizer import document_start, encode_text, token_dtype
from llmnb.timing import cores


# results in the order of the items
def in_order(function, items, workers):
    """Yield function(item) for all items, in order, computed in threads.

    Derived in chapter 4.11.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# encode a batch of pieces
def _encode(encoding, pieces, endoftext=False):
    """The tokens of (first, text) pieces, each document behind its start."""
    kind = token_dtype(encoding.n_vocab)
    parts, before = [], np.array(document_start(encoding), kind)
    for first, text in pieces:
        if first:
            parts.append(before)
        parts.append(encode_text(encoding, text, endoftext).astype(kind))
    return np.concatenate(parts)


# a place in a corpus
class Origin(NamedTuple):
    """Where a token of a corpus comes from.

    source, piece: where its batch begins. drop: tokens of the batch before
    it. documents, characters: what lies before the batch.

    Derived in chapter 4.11.
    """

    source: int = 0
    piece: int = 0
    drop: int = 0
    documents: int = 0
    characters: int = 0


# the pieces behind a place
START = Origin()


def pieces_from(sources, place=START, limit=0):
    """Yield (Origin, first, text, read) from a place on.

    sources: a list of `Source`. limit: end after so many characters of the
    corpus, 0 for all of it; the last piece is cut to fit. read: how much of
    the sizes of all sources is read. Sources before the place are not
    opened.

    Derived in chapter 4.11.
    """
    _, skipped, _, documents, characters = place
    before = sum(source.size for source in sources[: place.source])
    for k in range(place.source, len(sources)):
        name, _, _, pieces, tally = sources[k]
        found, times = enumerate(pieces()), 0
        for i, (first, text, read) in islice(found, skipped, None):
            if limit and characters >= limit:
                return
            text = text[: limit - characters] if limit else text
            if EOT in text:
                times += text.count(EOT)
                tally.note(EOT, name, times)
            here = Origin(k, i, 0, documents, characters)
            yield here, first, text, before + read
            documents, characters = documents + first, characters + len(text)
        skipped, before = 0, before + sources[k].size


# batches of pieces
BATCH = 1 << 20  # characters that a thread encodes at once, or more


def _batches(pieces):
    """Gather what `pieces_from` yields: an Origin, pieces, and counts behind.

    counts: what is read then, documents and characters, as in `Encoded`.
    """
    batch, start = [], None
    for place, first, text, read in pieces:
        start = start or place
        batch.append((first, text))
        end = place.characters + len(text)
        counts = read, place.documents + first, end
        if end - start.characters >= BATCH:
            yield start, batch, counts
            batch, start = [], None
    if batch:
        yield start, batch, counts


# the batches, encoded
def encoded(
    sources, encoding, options, place=START, workers=0, turns=in_order
):
    """Yield (Origin, counts, tokens) of batches of a corpus from a place on.

    sources, encoding, options, workers: as for `write_shards`. counts: read,
    documents and characters behind the batch, as in `Encoded`. turns:
    `in_order`, or what does its work elsewhere.

    Derived in chapter 4.11.
    """
    special = options.get("endoftext", False)

    def work(batch):
        place, pieces, counts = batch
        return place, counts, _encode(encoding, pieces, special)

    pieces = pieces_from(sources, place, options["limit"])
    return turns(work, _batches(pieces), workers or cores())


# the stream of tokens
class _Stream:
    """The tokens of a corpus in blocks, as of `encoded`, taken in portions."""

    def __init__(self, blocks, place=START):
        self._blocks = blocks
        self._tokens, self._used = np.empty(0), 0
        self.counts = 0, 0, 0
        if place != START:
            found = self.more() and self._place == place._replace(drop=0)
            if not found or place.drop > len(self._tokens):
                raise ValueError("the place to go on from does not exist")
            self._used = place.drop

    def more(self):
        """Whether there is another token."""
        while self._used == len(self._tokens):
            block = next(self._blocks, None)
            if block is None:
                return False
            self._place, self.counts, self._tokens = block
            self._used = 0
        return True

    def take(self, count):
        """Up to `count` tokens, at least one if there is `more`."""
        part = self._tokens[self._used : self._used + count]
        self._used += len(part)
        return part

    @property
    def place(self):
        """The `Origin` of the next token."""
        return self._place._replace(drop=self._used)


# what is noted
NOTE = "unfinished.json"
_TOKENIZERS = "|".join(map(re.escape, KEPT))
OURS = re.compile(
    r"((train|val)(_[0-9]{6,})?\.bin|unfinished\.json"
    rf"|{_TOKENIZERS})({BESIDE})?"
)


def _digest(texts):
    """A hash of an iterable of bytes."""
    digest = sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


# what the work depends on
def conditions(sources, encoding, options):
    """What the shards of a corpus depend on, a dict: options, and hashes.

    Derived in chapter 4.11.
    """
    marks = (x.mark.encode("utf-8", "surrogatepass") for x in sources)
    single, ranks = encoding.decode_single_token_bytes, encoding.n_vocab - 1
    files = getattr(encoding, "files", {}).values()
    return {
        "options": options,
        "corpus": _digest(marks),
        "tokenizer": _digest(chain(map(single, range(ranks)), files)),
    }


# has something changed?
def _check_conditions(path, note, now):
    """Raise ValueError when unfinished work was begun otherwise."""
    then = note["conditions"]
    for name in then["options"] | now["options"]:
        old, value = (x["options"].get(name) for x in (then, now))
        if old != value:
            raise ValueError(
                f"{path}: this work was begun with {name} {old}, not {value}: "
                "use the same options, or start anew with --force"
            )
    for name in ("corpus", "tokenizer"):
        if then[name] != now[name]:
            raise ValueError(
                f"{path}: the {name} has changed since this work was begun: "
                "start anew with --force"
            )


# read the note
def _read_note(path):
    """The note of unfinished work, checked."""
    try:
        note = read_json(path, 1 << 24)
        place = Origin(**note["next"])
        counts = [*place, note["val_tokens"]]
        counts += [count for _, count in note["shards"]]
        if not all(type(x) is int and 0 <= x < 2**63 for x in counts):
            raise ValueError("counts must be whole numbers")
        names = [name for name, _ in note["shards"]]
        if not all(OURS.fullmatch(name) for name in names):
            raise ValueError("a shard must be named train or val")
        then = note["conditions"]
        if not isinstance(then["options"], dict):
            raise ValueError("options must be named")
        _ = then["corpus"], then["tokenizer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the note of unfinished work ({error}): start anew "
            "with --force"
        ) from None
    return note | {"next": place}


def _write_note(path, note):
    note = note | {"next": note["next"]._asdict()}
    write_whole(path, json.dumps(note).encode())


# is the folder ours?
def shards_folder(path, force=False):
    """Make or take up a folder for shards; returns it as a Path.

    A folder is taken up when it is empty, holds unfinished work, or `force`
    is given. Raises FileExistsError otherwise.

    Derived in chapter 4.11.
    """
    return own_folder(path, force or Path(path, NOTE).exists())


def _clear(folder, *kept):
    """Remove all that is ours but what has one of these names."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


# how it goes on
def _note_of(folder, sources, encoding, options, force):
    """The note to go on from: that of the folder, or a new one."""
    path, now = folder / NOTE, conditions(sources, encoding, options)
    if path.exists() and not force:
        note = _read_note(path)
        _check_conditions(path, note, now)
        if note["next"].source >= max(1, len(sources)):
            raise ValueError(f"{path}: no source {note['next'].source}")
        for name, count in note["shards"]:
            if shard_length(folder / name) != count:
                raise ValueError(
                    f"{folder / name} must have {count} tokens: start anew "
                    "with --force"
                )
        _clear(folder, NOTE, *KEPT, *(name for name, _ in note["shards"]))
        return note
    val = _validation(sources, encoding, options)
    note = {"conditions": now, "val_tokens": val, "shards": []}
    note["next"] = START
    _write_note(path, note)  # before old shards go: what is left is no whole
    _clear(folder, NOTE)
    return note


# the tokens of validation
def _validation(sources, encoding, options):
    if options["val_tokens"]:
        return options["val_tokens"]
    blocks = encoded(sources, encoding, options, workers=1)
    stream, count = _Stream(blocks), 0
    while count < 327_680 and stream.more():
        count += len(stream.take(327_680 - count))
    if not count:
        raise ValueError("there is no text in the corpus")
    return len(split(np.empty(count, np.uint8))[1])


# what is reported
class Encoded(NamedTuple):
    """How far `write_shards` is.

    read: of the sum of the sources' sizes. documents, characters: encoded.
    tokens: written or about to be. shards: [name, tokens] of each file.

    Derived in chapter 4.11.
    """

    read: int
    documents: int
    characters: int
    tokens: int
    shards: list


# write the shards
def write_shards(
    folder, sources, encoding, options, force=False, workers=0, blocks=encoded
):
    """Encode a corpus into shards; yields an `Encoded` as it goes on.

    folder: from `shards_folder`. sources: a list of `Source`. options: a
    dict with at least limit (characters, 0 for all), shard_tokens and
    val_tokens (0: a tenth, at most 32,768); endoftext: as for `encode_text`.
    force: start anew. workers: threads, 0 for one a core. blocks: `encoded`,
    or what gives the same. Unfinished work is gone on with, and the files
    are those of an uninterrupted run. The folder is locked meanwhile. Raises
    ValueError or OSError.

    Derived in chapter 4.11.
    """
    _check_options(options)
    options = json.loads(json.dumps(options, default=np.generic.item))
    with Lock(folder) as lock:
        folder = shards_folder(folder, force)  # nobody has filled it since
        work = sources, encoding, options
        note = _note_of(folder, *work, force)
        place = note["next"]
        stream = _Stream(blocks(*work, place, workers), place)
        yield from _written(folder, lock, encoding, options, note, stream)


# shard by shard
def _written(folder, lock, encoding, options, note, stream):
    keep_encoding(encoding, folder)
    while stream.more():
        size = _size_of_next(note, options["shard_tokens"])
        tokens, filled = np.empty(size, token_dtype(encoding.n_vocab)), 0
        while filled < size and stream.more():
            part = stream.take(size - filled)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            yield _progress(stream, note, filled)
        name = _name_of_next(note, size, not stream.more())
        lock.check(hold=True)
        write_shard(folder / name, tokens[:filled], encoding.n_vocab)
        note["shards"].append([name, filled])
        note["next"] = stream.place
        _write_note(folder / NOTE, note)
    yield _progress(stream, note, 0)
    _check_end(folder, note)
    (folder / NOTE).unlink()


# what is done
def _progress(stream, note, filled):
    total = filled + sum(count for _, count in note["shards"])
    return Encoded(*stream.counts, total, note["shards"])


# the next shard
def _size_of_next(note, shard_tokens):
    """The tokens of the next shard, at most; (4.11.1)."""
    left = note["val_tokens"] - sum(n for _, n in note["shards"])
    return min(left, shard_tokens) if left > 0 else shard_tokens


def _name_of_next(note, size, last):
    """train.bin or val.bin if it is the only one, else with a number."""
    written = sum(count for _, count in note["shards"])
    part = "val" if written < note["val_tokens"] else "train"
    number = sum(name.startswith(part) for name, _ in note["shards"])
    only = size == note["val_tokens"] if part == "val" else last
    if only and number == 0:
        return f"{part}.bin"
    return f"{part}_{number:06}.bin"


# what makes no sense
def _check_options(options):
    for name, least, below in (
        ("shard_tokens", 1, 2**31),
        ("val_tokens", 0, 2**63),
        ("limit", 0, 2**63),
    ):
        check_int(name, options[name], least, below)


def _check_end(folder, note):
    total = sum(count for _, count in note["shards"])
    if total <= note["val_tokens"]:
        _clear(folder)
        raise ValueError(
            f"the corpus has {total:,} tokens, all of them for validation "
            f"({note['val_tokens']:,}): none is left to train on"
        )
