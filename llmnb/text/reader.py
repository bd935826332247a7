# Written by `make export` from notebooks/4_practice/07_reading.py: edit that file.

"""Text from files that strangers send: packed, encoded, broken."""

__all__ = [
    "BLOCK", "LINE", "NotText", "Tally", "check_text", "in_blocks",
    "is_json_lines", "open_stream", "passing_over", "read_documents",
    "read_lines", "read_record", "read_records", "read_text", "text_blocks",
    "text_of",
]


# imports of the reader
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


# zstd, read in small bites
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


# open a file
@contextlib.contextmanager
def open_stream(path):
    """Open a file for reading bytes, unpacked if it ends in .gz or .zst.

    Gives (stream, raw): the bytes, and the file itself, whose tell() says
    how much of it is read. Raises ValueError, naming the file and the byte,
    when it is damaged or ends early, and when it is no regular file;
    ImportError when it takes the package zstandard, and there is none.

    Derived in chapter 4.7.
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


# text, block by block
class NotText(ValueError):
    """A file that holds something else than text.

    Derived in chapter 4.7.
    """


BLOCK = 1 << 20  # bytes that are read at once


def text_blocks(path, stream):
    """Yield the text of a stream, decoded in blocks.

    path: of its file, whose name and first lines say how it is
    encoded. Raises NotText, naming the file and the byte.

    Derived in chapter 4.7.
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
    """The whole text of a file, plain or packed; NotText when it has none.

    Derived in chapter 4.7.
    """
    with open_stream(path) as (stream, _):
        return "".join(text_blocks(path, stream))


# the encoding of a file
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


# the record in a line
LINE = 1 << 24  # bytes of a line of JSON, at most


def read_record(where, line):
    """The JSON object in a line of bytes, a dict.

    Raises ValueError, naming `where`, for anything else, and for a line of
    more than 16 MB.

    Derived in chapter 4.7.
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


# the text of a record
def text_of(where, record, field):
    """The text in a field of a record, or ValueError, naming `where`.

    Derived in chapter 4.7.
    """
    if field not in record:
        got = ", ".join(repr(name[:30]) for name in [*record][:9])
        raise ValueError(f"{where}: must have a field {field!r}, got {got}")
    return check_text(f"{where}: {field!r}", record[field])


def check_text(where, text):
    """A text, or ValueError when it is none or has half a character.

    Derived in chapter 4.7.
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

    where: "path:number", for messages. Of a line of more than 16 MB only
    the beginning is given, which `read_record` refuses.

    Derived in chapter 4.7.
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


# what was passed over
class Tally:
    """Counts what is passed over in reading, and `<|endoftext|>`.

    Derived in chapter 4.7.
    """

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
    """Note a file that has no text or cannot be read, and go on.

    Derived in chapter 4.7.
    """
    try:
        yield
    except NotText:
        tally.note("not text", path)
    except (FileNotFoundError, PermissionError):
        tally.note("not readable", path)


# records of JSON lines
def is_json_lines(path):
    """Whether a file has JSON lines, by its name.

    Derived in chapter 4.7.
    """
    return bool(re.search(r"\.jsonl(\.gz|\.zst)?$", Path(path).name.lower()))


def read_records(path, stream, take, skip_bad=False, tally=None):
    """Yield (where, take(where, record)) for a stream of JSON lines.

    take: a function that raises ValueError for a record that is not as it
    should be. skip_bad: pass over bad lines and note them in the `Tally`;
    else ValueError is raised, naming the line.

    Derived in chapter 4.7.
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


# the documents of a file
def in_blocks(text):
    """A text in memory, in blocks.

    Derived in chapter 4.7.
    """
    return (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def read_documents(path, stream, field, skip_bad=False, tally=None):
    """Yield (where, blocks) for each document of a stream: its text.

    A file of JSON lines has a document a line, in the field `field`; any
    other file is one document. skip_bad, tally: as for `read_records`.

    Derived in chapter 4.7.
    """
    if not is_json_lines(path):
        yield path, text_blocks(path, stream)
        return
    take = partial(text_of, field=field)
    for where, text in read_records(path, stream, take, skip_bad, tally):
        yield where, in_blocks(text)
