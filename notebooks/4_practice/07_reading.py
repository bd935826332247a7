# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.reader: "Text from files that strangers send: packed, encoded, broken."
#       text.tokenizer: "Tokenizers: learnt, kept in a file, GPT-2's own; and any text encoded."
# ---

# %% [markdown]
# # Reading what strangers send
#
# > Text packed, broken, endless or made to do damage: read in blocks, checked,
# > and named by line and byte where it is wrong. And tokenizers, kept in
# > files.
#
# *Reading time: 30 minutes. You need: [chapter
# 1.2](../1_by_hand/02_tokens.ipynb) and [chapter 4.1](01_files.ipynb).*

# %% [markdown]
# ## Where we are
#
# Part 1 learned from a text that lay ready. Yours lies in files, and files
# come in many kinds, some of them bad. At the end of this chapter you can
#
# - read a compressed file from a stranger without trusting its sizes;
# - say how much memory a bomb can take from this reader, and why no more;
# - keep a tokenizer in a file, and refuse a damaged one;
# - encode a million blanks in a row.

# %% [markdown]
# ## Setup

# %% setup
import gzip
import os
import random
import tempfile
import tracemalloc
from pathlib import Path

from llmnb.book.verify import verdict

folder = Path(tempfile.mkdtemp())


def complaint(function, *args):
    try:
        function(*args)
    except (ValueError, TypeError, OSError) as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    raise AssertionError("no complaint")


# %% [markdown]
# ## Four rules
#
# A text comes as a file of its own or as a line of **JSON lines** (a JSON
# object a line, the text in one of its fields), plain or compressed with gzip
# or zstd. Each can be damaged, and some are made to do damage: a *bomb* is a
# compressed file of kilobytes that unpacks to gigabytes. Four rules keep us
# safe.
#
# - Only a regular file is opened. A pipe that nobody writes to would be waited
#   for, and some devices never end.
# - Nothing is unpacked whole. We ask for a block of a given size, use it, and
#   ask again; a bomb is then a long text and no more.
# - A line has at most 16 MB. JSON of that size can take half a gigabyte once
#   it is Python objects, and longer documents belong in files of their own.
# - What is wrong is said with the place: the file, and the line or the byte.
#
# gzip is in the standard library, and its reader returns as many bytes as are
# asked for. The zstandard package has two readers. One is bounded, but takes a
# file that ends early for a file that ends. The other knows the end of a frame
# but returns all that its input yields. A frame is made of blocks of at most
# 128 KB, and each takes four bytes of input or more, so that $n$ bytes of
# input yield at most
#
# $$ \lfloor n / 4 \rfloor \cdot 128\ \text{KB} \tag{4.7.1} $$
#
# and 1,024 bytes at a time at most 32 MB. We take the second reader and feed
# it so. Its window, the part of the output that later blocks may refer to, is
# limited to 128 MB. A header may ask for more, up to what `zstd --long=31`
# makes, 2 GB; that file is whole, and we say so, with what to do.

# %% imports of the reader tags=["export"]
import codecs
import contextlib
import gzip
import io
import json
import re
import tokenize
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from llmnb.files import check_regular, package
from llmnb.text.bpe import EOT

# %% zstd, read in small bites tags=["exporti"]
WINDOW = 1 << 27  # bytes that a zstd frame may refer back to, at most


class _Zstd(io.RawIOBase):
    """The bytes of a zstd file; EOFError when it is damaged."""

    def __init__(self, raw):
        zstandard = package("zstandard", "zstd", raw.name)
        self.parts, self.ready = _unpacked(raw, zstandard), memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            part = next(self.parts, None)
            if part is None:
                return 0
            self.ready = memoryview(part)
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _unpacked(raw, z):
    """Yield the bytes of a zstd file in parts, frame after frame."""
    packed = raw.read(1024)  # (4.7.1)
    while packed:
        packed += raw.read(18)  # a frame's header has no more
        frame = z.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
        try:
            window = z.get_frame_parameters(packed).window_size
            if window > WINDOW:
                raise ValueError(
                    f"{raw.name} has a zstd window of {window:,} bytes, at "
                    f"most {WINDOW:,} are taken: unpack it with `zstd -d "
                    "--long=31`, and pack it again with at most --long=27"
                )
            while not frame.eof:
                if not packed:
                    raise EOFError("the file ends within a zstd frame")
                yield frame.decompress(packed)
                packed = frame.unused_data or raw.read(1024)
        except z.ZstdError as error:
            raise EOFError(f"{error}") from None


# %% open a file tags=["export"]
@contextlib.contextmanager
def open_stream(path):
    """Open a file for reading bytes, unpacked if it ends in .gz or .zst.

    Gives (stream, raw): the bytes, and the file itself, whose tell() says
    how much of it is read. Raises ValueError, naming the file and the byte,
    when it is damaged or ends early, and when it is no regular file;
    ImportError when it takes the package zstandard, and there is none.
    """
    suffix = Path(path).suffix.lower()
    check_regular(path)
    with open(path, "rb") as raw:
        stream = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".zst":
            stream = io.BufferedReader(_Zstd(raw), 1 << 17)
        try:
            yield stream, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: damaged near byte {raw.tell():,}: {error}"
            ) from None


# %% [markdown]
# Text is decoded block by block. The decoder keeps the bytes of a character
# that a block cuts in two, and another one around it makes every line end
# `\n`, whatever the system that wrote it.
#
# A Python source may name another encoding than UTF-8 in its first lines. Not
# every name will do: Python's codecs include `rot13`, which decodes no bytes,
# `undefined`, which always fails, and `punycode`, whose time is quadratic. So
# there is a list of those that are encodings of text files.


# %% text, block by block tags=["export"]
class NotText(ValueError):
    """A file that holds something else than text."""


BLOCK = 1 << 20  # bytes that are read at once


def text_blocks(path, stream):
    """Yield the text of a stream, decoded in blocks.

    path: of its file, whose name and first lines say how it is
    encoded. Raises NotText, naming the file and the byte.
    """
    decoder = codecs.getincrementaldecoder(_codec_of(path))()
    decoder, seen = io.IncrementalNewlineDecoder(decoder, True), 0
    block = b"-"
    while block:
        block = stream.read(BLOCK)
        seen += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = seen - len(error.object) + error.start
            raise NotText(
                f"{path} must be UTF-8 text, got "
                f"{error.object[error.start]:#04x} at byte {place:,}"
            ) from None
        if "\0" in text:
            raise NotText(f"{path} must be UTF-8 text, got a zero byte")
        yield text


def read_text(path):
    """The whole text of a file, plain or packed; NotText when it has none."""
    with open_stream(path) as (stream, _):
        return "".join(text_blocks(path, stream))


# %% the encoding of a file tags=["exporti"]
CODECS = re.compile(
    "utf-8(-sig)?|ascii|iso8859-[0-9]+|cp(125[0-8]|437|850|866|932|949|950)"
    "|koi8-[rtu]|euc_(jp|kr)|shift_jis|gb(k|2312|18030)|big5"
)


def _codec_of(path):
    """UTF-8, or what the first lines of a .py file declare."""
    if Path(path).suffix != ".py":
        return "utf-8-sig"
    with open(path, "rb") as file:
        try:
            name = tokenize.detect_encoding(lambda: _short_line(file))[0]
        except (SyntaxError, LookupError, UnicodeError):  # of the codec's
            raise NotText(f"{path} must be UTF-8 text") from None
    name = codecs.lookup(name).name
    if not CODECS.fullmatch(name):
        raise NotText(f"{path} must be UTF-8 text, it declares {name}")
    return name


def _short_line(file):
    """The beginning of a line, without characters that are cut in two."""
    return file.readline(1 << 12).decode("utf-8", "ignore").encode()


# %% the record in a line tags=["export"]
LINE = 1 << 24  # bytes of a line of JSON, at most


def read_record(where, line):
    """The JSON object in a line of bytes, a dict.

    Raises ValueError, naming `where`, for anything else, and for a line of
    more than 16 MB.
    """
    if len(line) > LINE:
        raise ValueError(f"{where}: a line must have at most {LINE:,} bytes")
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


# %% the text of a record tags=["export"]
def text_of(where, record, field):
    """The text in a field of a record, or ValueError, naming `where`."""
    if field not in record:
        got = ", ".join(repr(name[:30]) for name in [*record][:9])
        raise ValueError(f"{where}: must have a field {field!r}, got {got}")
    return check_text(f"{where}: {field!r}", record[field])


def check_text(where, text):
    """A text, or ValueError when it is none or has half a character."""
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


# %% [markdown]
# A bomb: 256 MiB of blanks in a quarter of a megabyte of gzip, and what it costs
# to read it to the end.

# %% a bomb
part = gzip.compress(b" " * (1 << 24), mtime=0)
(folder / "bomb.txt.gz").write_bytes(part * 16)  # parts follow one another
tracemalloc.start()
with open_stream(folder / "bomb.txt.gz") as (stream, _):
    read = sum(
        len(text) for text in text_blocks(folder / "bomb.txt.gz", stream)
    )
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
packed = (folder / "bomb.txt.gz").stat().st_size
verdict("bomb", read > 900 * packed, f"{read:,} characters are read")
verdict("memory", peak < 16 << 20, "never more than 16 MiB")

# %% [markdown]
# A file of empty lines is a bomb too: three hundred megabytes of `\n` are as
# many lines, and taking each of them costs a minute. A run of blank lines is
# counted where it lies in the reader's buffer.


# %% lines of a stream tags=["export"]
def read_lines(path, stream):
    """Yield (where, line) for the lines of a stream that are not blank.

    where: "path:number", for messages. Of a line of more than 16 MB only
    the beginning is given, which `read_record` refuses.
    """
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[3:] + stream.readline(3 * (line[-1:] != b"\n"))
        if line.strip() or len(line) > LINE:
            yield f"{path}:{number}", line
            while len(line) > LINE and line[-1:] != b"\n":
                line = stream.readline(LINE + 1)
        else:
            number += _skip_blank_lines(stream)


def _skip_blank_lines(stream):
    """Read on to the first line that is not blank; returns how many are."""
    count, end = 0, 1
    while end:
        ahead = stream.peek(1)
        blank = len(ahead) - len(ahead.lstrip())
        end = ahead.rfind(b"\n", 0, blank) + 1
        count += ahead.count(b"\n", 0, end)
        stream.read(end)
    return count


# %% [markdown]
# In a folder there is more than text. What cannot be read is passed over, and
# so is a bad record of JSON lines if that is asked for; but it is counted, for
# a corpus that lost half of its files should not look like one that lost none.
# Something else is worth a word. `<|endoftext|>` in a text is ordinary text,
# as the special tokens should come from us alone; yet some corpora part their
# documents with it. So we count these too, and leave the choice to you.


# %% what was passed over tags=["export"]
class Tally:
    """Counts what is passed over in reading, and `<|endoftext|>`."""

    def __init__(self):
        self._counts = {}

    def note(self, what, where, count=1):
        """Note `count` of `what` in a file, instead of an earlier count."""
        self._counts[what, str(where)] = count

    def words(self, endoftext=False):
        """What there is to say, behind a semicolon, or "".

        endoftext: whether `<|endoftext|>` was taken as the token.
        """
        sums = Counter()
        for (what, _), count in self._counts.items():
            sums[what] += count
        times, words = sums.pop(EOT, 0), ""
        if sums:
            each = [f"{what} {n:,}" for what, n in sorted(sums.items())]
            words = f"; passed over: {', '.join(each)}"
        if times and not endoftext:
            words += (
                f"; {EOT} as ordinary text: {times:,} (--endoftext takes it "
                "as the token)"
            )
        return words


@contextlib.contextmanager
def passing_over(path, tally):
    """Note a file that has no text or cannot be read, and go on."""
    try:
        yield
    except NotText:
        tally.note("not text", path)
    except (FileNotFoundError, PermissionError):
        tally.note("not readable", path)


# %% records of JSON lines tags=["export"]
def is_json_lines(path):
    """Whether a file has JSON lines, by its name."""
    return bool(re.search(r"\.jsonl(\.gz|\.zst)?$", Path(path).name.lower()))


def read_records(path, stream, take, skip_bad=False, tally=None):
    """Yield (where, take(where, record)) for a stream of JSON lines.

    take: a function that raises ValueError for a record that is not as it
    should be. skip_bad: pass over bad lines and note them in the `Tally`;
    else ValueError is raised, naming the line.
    """
    bad, tally = 0, tally or Tally()
    for where, line in read_lines(path, stream):
        try:
            found = take(where, read_record(where, line))
        except ValueError as error:
            if not skip_bad:
                how = "(--skip-bad passes over bad records)"
                raise ValueError(f"{error} {how}") from None
            bad += 1
            tally.note("bad records", path, bad)
        else:
            yield where, found


# %% the documents of a file tags=["export"]
def in_blocks(text):
    """A text in memory, in blocks."""
    return (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def read_documents(path, stream, field, skip_bad=False, tally=None):
    """Yield (where, blocks) for each document of a stream: its text.

    A file of JSON lines has a document a line, in the field `field`; any
    other file is one document. skip_bad, tally: as for `read_records`.
    """
    if not is_json_lines(path):
        yield path, text_blocks(path, stream)
        return
    take = partial(text_of, field=field)
    for where, text in read_records(path, stream, take, skip_bad, tally):
        yield where, in_blocks(text)


# %% [markdown]
# Some files, and what is said of them:

# %% five bad files
lines = [b'{"text": "one"}\n', b'{"body": "two"}\n', b'{"text": \n']
whole = gzip.compress(lines[0] * 9, mtime=0)
examples = {
    "field.jsonl": lines[0] + lines[1],
    "json.jsonl": lines[0] + lines[2],
    "bytes.jsonl": lines[0] + b'{"text": "\xff"}',
    "early.jsonl.gz": whole[:-9],
    "picture.txt": b"\x89PNG",
}


def read_all(path):
    with open_stream(path) as (stream, _):
        found = read_documents(path, stream, "text")
        return ["".join(blocks) for _, blocks in found]


for name, raw in examples.items():
    (folder / name).write_bytes(raw)
    print(complaint(read_all, folder / name))

# %% [markdown]
# ## Keep a tokenizer in a file

# %% imports of the tokenizer tags=["export"] module="text.tokenizer"
import base64
import re
from pathlib import Path

import numpy as np

from llmnb.files import read_small, what_is, write_whole
from llmnb.text import bpe
from llmnb.text.bpe import EOT, from_tokens

# %% [markdown]
# Whoever wants a tokenizer, learnt or read, finds it in one module:

# %% what chapter 1.2 has tags=["export"] module="text.tokenizer"
byte, train = bpe.byte, bpe.train

# %% a tokenizer to work with
with open_stream("../../tests/data/library.jsonl.gz") as (stream, _):
    found = read_documents("library.jsonl", stream, "text")
    library = ["".join(blocks) for _, blocks in found]
enc = train(library[:5], 400)
rng = random.Random(2)
letters = "aehnorst  .,'\n\t0123éñß中文字🙂🚢€"
texts = ["".join(rng.choices(letters, k=60)) for _ in range(500)]
verdict("bytes", byte().n_vocab == 257, "and the end of a text")

# %% [markdown]
# `tiktoken` keeps ranks in a text file: a line for each token, its bytes in
# base64 (64 printable characters stand for any bytes), a space, its rank. The
# file holds neither the expression nor the special token; ours are always the
# same. It is written by `write_whole` of [chapter 4.1](01_files.ipynb), so that
# a reader never meets half a vocabulary.


# %% save an encoding tags=["export"] module="text.tokenizer"
def check_special(encoding):
    """Raise ValueError unless the one special token is `<|endoftext|>`.

    And unless every number up to the last is a token's.
    """
    if encoding.special_tokens_set != {EOT}:
        raise ValueError(
            f"save: the one special token must be {EOT}, by custom with the "
            f"last rank, got {sorted(encoding.special_tokens_set)}"
        )
    last, count = encoding.n_vocab - 1, len(encoding.token_byte_values())
    if count < last:
        raise ValueError(f"save: of {last} numbers {count} have a token")


def save(encoding, path):
    """Write an encoding's tokens as a tiktoken rank file.

    encoding: a tiktoken.Encoding that `check_special` accepts. The special
    token is left out where it is the last of all, as it mostly is. The file
    is written beside `path` and renamed into place.
    """
    check_special(encoding)
    last, lines = encoding.n_vocab - 1, []
    for rank in range(last + (encoding.eot_token < last)):
        token = base64.b64encode(encoding.decode_single_token_bytes(rank))
        lines.append(b"%s %d\n" % (token, rank))
    write_whole(path, b"".join(lines))


# %% [markdown]
# A file from elsewhere may be damaged, and a damaged vocabulary that loads
# would train a model on nonsense. So each line is checked, and then the whole:
# every rank from 0 up is there once, every token once, and all 256 bytes.


# %% read one line of a rank file tags=["exporti"] module="text.tokenizer"
def _read_line(where, line):
    """Token and rank of a line, or a ValueError that names the place."""
    fields = line.split()
    if len(fields) != 2:
        raise ValueError(
            f"{where}: a line must be a token and its rank, got {line!r:.99}"
        )
    try:
        token = base64.b64decode(fields[0], validate=True)
    except ValueError:
        raise ValueError(
            f"{where}: the token must be base64, got {fields[0]!r:.99}"
        ) from None
    if not (token and re.fullmatch("[0-9]{1,9}", fields[1])):
        raise ValueError(
            f"{where}: the rank must be a whole number and the token not "
            f"empty, got {line!r:.99}"
        )
    return token, int(fields[1])


# %% load an encoding tags=["export"] module="text.tokenizer"
def load(path):
    """Read a tiktoken rank file into a tiktoken.Encoding.

    The expression is GPT-2's and `<|endoftext|>`, unless it is in the file,
    takes the rank after the last. Raises ValueError, naming the file and the
    line, for a line that is no token and rank, a rank or a token that comes
    twice, a gap in the ranks or a byte that is missing, and for a file of
    more than 16 MiB.
    """
    path = Path(path)
    raw = read_small(path, 1 << 24)
    try:
        tokens = _ranked(path, raw.decode("ascii", "backslashreplace"))
    except ValueError as error:
        what = what_is(path)
        raise ValueError(str(error) + (what and f": {what}")) from None
    return from_tokens(path.stem, tokens)


def _ranked(path, text):
    """The tokens of a rank file, in order of rank."""
    by_rank, seen = {}, set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            token, rank = _read_line(f"{path}:{number}", line)
            if rank in by_rank:
                raise ValueError(f"{path}:{number}: rank {rank} comes twice")
            if token in seen:
                raise ValueError(f"{path}:{number}: {token} comes twice")
            by_rank[rank] = token
            seen.add(token)
    for number in range(256):
        if bytes([number]) not in seen:
            raise ValueError(f"{path}: no token for the byte {number}")
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise ValueError(f"{path}: no token of rank {rank}")
    return [by_rank[rank] for rank in range(len(by_rank))]


# %% save and load
save(enc, folder / "library.tiktoken")
again = load(folder / "library.tiktoken")
kept = all(again.encode_ordinary(t) == enc.encode_ordinary(t) for t in texts)
verdict("load(save(enc))", kept, "encodes as enc does")
lines = (folder / "library.tiktoken").read_text().splitlines()
print(lines[97], lines[256], lines[-1], sep="\n")

# %% [markdown]
# `YQ==` is the letter `a`, byte 97. Some ways to damage the file:

# %% damaged files
damages = [lines[:5] + lines[6:], [*lines, lines[9]], [*lines, "a? 399"]]
for damaged in [*damages, lines[:300] + lines[301:]]:
    (folder / "bad.tiktoken").write_text("\n".join(damaged))
    print(complaint(load, folder / "bad.tiktoken"))

# %% [markdown]
# ## GPT-2's own encoding
#
# OpenAI trained GPT-2 on web pages that Reddit users had linked to. Its
# encoding has 50,000 merges, which with 256 bytes and `<|endoftext|>` make
# 50,257 tokens. `tiktoken` knows where the merges are, fetches them once
# (1.5 MB) and checks their hashes. To use GPT-2's trained weights you need
# GPT-2's tokens, since row $k$ of its token table belongs to token $k$.


# %% GPT-2's encoding tags=["export"] module="text.tokenizer"
def gpt2():
    """GPT-2's encoding: 50,257 tokens, `<|endoftext|>` is number 50,256.

    tiktoken downloads it once and keeps it in the folder that
    TIKTOKEN_CACHE_DIR names, or in a temporary one. Raises ConnectionError
    when the files are neither there nor to be had.
    """
    import tiktoken  # not before it is needed: it takes time

    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ConnectionError(
            "gpt2: tiktoken cannot fetch GPT-2's vocabulary; connect to the "
            "internet once, or name a folder that holds it in "
            "TIKTOKEN_CACHE_DIR"
        ) from error


# %% GPT-2's tokens tags=["nbval-ignore-output"]
try:
    big = gpt2()
    for sentence in ("The dog counts the boats.", "x = np.zeros((4, 4))"):
        parts = [big.decode([i]) for i in big.encode_ordinary(sentence)]
        print(len(sentence), "bytes:", "|".join(parts))
except ConnectionError as error:
    print(error)

# %% [markdown]
# Words common on the web are one token each. Source code, rare among those
# pages, comes out in smaller parts.

# %% [markdown]
# ## A million blanks
#
# A file may hold a million blanks in a row. The expression finds their end by
# trying: `\s+(?!\S)` takes all of them, remembers each as a place to go back
# to, and `tiktoken` gives up when it remembers a million. We need not ask. We
# know the word: it is the run without its last blank, or the whole run where
# the text ends. The expression never looks back, and what it looks at ahead of
# the run is a blank. So a very long run is taken out, its word goes to the
# merges as it is, and the text before it and the text behind the word are
# encoded apart.
#
# A run of $R$ blanks covers a place whose number is a multiple of $R$, so that
# looking at every $R$-th character finds it. Letters, digits and other signs
# need none of this: the end of their runs is found without going back.

# %% long runs of blanks tags=["exporti"] module="text.tokenizer"
SPACES = (  # all that is \s
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
BLANKS = 1 << 16  # blanks in a row that the expression is spared


def _long_words(text):
    """Yield (start, end) of each word made of about BLANKS blanks or more."""
    end = 0
    for i in range(BLANKS - 1, len(text), BLANKS):
        if i < end or text[i] not in SPACES:
            continue
        head = text[max(end, i - BLANKS + 1) : i]
        start = i - len(head) + len(head.rstrip(SPACES))
        end = re.compile(f"[{SPACES}]*").match(text, i).end()
        if end - start >= BLANKS:
            yield start, end - (end < len(text))


# %% what stands before a text tags=["export"] module="text.tokenizer"
def text_start(encoding):
    """The token that a text is read behind.

    `<|endoftext|>`, or another model's token that begins a text.
    """
    begins = getattr(encoding, "bos_token", None)
    return encoding.eot_token if begins is None else begins


def document_start(encoding):
    """The tokens before each of several documents, a list.

    What ends the last one and, where it is another token, `text_start`.
    """
    return [*dict.fromkeys([encoding.eot_token, text_start(encoding)])]


# %% the width of a token tags=["export"] module="text.tokenizer"
def token_dtype(vocab_size):
    """The dtype that tokens are kept in: uint16 up to 65,536, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


# %% encode any text tags=["export"] module="text.tokenizer"
def encode_text(encoding, text, endoftext=False):
    """The tokens of a text, an array of shape (N,), uint32.

    encoding: a tiktoken.Encoding with GPT-2's expression, or one of
    llmnb.formats.foreign. endoftext: take `<|endoftext|>` in the text as
    what stands before a document; else it is ordinary text. A run of a
    million blanks, which tiktoken refuses, has the tokens that its merges
    give.
    """
    parts, before = [], np.array(document_start(encoding), np.uint32)
    spared = hasattr(encoding, "_encode_single_piece")  # tiktoken's alone
    for part in text.split(EOT) if endoftext else [text]:
        place = 0
        for start, end in _long_words(part) if spared else ():
            parts.append(_encode_part(encoding, part[place:start]))
            # tiktoken's own way around the expression
            word = encoding._encode_single_piece(part[start:end])
            parts.append(np.array(word, np.uint32))
            place = end
        parts += [_encode_part(encoding, part[place:]), before]
    return np.concatenate(parts[:-1])


def _encode_part(encoding, text):
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half a character becomes U+FFFD
        return np.array(encoding.encode_ordinary(text), np.uint32)


# %% [markdown]
# Runs short enough for `tiktoken` prove it: with a small $R$, texts full of
# blanks are taken apart at every run, and their tokens must stay as they are.
# Taking the last blank too is caught.


# %% runs taken apart
def runs_agree():
    rng = random.Random(4)
    letters = "ab. \n\t\u3000'   "
    texts = [
        "".join(rng.choices(letters, k=rng.randint(1, 90))) for _ in range(500)
    ]
    return all(
        encode_text(enc, x).tolist() == enc.encode_ordinary(x) for x in texts
    )


kept, BLANKS, right = BLANKS, 2, _long_words
verdict("runs", runs_agree(), "tokens of the whole")


def _long_words(text):
    return [(a, min(b + 1, len(text))) for a, b in right(text)]


verdict("one blank more", not runs_agree(), "is caught")
BLANKS, _long_words = kept, right
blanks = " " * 1_000_000 + "The dog" + "\n" * 1_000_000
ids = encode_text(enc, blanks).tolist()
verdict("two million", enc.decode(ids) == blanks, "decode(encode(x)) == x")

# %% [markdown]
# ## Take away
#
# - Read in blocks, bound every line and every unpacked bite, name the place of
#   what is wrong.
# - What is passed over is counted. Half a corpus should not look like a whole
#   one.
# - A tokenizer's file is checked line by line and then as a whole: a damaged
#   vocabulary that loads would train a model on nonsense.
#
# ## Design note
#
# A library such as `datasets` reads all these formats and more. It also
# unpacks them to the disk, keeps a cache, and converts every record to a table
# first, which is right for work on many data sets. Here one pass over the
# bytes is enough, and the errors can say which byte of which line of which
# file.
#
# ## Exercises
#
# **1** (★★★). (4.7.1) allows 32 MB for a bite of 1,024 bytes. Make the file that
# takes all of it. A zstd frame begins with the bytes `28 b5 2f fd`, a zero, and
# a byte for its window, here `38`, which is 128 KB. A block that repeats one byte
# has four: the sum of its size times 8, of 2, and of 1 for the last block, in
# three bytes with the lowest first; then the byte. What would the second reader
# return for such a file if a bite had a megabyte?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 256 blocks of four bytes, each of 128 KB once it is unpacked. With bites of a
# megabyte a file of a megabyte would come back at once as 262,144 blocks, 32 GB.
# :::

# %% exercise 1, checked tags=["hide-cell"]
size = 128 << 10
blocks = [
    (size * 8 + 2 + (k == 255)).to_bytes(3, "little") for k in range(256)
]
frame = bytes.fromhex("28b52ffd 00 38") + b"".join(x + b"a" for x in blocks)
(folder / "bomb.txt.zst").write_bytes(frame)
with open_stream(folder / "bomb.txt.zst") as (stream, _):
    found = sum(map(len, iter(lambda: stream.read(1 << 20), b"")))
print(f"{len(frame):,} bytes became {found:,}")
verdict("exercise 1", found == len(blocks) * size, "all of (4.7.1)")

# %% [markdown]
# ## Further reading
#
# - [RFC 8878](https://www.rfc-editor.org/rfc/rfc8878), 2021: read section
#   3.1.1 for frames and blocks, from which (4.7.1) follows, and section 7 on
#   what a stranger's file can do.
# - [JSON Lines](https://jsonlines.org/): the format on one page.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.7")
