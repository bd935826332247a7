# Written by `make export` from notebooks/4_practice/07_reading.py: edit that file.

"""Tokenizers: learnt, kept in a file, GPT-2's own; and any text encoded."""

__all__ = [
    "byte", "check_special", "document_start", "encode_text", "gpt2", "load",
    "save", "text_start", "token_dtype", "train",
]


# imports of the tokenizer
import base64
import re
from pathlib import Path

import numpy as np

from llmnb.files import read_small, what_is, write_whole
from llmnb.text import bpe
from llmnb.text.bpe import EOT, from_tokens


# what chapter 1.2 has
byte, train = bpe.byte, bpe.train


# save an encoding
def check_special(encoding):
    """Raise ValueError unless the one special token is `<|endoftext|>`.

    And unless every number up to the last is a token's.

    Derived in chapter 4.7.
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

    Derived in chapter 4.7.
    """
    check_special(encoding)
    last, lines = encoding.n_vocab - 1, []
    for rank in range(last + (encoding.eot_token < last)):
        token = base64.b64encode(encoding.decode_single_token_bytes(rank))
        lines.append(b"%s %d\n" % (token, rank))
    write_whole(path, b"".join(lines))


# read one line of a rank file
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


# load an encoding
def load(path):
    """Read a tiktoken rank file into a tiktoken.Encoding.

    The expression is GPT-2's and `<|endoftext|>`, unless it is in the file,
    takes the rank after the last. Raises ValueError, naming the file and the
    line, for a line that is no token and rank, a rank or a token that comes
    twice, a gap in the ranks or a byte that is missing, and for a file of
    more than 16 MiB.

    Derived in chapter 4.7.
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


# GPT-2's encoding
def gpt2():
    """GPT-2's encoding: 50,257 tokens, `<|endoftext|>` is number 50,256.

    tiktoken downloads it once and keeps it in the folder that
    TIKTOKEN_CACHE_DIR names, or in a temporary one. Raises ConnectionError
    when the files are neither there nor to be had.

    Derived in chapter 4.7.
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


# long runs of blanks
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


# what stands before a text
def text_start(encoding):
    """The token that a text is read behind.

    `<|endoftext|>`, or another model's token that begins a text.

    Derived in chapter 4.7.
    """
    begins = getattr(encoding, "bos_token", None)
    return encoding.eot_token if begins is None else begins


def document_start(encoding):
    """The tokens before each of several documents, a list.

    What ends the last one and, where it is another token, `text_start`.

    Derived in chapter 4.7.
    """
    return [*dict.fromkeys([encoding.eot_token, text_start(encoding)])]


# the width of a token
def token_dtype(vocab_size):
    """The dtype that tokens are kept in: uint16 up to 65,536, else uint32.

    Derived in chapter 4.7.
    """
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


# encode any text
def encode_text(encoding, text, endoftext=False):
    """The tokens of a text, an array of shape (N,), uint32.

    encoding: a tiktoken.Encoding with GPT-2's expression, or one of
    llmnb.formats.foreign. endoftext: take `<|endoftext|>` in the text as
    what stands before a document; else it is ordinary text. A run of a
    million blanks, which tiktoken refuses, has the tokens that its merges
    give.

    Derived in chapter 4.7.
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
