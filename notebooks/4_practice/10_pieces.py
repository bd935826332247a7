# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.documents: "Documents of any source, cut where their encoding allows."
# ---

# %% [markdown]
# # Pieces: where a text may be cut
#
# > A document of any size is encoded in pieces, cut where no token can stand,
# > so that the tokens are those of the whole. A proof, and a check of it.
#
# *Reading time: 15 minutes. You need: the expression of
# [chapter 1.2](../1_by_hand/02_tokens.ipynb), and the reader of
# [chapter 4.7](07_reading.ipynb).*

# %% [markdown]
# ## Where we are
#
# [Chapter 4.8](08_corpora.ipynb) loads all documents before it encodes them.
# That is right for ten megabytes and wrong for a hundred gigabytes: the memory
# does not hold them. This chapter keeps the tokens and changes what is in
# memory: a piece at a time. At its end you can
#
# - say where a text may be cut so that the tokens do not change, and prove it;
# - catch a cut that is one character off;
# - say what is refused, and why a bound on memory must refuse something.

# %% imports of the pieces tags=["export"]
import hashlib
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llmnb.text import corpus
from llmnb.text.reader import (
    Tally,
    in_blocks,
    is_json_lines,
    open_stream,
    passing_over,
    read_documents,
    text_blocks,
)

# %% [markdown]
# ## Setup

# %% setup
import gzip
import json
import os
import random
import tempfile

from llmnb.book.verify import verdict
from llmnb.text.tokenizer import train

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## By hand
#
# `hush, the rushes` has the words `hush` `,` `␣the` `␣rushes`. Cut it behind
# `hu`: the parts have the words `hu` and `sh`, and no merge can bring them
# together. Cut it behind the comma: `hush` `,` and `␣the` `␣rushes`, the words
# of the whole. Cut it behind the blank after the comma: `hush` `,` `␣` and
# `the` `␣rushes`; the blank has become a word of its own.
#
# ## Where may a text be cut?
#
# A document of a gigabyte must be encoded in pieces. We want cuts $p$ with
#
# $$ \mathrm{encode}(x_{<p}) \mathbin{\Vert} \mathrm{encode}(x_{\ge p})
#    = \mathrm{encode}(x) . \tag{4.10.1} $$
#
# Merges never leave a word, so it is enough that the *words* of the two parts
# are the words of the whole. Recall the pattern: a word is an ending such as
# `'s`; or a run of letters, of digits or of other signs, each with one space
# before it if there is one; or a run of blanks.

# %% [markdown]
# **Claim.** Every place where a character that is no blank is followed by a
# blank satisfies (4.10.1).
#
# *It is a border of the whole.* A word that held both characters would hold a
# blank after something else. But in a word that is not all blanks, the one
# blank comes first. So no word crosses $p$.
#
# *The left part has the same words.* The expression is matched from left to
# right, and a match could differ only if it looked at a character behind $p$.
# A run of letters, digits or signs that reaches $p$ stops there in the whole
# because a blank follows, and in the left part because the text ends. An
# ending such as `'s` needs a letter after the apostrophe, and there is none
# behind $p$ in either. The one part that looks ahead, `\s+(?!\S)`, belongs to
# a run of blanks; all such runs end before $p - 1$, and what they look at is
# at most the character $p - 1$, which both have.
#
# *The right part has the same words.* The expression never looks back, and in
# the whole a match begins at $p$. From there both see the same text.
#
# The tokenizers of Parts 1 to 4 all use this pattern, so the claim serves them
# all. Those of [chapter 5.8](../5_modern/08_tokenizers.ipynb) have other rules:
# Llama 3's takes `.` and the line break behind it as one word. There a cut,
# one in a million characters, may change the tokens beside it.
#
# What is a blank? The `\s` of tiktoken's pattern and that of Python's `re`
# differ in a few control characters. We cut before a space or a line break
# only, blanks for both, and after what Python counts as no blank, which leaves
# out all that either calls one.

# %% cut a text tags=["exporti"]
PIECE = 1 << 20  # characters that are encoded at once, about
UNCUT = 1 << 24  # characters without a place to cut, at most
SAFE = re.compile(r"\S(?=[ \n])")


def _last_cut(text, start):
    """The last safe place to cut behind `start`, or 0; the end is tried."""
    for low in (max(start, len(text) - 4096), start):
        places = [match.end() for match in SAFE.finditer(text, low)]
        if places:
            return places[-1]
    return 0


# %% cut a document into pieces tags=["exporti"]
def _cut(where, blocks):
    """Yield (is it the first, text): a document, cut where (4.10.1) holds."""
    first, held, searched = True, "", 0
    for block in blocks:
        held += block
        if len(held) < PIECE:
            continue
        if place := _last_cut(held, searched):
            yield first, held[:place]
            first, held, searched = False, held[place:], 0
        else:
            searched = len(held) - 1
        if len(held) > UNCUT:
            raise ValueError(
                f"{where}: a blank must come within {UNCUT:,} characters, and "
                "a word within as many blanks"
            )
    if held:
        yield first, held


# %% [markdown]
# Is the claim true? Take texts full of blanks, apostrophes and accents, cut
# each at *every* safe place, and compare. A cut one character further on must
# be caught.

# %% every safe cut of many texts
rng = random.Random(17)
LETTERS = "aest  \n\n\t'09.,é中🙂\u00a0\x1c"
texts = ["".join(rng.choices(LETTERS, k=60)) for _ in range(2000)]
encoding = train("the tests' state, as these seas. " + LETTERS * 3, 290)
encode = encoding.encode_ordinary


def cuts_agree(texts, shift=0):
    for x in texts:
        for match in SAFE.finditer(x):
            p = match.end() + shift
            if encode(x[:p]) + encode(x[p:]) != encode(x):
                return False
    return True


print(sum(len(SAFE.findall(x)) for x in texts), "safe cuts")
verdict("safe cuts", cuts_agree(texts), "tokens of the whole")
verdict("one further", not cuts_agree(texts, shift=1), "is caught")

# %% [markdown]
# What if no safe place comes? A table of numbers without blanks, an image in
# base64, a file of empty lines. The text held back grows until it has 16
# million characters; then the file is refused in one sentence. No bound would
# mean no bound on memory.

# %% a text without a blank
from llmnb.text.documents import sources

(folder / "table.csv").write_text("1234567," * (UNCUT // 8 + 200_000))
try:
    list(sources([folder / "table.csv"])[0].pieces())
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Sources
#
# A **source** is a file, or one of the built-in corpora. It gives its pieces,
# again and again the same, and a *mark* that changes when its content does: of
# a file its size and the time of its last change, since hashing a hundred
# gigabytes would take minutes.


# %% the pieces of a source tags=["export"]
class Source(NamedTuple):
    """A file, or a corpus in memory, that is read in pieces.

    name: a path, or the corpus's name. size: bytes on the disk, or
    characters. mark: a str that changes with the content. pieces: a function
    that yields (first, text, position): whether a document begins, text,
    and how much of `size` is read. tally: notes `<|endoftext|>` in what is
    taken of it.
    """

    name: str
    size: int
    mark: str
    pieces: object
    tally: Tally


# %% [markdown]
# In a folder, files that are no text are passed over and counted, as in
# [chapter 4.8](08_corpora.ipynb). That must be known before the first piece of
# a file is used, and so such a file is decoded twice. Decoding is much faster
# than encoding. (Work that is taken up again counts what it reads itself.)


# %% the pieces of a file tags=["exporti"]
def _file_pieces(path, named, *how):
    """Yield (first, text, position) for a file; `how` ends with the tally.

    A file in a folder, which nobody has named, gives nothing when it is no
    text.
    """
    if not named and not _is_text(path, how[-1]):
        return
    with open_stream(path) as (stream, raw):
        for where, blocks in read_documents(path, stream, *how):
            for first, piece in _cut(where, blocks):
                yield first, piece, raw.tell()


def _is_text(path, tally):
    """Whether a file can be read to its end; notes it if not."""
    with passing_over(path, tally), open_stream(path) as (stream, _):
        if not is_json_lines(path):
            for _ in text_blocks(path, stream):
                pass
        return True
    return False


def _file_source(path, named, how):
    """The `Source` of a file; how: field, skip_bad and tally."""
    info = path.stat()
    mark = f"{path} {info.st_size} {info.st_mtime_ns}"
    pieces = partial(_file_pieces, path, named, *how)
    return Source(str(path), info.st_size, mark, pieces, how[-1])


# %% a corpus in memory tags=["exporti"]
def _memory_source(name, tally):
    documents = corpus.load_corpus(name)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()

    def pieces():
        position = 0
        for text in documents:
            position += len(text)
            for first, piece in _cut(name, in_blocks(text)):
                yield first, piece, position

    return Source(name, sum(map(len, documents)), digest, pieces, tally)


# %% the sources of a corpus tags=["export"]
def sources(names, field="text", skip_bad=False, tally=None):
    """The `Source`s of a corpus, in order: a list.

    names: stdlib, tinyshakespeare, or paths of files and folders, which are
    read in the order of names. Files that end in .jsonl, .jsonl.gz or
    .jsonl.zst have a document a line, in the field `field`; any other file,
    unpacked when it ends in .gz or .zst, is a document. Files in folders
    that are no text are passed over, and noted in `tally`, a `Tally`, when
    they are read; with skip_bad, bad lines too. Raises FileNotFoundError,
    or ValueError for a pipe or a device.
    """
    found, tally = [], tally or Tally()
    how = field, skip_bad, tally
    for name in names:
        if name in ("stdlib", "tinyshakespeare"):
            found.append(_memory_source(name, tally))
            continue
        for path, named in corpus.files_of(Path(name), tally):
            with nullcontext() if named else passing_over(path, tally):
                found.append(_file_source(path, named, how))
    return found


# %% three kinds of file, one text
text = "".join(rng.choices("aeiou tnsr\n", k=3_000_000))
(folder / "a.txt").write_text(text, "utf-8", newline="")
(folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
record = json.dumps({"text": text})
(folder / "a.jsonl").write_text(record + "\n")
for name in ("a.txt", "a.txt.gz", "a.jsonl"):
    (source,) = sources([folder / name])
    pieces = [piece for _, piece, _ in source.pieces()]
    print(f"{name:<9} {len(pieces)} pieces of {max(map(len, pieces)):,}")
    verdict(name, "".join(pieces) == text, "nothing is lost")

# %% [markdown]
# ## Take away
#
# - A text may be cut where a blank follows something that is no blank. No word
#   crosses there, and nothing to the left looks further.
# - Every bound on memory refuses something; say what, and what to do.
# - A source is read again and again and gives the same pieces each time.
#
# ## Design note
#
# Why not hand the encoder whole documents and be done, since few are large?
# Because the one that is large comes on the second day. And why is a piece not
# cut at line breaks alone, which are easier to see? They would do for most
# texts, and a JSON file of one line would be refused.

# %% [markdown]
# ## Exercises
#
# **1** (★). A place between two blanks would be safe only sometimes. Find a
# text of four characters for which it is not.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Three blanks and a `b`: the words are `␣␣` and `␣b`, and a cut behind the first
# blank makes them `␣`, `␣` and `␣b`. (So with three line breaks and a letter.) Two
# blanks may be parted: `a␣␣b` has the words `a`, `␣` and `␣b`, cut or not.
# :::

# %% exercise 1, checked tags=["hide-cell"]
import regex

from llmnb.text.bpe import WORDS


def cut_is_safe(x, p):
    parts = regex.findall(WORDS, x[:p]) + regex.findall(WORDS, x[p:])
    return parts == regex.findall(WORDS, x)


unsafe = [not cut_is_safe(x, p) for x, p in (("   b", 1), ("\n\n\na", 1))]
verdict("exercise 1", all(unsafe) and cut_is_safe("a  b", 2), "not always")

# %% [markdown]
# ## Further reading
#
# - [tiktoken](https://github.com/openai/tiktoken): its tests of stable
#   encodings treat the related question of what a text may still become when
#   more follows.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.10")
