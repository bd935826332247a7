# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.shards: "Text of any size turned into shards on all cores."
# ---

# %% [markdown]
# # Any size: a corpus turned into shards
#
# > Text of any size is encoded on all cores in bounded memory, and written so
# > that a kill costs nothing.
#
# *Reading time: 30 minutes. You need: [chapter 4.9](09_shards.ipynb), [chapter
# 4.10](10_pieces.ipynb), and the lock of [chapter 4.1](01_files.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="tokens")

# %% [markdown]
# *Figure 4.11.1. The first box again: text becomes tokens. This time the text
# is larger than the memory and the work takes long.*
#
# The pieces of [chapter 4.10](10_pieces.ipynb) fit into memory. What remains
# is time: one core takes an hour or two for a hundred gigabytes, and a power cut
# near the end loses it all. At the end of this chapter you can
#
# - say why the shards do not depend on the number of cores;
# - bound the memory of the work before it starts;
# - say which five numbers make a long job safe from `kill -9`.

# %% imports of the shard writer tags=["export"]
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

# %% [markdown]
# ## Setup

# %% setup
import gzip
import random
import time
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict
from llmnb.text.documents import sources
from llmnb.text.tokenizer import train

scratch = TemporaryDirectory(ignore_cleanup_errors=True)
folder = Path(scratch.name)
rng = random.Random(17)

# %% [markdown]
# ## By hand
#
# Three documents, "to be", "or" and "not to", with a token for each word and
# `∎` for `<|endoftext|>`, are a stream of eight tokens. Take the first two for
# validation and cut the rest into shards of three:
#
# | token | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
# |---|---|---|---|---|---|---|---|---|
# | text | `∎` | `to` | ` be` | `∎` | `or` | `∎` | `not` | ` to` |
# | file | val | val | train 0 | train 0 | train 0 | train 1 | train 1 | train 1 |
#
# A shard may begin in the middle of a document; the loader does not mind. If
# the work stops after `train 0`, what must be known to go on? That five tokens
# are written, and where the sixth comes from: document 2, from its first
# token. Reading documents 0 and 1 again is not needed.
#
# With $v$ tokens for validation and $s$ tokens a shard, token $t$ of the
# stream goes to
#
# $$ \begin{aligned}
#    t &< v:\ \text{val shard } \lfloor t/s \rfloor , \\
#    t &\ge v:\ \text{train shard } \lfloor (t-v)/s \rfloor .
#    \end{aligned} \tag{4.11.1} $$
#
# So the files depend on the stream, $v$ and $s$, and on nothing else: not on
# the number of cores, not on how often the work was stopped. All that follows
# serves to keep it so.


# %% the table, computed
def shard_of(t, v, s):
    return ("val", t // s) if t < v else ("train", (t - v) // s)  # (4.11.1)


print([shard_of(t, 2, 3) for t in range(8)])

# %% [markdown]
# ## Encode on all cores
#
# Pieces come in order and tokens must leave in order, but in between any core
# may take any piece. `in_order` hands out the work and returns results in the
# order of the items. It reads only as far ahead as keeps every worker busy:
# with $w$ workers at most $2w$ batches wait, so that the memory does not
# depend on the corpus.
#
# Threads or processes? Python runs one thread at a time, unless the work is
# done in compiled code that lets go of the lock, and `tiktoken`'s encoder
# does. Threads share the tokenizer and hand over arrays without copying;
# processes would each load it and send every token through a pipe. We
# measure both, and that decides.


# %% results in the order of the items tags=["export"]
def in_order(function, items, workers):
    """Yield function(item) for all items, in order, computed in threads."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# %% encode a batch of pieces tags=["exporti"]
def _encode(encoding, pieces, endoftext=False):
    """The tokens of (first, text) pieces, each document behind its start."""
    kind = token_dtype(encoding.n_vocab)
    parts, before = [], np.array(document_start(encoding), kind)
    for first, text in pieces:
        if first:
            parts.append(before)
        parts.append(encode_text(encoding, text, endoftext).astype(kind))
    return np.concatenate(parts)


# %% threads and processes, timed tags=["nbval-ignore-output"]
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from llmnb.text.shards import _encode
from llmnb.timing import machine

(library,) = sources(["stdlib"])
pieces = [(first, text) for first, text, _ in library.pieces()][:400]
batches = [pieces[i : i + 20] for i in range(0, len(pieces), 20)]
size = sum(len(text) for batch in batches for _, text in batch) / 1e6
work = partial(_encode, train([x for _, x in pieces[:99]], 1024))
spawn = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
print(machine())
for name, pool, count in (
    ("one thread", ThreadPoolExecutor, 1),
    (f"{cores()} threads", ThreadPoolExecutor, cores()),
    (f"{cores()} processes", spawn, cores()),
):
    with pool(count) as workers:
        list(workers.map(work, batches[:count]))
        start = time.perf_counter()
        list(workers.map(work, batches))
        speed = size / (time.perf_counter() - start)
    print(f"{name:<12} {speed:5.1f} MB a second")

# %% [markdown]
# The threads keep up with the processes here, and they cannot be left behind
# when the program is killed. So it is threads.
#
# ## The stream and its places
#
# Pieces are gathered into **batches** of a million characters or more, for
# short documents are not worth a task each. Every batch knows its **place**:
# the number of its source, the number of its first piece in that source, and
# the documents and characters before it. A token's place is its batch's, and
# the number of tokens in that batch before it, `drop`. Those are the five
# numbers: reading on from a place gives the same batches, so dropping the
# first `drop` tokens gives the rest of the stream.


# %% a place in a corpus tags=["export"]
class Origin(NamedTuple):
    """Where a token of a corpus comes from.

    source, piece: where its batch begins. drop: tokens of the batch before
    it. documents, characters: what lies before the batch.
    """

    source: int = 0
    piece: int = 0
    drop: int = 0
    documents: int = 0
    characters: int = 0


# %% the pieces behind a place tags=["export"]
START = Origin()


def pieces_from(sources, place=START, limit=0):
    """Yield (Origin, first, text, read) from a place on.

    sources: a list of `Source`. limit: end after so many characters of the
    corpus, 0 for all of it; the last piece is cut to fit. read: how much of
    the sizes of all sources is read. Sources before the place are not
    opened.
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


# %% batches of pieces tags=["exporti"]
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


# %% [markdown]
# A limit may cut a piece at any character; nothing follows it, so (4.10.1)
# does not matter there.
#
# The batches are put through the encoder, and the stream that comes out is read
# in portions.


# %% the batches, encoded tags=["export"]
def encoded(
    sources, encoding, options, place=START, workers=0, turns=in_order
):
    """Yield (Origin, counts, tokens) of batches of a corpus from a place on.

    sources, encoding, options, workers: as for `write_shards`. counts: read,
    documents and characters behind the batch, as in `Encoded`. turns:
    `in_order`, or what does its work elsewhere.
    """
    special = options.get("endoftext", False)

    def work(batch):
        place, pieces, counts = batch
        return place, counts, _encode(encoding, pieces, special)

    pieces = pieces_from(sources, place, options["limit"])
    return turns(work, _batches(pieces), workers or cores())


# %% the stream of tokens tags=["exporti"]
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


# %% [markdown]
# ## Write so that a kill costs nothing
#
# A kill may come between any two instructions. The rule that survives it: a
# file is written beside its place and renamed when it is whole, and what we
# *know* is written after what we *did*. So after each shard we write a small
# file, `unfinished.json`: the shards there are, and the place of the next
# token. Killed before the renaming of a shard, we redo it; killed between the
# shard and the note, we redo it too and write the same bytes, by (4.11.1);
# killed after the note, we go on behind it. When all is done the note is
# removed, and a folder without it is finished. Meanwhile the folder is locked,
# as a run's is ([chapter 4.1](01_files.ipynb)): two such jobs would write over
# each other's notes.
#
# The note also holds what the work depends on: the options, a hash of the
# marks of all sources, a hash of the tokenizer. If one has changed, the two
# halves would not fit, and we refuse.

# %% what is noted tags=["exporti"]
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


# %% what the work depends on tags=["export"]
def conditions(sources, encoding, options):
    """What the shards of a corpus depend on, a dict: options, and hashes."""
    marks = (x.mark.encode("utf-8", "surrogatepass") for x in sources)
    single, ranks = encoding.decode_single_token_bytes, encoding.n_vocab - 1
    files = getattr(encoding, "files", {}).values()
    return {
        "options": options,
        "corpus": _digest(marks),
        "tokenizer": _digest(chain(map(single, range(ranks)), files)),
    }


# %% has something changed? tags=["exporti"]
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


# %% [markdown]
# The note is a file like any other and may be damaged, so it is checked before
# it is believed.


# %% read the note tags=["exporti"]
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


# %% is the folder ours? tags=["export"]
def shards_folder(path, force=False):
    """Make or take up a folder for shards; returns it as a Path.

    A folder is taken up when it is empty, holds unfinished work, or `force`
    is given. Raises FileExistsError otherwise.
    """
    return own_folder(path, force or Path(path, NOTE).exists())


def _clear(folder, *kept):
    """Remove all that is ours but what has one of these names."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


# %% how it goes on tags=["exporti"]
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


# %% [markdown]
# Validation gets the first tokens: as many as are asked for, or as in chapter
# 1.3 a tenth of the text but at most 32,768. Whether a tenth is less is known
# when 327,680 tokens have been seen; these are encoded twice.


# %% the tokens of validation tags=["exporti"]
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


# %% what is reported tags=["export"]
class Encoded(NamedTuple):
    """How far `write_shards` is.

    read: of the sum of the sources' sizes. documents, characters: encoded.
    tokens: written or about to be. shards: [name, tokens] of each file.
    """

    read: int
    documents: int
    characters: int
    tokens: int
    shards: list


# %% write the shards tags=["export"]
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


# %% shard by shard tags=["exporti"]
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


# %% what is done tags=["exporti"]
def _progress(stream, note, filled):
    total = filled + sum(count for _, count in note["shards"])
    return Encoded(*stream.counts, total, note["shards"])


# %% the next shard tags=["exporti"]
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


# %% what makes no sense tags=["exporti"]
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


# %% [markdown]
# ## Proof
#
# A folder of files of all kinds becomes shards of 5,000 tokens. Three claims:
# the tokens are those of chapter 4.8; the files do not depend on the
# number of threads; and they do not depend on how often the work was stopped.
# To stop it we leave the generator after a few reports, as a kill would: what
# is on the disk at that moment is all that the next attempt knows. (The tests
# of the package kill real processes, also within the renaming of a file.)

# %% a folder of many kinds
from llmnb.text import corpus, shards
from llmnb.formats.shard import read_shard
from llmnb.text.shards import shards_folder, write_shards

mixed = folder / "mixed"
mixed.mkdir()
for k in range(8):
    words = ["".join(rng.choices("aehst", k=4)) for _ in range(1500)]
    (mixed / f"{k}.txt").write_text(" ".join(words))
    lines = [json.dumps({"text": " ".join(words[:n])}) for n in range(60)]
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)
    (mixed / f"{k}.jsonl.gz").write_bytes(packed)

encoding = train("the tests' state, as these seas. " * 9, 270)
OPTIONS = {"limit": 0, "shard_tokens": 5000, "val_tokens": 0}
shards.BATCH = 20_000  # small, so that there are many
corpora = sources([mixed])


def files_of(name):
    return {x.name: x.read_bytes() for x in sorted((folder / name).iterdir())}


# %% written at once, by one thread and by three
for name, workers in (("one", 1), ("three", 3)):
    out = shards_folder(folder / name)
    reports = list(
        write_shards(out, corpora, encoding, OPTIONS, workers=workers)
    )
print(*[f"{name} {count:,}" for name, count in reports[-1].shards[:3]])
verdict("threads", files_of("one") == files_of("three"), "same files")

# %% the tokens of chapter 4.8
documents = []
for first, text in [x[:2] for s in corpora for x in s.pieces()]:
    documents += [text] if first else []
    documents[-1] += "" if first else text
want = corpus.encode_documents(encoding, documents)
names = [name for name, _ in reports[-1].shards]
got = np.concatenate([read_shard(folder / "one" / name) for name in names])
verdict("tokens", np.array_equal(got, want), "chapter 4.8's")

# %% stopped again and again
attempts = 0
while attempts == 0 or (folder / "stopped" / shards.NOTE).exists():
    out = shards_folder(folder / "stopped")
    work = write_shards(out, corpora, encoding, OPTIONS, workers=2)
    for _ in islice(work, 4 + attempts % 3):
        pass
    work.close()
    attempts += 1
verdict("stopped", attempts > 5, "many times over")
verdict("stopped", files_of("stopped") == files_of("one"), "same files")

# %% [markdown]
# Which of the five numbers could be left out? Try it without `drop`: the next
# attempt then begins at the batch, and writes some tokens twice.


# %% a place without drop
class Forgetful(shards._Stream):
    @property
    def place(self):
        return super().place._replace(drop=0)


kept, shards._Stream = shards._Stream, Forgetful
while (
    not (folder / "wrong").exists()
    or (folder / "wrong/unfinished.json").exists()
):
    out = shards_folder(folder / "wrong")
    work = write_shards(out, corpora, encoding, OPTIONS, workers=2)
    for _ in islice(work, 8):
        pass
    work.close()
shards._Stream = kept
verdict("without drop", files_of("wrong") != files_of("one"), "is caught")

# %% [markdown]
# ## Count it
#
# What is in memory? With $w$ threads at most $2w$ batches wait or are worked
# on. A batch has a million characters, or nearly three million if a long piece
# comes last, and about as many tokens at most, and one shard of $s$ tokens of
# two bytes (four, of a vocabulary over 65,536) is being filled:
#
# $$ \begin{aligned} M \approx {} & 2s + 2w \cdot (\text{1 to 8 MB}) \\
#    & {} + \text{a line of 16 MB} . \end{aligned} \tag{4.11.2} $$
#
# With the default $s = 10^8$ that is 200 MB and little more, for any corpus.
# The time is that of the encoder: $10^{10}$ tokens, some 45 GB of English, at
# the 20 megabytes a second of one thread here take forty minutes of one core's time,
# and the shards are 20 GB on the disk.

# %% memory does not grow tags=["nbval-ignore-output"]
import tracemalloc

for times in (80, 240):
    (folder / "big.txt").write_text("spam and eggs " * 10**4 * times)
    size = (folder / "big.txt").stat().st_size
    (big,) = sources([folder / "big.txt"])
    out = shards_folder(folder / f"memory{times}")
    sizes = OPTIONS | {"shard_tokens": 500_000}
    shards.BATCH = 1 << 20
    tracemalloc.start()
    for _ in write_shards(out, [big], encoding, sizes, workers=2):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{size / 1e6:5.1f} MB of text, {peak / 1e6:4.1f} MB at the peak")

# %% the stream drawn
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(8, 2.4), dpi=100)
BLUE, ORANGE, PALE = (PALETTE[x] for x in ("blue", "orange", "pale"))
rows = (
    (2, [3, 1.2, 2.6, 0.9, 2.3], "documents", [PALE] * 5),
    (1, [4.2, 3.5, 2.3], "batches", [PALE] * 3),
    (0, [1.5, 2.8, 2.8, 2.9], "shards", [ORANGE, BLUE, BLUE, PALE]),
)
for y, widths, label, colours in rows:
    left = np.cumsum([0, *widths[:-1]])
    ax.barh(y, widths, left=left, color=colours, edgecolor="white", height=0.6)
    ax.text(-0.15, y, label, ha="right", va="center")
for x, name in ((0.75, "val"), (2.9, "train 0"), (5.7, "train 1")):
    ax.text(x, 0, name, ha="center", va="center", color="white")
ax.text(8.5, 0, "not yet", ha="center", va="center")
ax.plot([7.1, 7.1], [-0.4, 1.4], color=PALETTE["ink"], lw=2)
arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
ax.annotate("", (7.1, 1.4), (4.2, 1.4), arrowprops=arrow)
ax.text(5.65, 1.45, "drop", ha="center", va="bottom", size=9)
ax.set(xlim=(-1.6, 10.1), ylim=(-0.5, 2.5))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 4.11.2. One stream of tokens, cut three times: by the documents, by
# the batches in which it is encoded, by the shards in which it is kept. The
# borders need not meet. The place to go on from (the thick line) is a batch and the
# number of its tokens that are already in a shard, `drop`.*

# %% [markdown]
# ## Take away
#
# - Threads suffice when the work is in compiled code that lets go of the lock.
# - Write beside and rename; note what is done after it is done. The place of
#   the next token is five numbers, and reading on from it is exact.
# - What the files depend on is written down, and compared before work goes on.
#
# ## Design note
#
# A simpler program gives each worker some of the files and lets it write
# shards of its own. It needs no order and no queue. But then the shards depend
# on the number of workers, each of them leaves a short last shard, and one
# huge file keeps one worker busy while the others rest. One reader and one
# writer with encoders in between cost nothing here, because reading is so much
# faster than encoding; past some ten cores, as [chapter
# 6.4](../6_machines/04_sharing.ipynb) measures for packed JSON lines, the reader
# becomes the limit, and several programs over parts of the corpus are the way out.

# %% [markdown]
# ## Exercises
#
# **1** (★★). A program takes up unfinished work with another number of
# threads. Why are the files the same all the same? Which change of the
# program's constants would break them?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The threads change neither batches nor their order. `BATCH` does change the
# batches, and `drop` counts tokens of a batch; but the batch is read again from
# the place on, so a longer one has the same first tokens, and one that became
# shorter than `drop` is refused. `PIECE` would break them: a place counts
# pieces, and among pieces of another length the same number leads elsewhere in
# a long document.
# :::

# %% exercise 1, checked tags=["hide-cell"]
out = shards_folder(folder / "other")
for batch in (20_000, 1 << 20):
    shards.BATCH = batch
    work = write_shards(out, corpora, encoding, OPTIONS, workers=2)
    for _ in islice(work, 6 if batch == 20_000 else None):
        pass
    work.close()
verdict("exercise 1", files_of("other") == files_of("one"), "same files")

# %% [markdown]
# ## Further reading
#
# - [llm.c](https://github.com/karpathy/llm.c): `dev/data/fineweb.py` writes
#   such shards with a process a core.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.11")
