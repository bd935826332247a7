# Written by `make export` from notebooks/4_practice/10_pieces.py: edit that file.

"""Documents of any source, cut where their encoding allows."""

__all__ = ["Source", "sources"]


# imports of the pieces
import hashlib
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llmnb.text import corpus
from llmnb.text.reader import (
    Tally, in_blocks, is_json_lines, open_stream, passing_over,
    read_documents, text_blocks,
)


# cut a text
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


# cut a document into pieces
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


# the pieces of a source
class Source(NamedTuple):
    """A file, or a corpus in memory, that is read in pieces.

    name: a path, or the corpus's name. size: bytes on the disk, or
    characters. mark: a str that changes with the content. pieces: a function
    that yields (first, text, position): whether a document begins, text,
    and how much of `size` is read. tally: notes `<|endoftext|>` in what is
    taken of it.

    Derived in chapter 4.10.
    """

    name: str
    size: int
    mark: str
    pieces: object
    tally: Tally


# the pieces of a file
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


# a corpus in memory
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


# the sources of a corpus
def sources(names, field="text", skip_bad=False, tally=None):
    """The `Source`s of a corpus, in order: a list.

    names: stdlib, tinyshakespeare, or paths of files and folders, which are
    read in the order of names. Files that end in .jsonl, .jsonl.gz or
    .jsonl.zst have a document a line, in the field `field`; any other file,
    unpacked when it ends in .gz or .zst, is a document. Files in folders
    that are no text are passed over, and noted in `tally`, a `Tally`, when
    they are read; with skip_bad, bad lines too. Raises FileNotFoundError,
    or ValueError for a pipe or a device.

    Derived in chapter 4.10.
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
