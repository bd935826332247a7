# Written by `make export` from notebooks/18_shards.py: edit that file.

"""Turn any text into shards.

Text of any size is read in pieces, cut where no token can stand, encoded on
all cores in bounded memory, and written so that a kill costs nothing.
"""

__all__ = [
    "LINE",
    "Source",
    "check_text",
    "open_stream",
    "read_lines",
    "read_record",
    "sources",
    "text_of",
]


# imports of the readers
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import re
import tokenize
import zlib
from pathlib import Path
from typing import NamedTuple

from llmnb import corpus


# cut a text
PIECE = 1 << 20  # characters that are encoded at once, about
RUN = 1 << 24  # characters without a place to cut, at most
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
    """Yield (is it the first, text): a document, cut where (18.2) holds."""
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
        if len(held) > RUN:
            raise ValueError(
                f"{where}: a blank must come within {RUN:,} characters"
            )
    if held:
        yield first, held


# zstd, read in small bites
class _Zstd(io.RawIOBase):
    """The bytes of a zstd file; EOFError when it is damaged."""

    def __init__(self, raw):
        self.raw, self.frame = raw, None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.raw.read(1024)  # (18.3)
            if not self.packed and self.frame:
                raise EOFError("the file ends within a zstd frame")
            if not self.packed:
                return 0
            self._unpack()
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def _unpack(self):
        z = _zstandard()
        if self.frame is None:
            window = z.ZstdDecompressor(max_window_size=1 << 27)
            self.frame = window.decompressobj()
        try:
            self.ready = memoryview(self.frame.decompress(self.packed))
        except z.ZstdError as error:
            raise EOFError(f"{error}") from None
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None


# zstd, if it is there
def _zstandard():
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "to read .zst files install the zstandard package: "
            "pip install 'llmnb[zstd]'"
        ) from None
    return zstandard


# open a file
@contextlib.contextmanager
def open_stream(path):
    """Open a file for reading bytes, unpacked if it ends in .gz or .zst.

    Gives (stream, raw): the bytes, and the file itself, whose tell() says
    how much of it is read. Raises ValueError, naming the file and the byte,
    when it is damaged or ends early, and when zstandard is missing.

    Derived in chapter 18.
    """
    suffix = Path(path).suffix.lower()
    with open(path, "rb") as raw:
        stream = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".zst":
            _zstandard()
            stream = io.BufferedReader(_Zstd(raw), 1 << 17)
        try:
            yield stream, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: damaged near byte {raw.tell():,}: {error}"
            ) from None


# text, block by block
class _NotText(ValueError):
    """A file that holds something else than text."""


def _text_blocks(path, stream):
    """Yield the text of a stream, decoded in blocks."""
    decoder = codecs.getincrementaldecoder(_encoding_of(path))()
    decoder, seen = io.IncrementalNewlineDecoder(decoder, True), 0
    block = b"-"
    while block:
        block = stream.read(PIECE)
        seen += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = seen - len(error.object) + error.start
            raise _NotText(
                f"{path} must be UTF-8 text, got "
                f"{error.object[error.start]:#04x} at byte {place:,}"
            ) from None
        if "\0" in text:
            raise _NotText(f"{path} must be UTF-8 text, got a zero byte")
        yield text


# the encoding of a file
def _encoding_of(path):
    """UTF-8, or what the first lines of a .py file declare."""
    if path.suffix != ".py":
        return "utf-8-sig"
    with open(path, "rb") as file:
        try:
            return tokenize.detect_encoding(lambda: file.readline(1 << 12))[0]
        except SyntaxError:
            raise _NotText(f"{path} must be UTF-8 text") from None


# the record in a line
LINE = 1 << 24  # bytes of a line of JSON, at most


def read_record(where, line):
    """The JSON object in a line of bytes, a dict.

    Raises ValueError, naming `where`, for anything else.

    Derived in chapter 18.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: must be UTF-8, got {line[error.start]:#04x} at byte "
            f"{error.start:,} of the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be JSON: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{where}: must be a JSON object, got {kind}")
    return record


# the text of a record
def text_of(where, record, field):
    """The text in a field of a record, or ValueError, naming `where`.

    Derived in chapter 18.
    """
    if field not in record:
        got = ", ".join(repr(name[:30]) for name in [*record][:9])
        raise ValueError(f"{where}: must have a field {field!r}, got {got}")
    return check_text(f"{where}: {field!r}", record[field])


def check_text(where, text):
    """A text, or ValueError when it is none or has half a character.

    Derived in chapter 18.
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where} must be text, got {kind}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} must be Unicode text, got half a character, "
            f"U+{ord(text[error.start]):04X}, at {error.start:,}"
        ) from None
    return text


# lines of a stream
def read_lines(path, stream):
    """Yield (where, line) for the lines of a stream that are not blank.

    where: "path:number", for messages. Raises ValueError for a line of more
    than 16 MB.

    Derived in chapter 18.
    """
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise ValueError(
                f"{path}:{number}: a line must have at most {LINE:,} bytes"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield f"{path}:{number}", line


# the pieces of a source
class Source(NamedTuple):
    """A file, or a corpus in memory, that is read in pieces.

    name: a path, or the corpus's name. size: bytes on the disk, or
    characters. mark: a str that changes with the content. pieces: a function
    that yields (first, text, position): whether a document begins, text,
    and how much of `size` is read.

    Derived in chapter 18.
    """

    name: str
    size: int
    mark: str
    pieces: object


# the pieces of a file
def _file_pieces(path, field):
    """Yield (first, text, position) for a file of any kind."""
    with open_stream(path) as (stream, raw):
        if _is_json_lines(path):
            for where, line in read_lines(path, stream):
                text = text_of(where, read_record(where, line), field)
                for first, piece in _cut(where, _blocks(text)):
                    yield first, piece, raw.tell()
        else:
            for first, piece in _cut(path, _text_blocks(path, stream)):
                yield first, piece, raw.tell()


def _blocks(text):
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def _is_json_lines(path):
    return re.search(r"\.jsonl(\.gz|\.zst)?$", path.name.lower())


# a file in a folder
def _found_pieces(path, field):
    """The pieces of a file in a folder; none when it is no text."""
    if not _is_json_lines(path):
        try:
            with open_stream(path) as (stream, _):
                for _ in _text_blocks(path, stream):
                    pass
        except _NotText:
            return
    yield from _file_pieces(path, field)


def _file_source(path, field, pieces):
    info = path.stat()
    mark = f"{path} {info.st_size} {info.st_mtime_ns}"
    return Source(str(path), info.st_size, mark, lambda: pieces(path, field))


# a corpus in memory
def _memory_source(name):
    documents = corpus.load(name)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()

    def pieces():
        position = 0
        for text in documents:
            position += len(text)
            for first, piece in _cut(name, _blocks(text)):
                yield first, piece, position

    return Source(name, sum(map(len, documents)), digest, pieces)


# the sources of a corpus
def sources(names, field="text"):
    """The `Source`s of a corpus, in order: a list.

    names: stdlib, tinyshakespeare, or paths of files and folders, which are
    read in the order of names. Files that end in .jsonl, .jsonl.gz or
    .jsonl.zst have a document a line, in the field `field`; any other file,
    unpacked when it ends in .gz or .zst, is a document. Files in folders
    that are no text are passed over. Raises FileNotFoundError.

    Derived in chapter 18.
    """
    found = []
    for name in names:
        path = Path(name)
        if name in ("stdlib", "tinyshakespeare"):
            found.append(_memory_source(name))
        elif path.is_dir():
            for inner in corpus.files_below(path):
                found.append(_file_source(inner, field, _found_pieces))
        elif path.is_file():
            found.append(_file_source(path, field, _file_pieces))
        else:
            raise FileNotFoundError(
                f"there is no corpus and no file called {path}; the corpora "
                "are stdlib and tinyshakespeare"
            )
    return found
