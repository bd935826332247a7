# Written by `make export` from notebooks/4_practice/06_hub.py: edit that file.

"""A model's tokenizer, in any file that it may lie in."""

__all__ = [
    "KEPT", "TOKENIZER_FILES", "encoding_of", "keep_encoding",
    "open_encoding", "read_encoding", "read_tokenizer", "read_tokenizer_json",
    "read_vocab", "tokenizer_beside", "tokenizer_of", "write_tokenizer",
]


# imports of the vocabularies
import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from llmnb.files import read_json, read_small, what_is, write_whole
from llmnb.formats.checkpoint import find_model
from llmnb.formats.letters import LETTERS
from llmnb.formats.library import library_json
from llmnb.formats.llmc import (
    HEADER_BYTES, check_header, header_of, read_header,
)
from llmnb.text.bpe import EOT, WORDS, byte, from_tokens


# read a tokenizer
_MAGIC, _VERSION = 20240328, 2


def read_tokenizer(path):
    """The tokens of llm.c's tokenizer file: a list of bytes, and EOT.

    Raises ValueError, naming the file, when it is none of version 2, when
    it ends early or late, and for an empty token.

    Derived in chapter 4.6.
    """
    size, _, count, eot = read_header(path, _MAGIC, [_VERSION], 3)
    # a token takes two bytes at least and 256 at most
    fits = 2 * count <= size - HEADER_BYTES <= 256 * count
    rows = (
        (count > 0, "token count", "positive", count),
        (0 <= eot < count, "EOT", f"in [0, {count})", eot),
        (fits, "size", f"right for {count} tokens", size),
    )
    check_header(path, _MAGIC, rows)
    raw = read_small(path, HEADER_BYTES + (1 << 24))  # of 65,536 tokens
    tokens, at = [], HEADER_BYTES
    for number in range(count):
        length = raw[at] if at < len(raw) else 0
        token = raw[at + 1 : at + 1 + length]
        if not token or len(token) < length:
            raise ValueError(f"{path}: token {number} is empty or cut off")
        tokens.append(token)
        at += 1 + length
    if at < len(raw):
        raise ValueError(
            f"{path}: {len(raw) - at} bytes behind the last token"
        )
    return tokens, eot


# write a tokenizer
def write_tokenizer(path, encoding):
    """Write the tokens of a tiktoken.Encoding in llm.c's format.

    Raises ValueError for a number without a token, and for a token that is
    longer than 255 bytes, which one byte cannot count. The file appears
    whole or not at all.

    Derived in chapter 4.6.
    """
    count, body = encoding.n_vocab, []
    for number in range(count):
        try:
            token = encoding.decode_single_token_bytes(number)
        except KeyError:
            why = f"write_tokenizer: no token has the number {number}"
            raise ValueError(why) from None
        if len(token) > 255:
            raise ValueError(
                f"write_tokenizer: a token must have at most 255 bytes, "
                f"number {number} has {len(token)}"
            )
        body.append(bytes([len(token)]) + token)
    header = header_of(_MAGIC, _VERSION, count, encoding.eot_token)
    write_whole(path, header.tobytes() + b"".join(body))


# an encoder from a decoder
_LONGEST_TOKEN = 255  # bytes; GPT-2's longest has 128


def read_encoding(path):
    """The tiktoken.Encoding of a tokenizer file, if it is a byte-level BPE.

    The text is split as GPT-2 does, which the file does not say. Raises
    ValueError, naming the file, as encoding_of does.

    Derived in chapter 4.6.
    """
    tokens, eot = read_tokenizer(path)
    if eot != len(tokens) - 1:
        raise ValueError(f"{path}: EOT must be the last token, got {eot}")
    return encoding_of(path, tokens)


def encoding_of(path, tokens):
    """A tiktoken.Encoding that merges as these tokens tell, in order.

    path: what the messages and the encoding are called by. Raises
    ValueError unless there are the 256 bytes, each other token joins two
    earlier ones, none comes twice, and the last is `<|endoftext|>`.

    Derived in chapter 4.6.
    """
    *tokens, last = tokens or [b"none"]
    if last != EOT.encode():
        raise ValueError(
            f"{path}: the last token must be {EOT}, got {last!r:.80}"
        )
    rank = {token: i for i, token in enumerate(tokens)}
    if len(rank) < len(tokens) or last in rank:
        raise ValueError(f"{path}: a token comes twice")
    for number in range(256):
        if bytes([number]) not in rank:
            raise ValueError(f"{path}: no token for the byte {number}")
    for token, i in rank.items():
        if len(token) > _LONGEST_TOKEN:
            raise ValueError(
                f"{path}: a token must have at most {_LONGEST_TOKEN} bytes, "
                f"number {i} has {len(token)}"
            )
        if len(token) > 1 and not _joins(token, i, rank):
            raise ValueError(f"{path}: token {i} joins no two earlier ones")
    return from_tokens(Path(path).stem, tokens)


# a token and two earlier ones
def _joins(token, i, rank):
    """Whether a token is some two tokens of lower rank, joined."""
    return any(
        rank.get(token[:k], i) < i and rank.get(token[k:], i) < i
        for k in range(1, len(token))
    )


# read a vocabulary
_LONGEST_VOCAB = 1 << 23  # bytes of a file; GPT-2's have one to four million


def read_vocab(path):
    """The tiktoken.Encoding of a vocab.json of GPT-2's kind.

    With a merges.txt beside it, as the merges say. Raises ValueError, naming
    the file, when its numbers are not 0, 1, 2, ... or its tokens not those of
    a byte-level BPE in order of rank.

    Derived in chapter 4.6.
    """
    path = Path(path)
    vocab, merges = read_json(path, _LONGEST_VOCAB), path.parent / "merges.txt"
    if set(map(repr, vocab.values())) != set(map(str, range(len(vocab)))):
        raise ValueError(f"{path}: must number its tokens 0, 1, 2, ...")
    if merges.is_file():
        return _merged(path, vocab, _read_merges(merges))
    tokens = sorted(vocab, key=vocab.get)
    return encoding_of(path, [_bytes_of(path, x) for x in tokens])


def _bytes_of(path, token):
    """The bytes of a token that is written in letters."""
    if not LETTERS.keys() >= set(token):
        raise ValueError(f"{path}: {token!r:.80} has letters of no byte")
    return bytes(LETTERS[x] for x in token)


# read the merges
def _read_merges(path):
    """The pairs of a merges.txt, in order."""
    lines = read_small(path, _LONGEST_VOCAB).decode("utf-8", "replace")
    if what := what_is(path):
        raise ValueError(f"{path}: {what}")
    lines = lines.replace("\r\n", "\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if line.count(" ") != 1:
            raise ValueError(
                f"{path}:{number}: a line must be two tokens, got {line!r:.80}"
            )
        merges.append(line.split(" "))
    return merges


# a vocabulary and its merges
_TEXT = r"[^\ud800-\udfff]*"  # without half a character, which JSON can write
_SPECIAL = re.compile(rf"<{_TEXT}>|\[{_TEXT}\]")


def _merged(path, vocab, merges, added=()):
    """The encoding of a vocabulary, letters to numbers, and its merges.

    added: tokens that are known to be special; so are those in brackets.
    """
    from tiktoken import Encoding  # not before it is needed

    plain = _joined(path, {x: vocab.get(x) for x in LETTERS}, vocab, merges)
    rest = {x: n for x, n in vocab.items() if x not in plain}
    for x in rest:
        if x not in added and not _SPECIAL.fullmatch(x):
            raise ValueError(
                f"{path}: no merge makes the token {x!r:.80}: the merges are "
                "cut short, or another vocabulary's"
            )
    top = max(*plain.values(), vocab.get(EOT, 0))
    special = {x: n for x, n in rest.items() if n <= top}
    numbers = {*plain.values()}
    if len(numbers) < len(plain) or len({*special.values()} | numbers) <= top:
        raise ValueError(f"{path}: must number its tokens 0, 1, 2, ...")
    if EOT not in special:
        raise ValueError(
            f"{path}: has no {EOT}, by which texts begin and end here"
        )
    ranks = {_bytes_of(path, x): n for x, n in plain.items()}
    return Encoding(
        path.stem, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special
    )


def _joined(path, plain, vocab, merges):
    """The numbers of the bytes, and of what the merges make of them."""
    if None in plain.values():
        raise ValueError(f"{path}: no token for each of the 256 bytes")
    last = -1
    for a, b in merges:
        number = vocab.get(a + b, -1)
        if a not in plain or b not in plain or number <= last:
            raise ValueError(
                f"{path}: the merge of {a!r:.80} and {b!r:.80} must join "
                "earlier tokens to one with the next number"
            )
        plain[a + b] = last = number
    return plain


# read a tokenizer.json
_PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 \x00\x7f I'LL we've don't__ \u2028end  "
)


def read_tokenizer_json(path):
    """The tiktoken.Encoding of a tokenizer.json, if it is of GPT-2's kind.

    Raises ImportError without the library tokenizers, ValueError, naming the
    file, when it cannot read it or the tokenizer is of another kind.

    Derived in chapter 4.6.
    """
    path, (theirs, _) = Path(path), library_json(path, _LONGEST_VOCAB)
    model = json.loads(theirs.to_str())["model"]
    if model["type"] != "BPE" or theirs.get_vocab_size() > 65536:
        raise ValueError(
            f"{path}: must be a BPE of at most 65,536 tokens, is "
            f"{model['type']} of {theirs.get_vocab_size():,}"
        )
    merges = [x.split(" ") if type(x) is str else x for x in model["merges"]]
    added = {x.content for x in theirs.get_added_tokens_decoder().values()}
    ours = _merged(path, theirs.get_vocab(), merges, added)
    known = theirs.encode(_PROBE, add_special_tokens=False).ids
    if ours.encode_ordinary(_PROBE) != known:
        raise ValueError(
            f"{path}: cuts or merges a text in another way than GPT-2's "
            "byte-level BPE, which is the only one known here"
        )
    return ours


# find and open a tokenizer
# names of tokenizers beside a model
TOKENIZER_FILES = (
    "tokenizer.tiktoken",
    "vocab.json",
    "tokenizer.json",
    "tokenizer.model",
    "gpt2_tokenizer.bin",
)


def tokenizer_of(path, vocab_size):
    """The tokenizer of a model on disk, by a name for `open_encoding`.

    path: as for llmnb.formats.checkpoint.open_model, of a model with
    vocab_size tokens. Raises ValueError when it is not certain.

    Derived in chapter 4.6.
    """
    path = Path(path)
    if path.suffix == ".gguf":  # the tokenizer lies within
        return str(path)
    if found := tokenizer_beside(path if path.is_dir() else path.parent):
        return str(found)
    file = find_model(path)
    if file.suffix == ".gguf":
        return str(file)
    llmc = file.suffix not in (".safetensors", ".json")
    if llmc and 50257 <= vocab_size <= 50304:
        return "gpt2"
    raise ValueError(
        f"{path}: which tokenizer? None of {', '.join(TOKENIZER_FILES[:3])} "
        "lies beside it: name it, as in --tokenizer gpt2"
    )


def tokenizer_beside(folder):
    """The path of a folder's tokenizer, or None.

    Derived in chapter 4.6.
    """
    from llmnb.formats.families import family_of  # Part 5

    described, names = folder / "config.json", [*TOKENIZER_FILES]
    if described.is_file() and family_of(described):
        names.append(names.pop(names.index("vocab.json")))
    paths = (folder / name for name in names)
    return next((path for path in paths if path.is_file()), None)


def open_encoding(name):
    """The tiktoken.Encoding that a name stands for.

    name: gpt2, byte, or the path of a rank file, a vocab.json, a
    tokenizer.json, a tokenizer.model, a .gguf, llm.c's .bin, or a folder that
    holds one. One that is not of GPT-2's kind is an object with the same
    methods, see llmnb.formats.foreign. Raises ValueError, OSError, or
    ImportError for a library that is missing.

    Derived in chapter 4.6.
    """
    from llmnb.text import tokenizer

    if name == "byte":
        return byte()
    if name == "gpt2":
        return tokenizer.gpt2()
    path = Path(name)
    if path.is_dir():
        path, folder = tokenizer_beside(path), path
        if path is None:
            known = ", ".join(TOKENIZER_FILES)
            raise FileNotFoundError(f"{folder}: holds none of {known}")
    if not path.exists():
        what = os.strerror(errno.ENOENT) + ", and no tokenizer: these are "
        what += "byte and gpt2, and bpe where one is trained"
        raise FileNotFoundError(errno.ENOENT, what, str(path))
    if path.name.endswith("tokenizer.json"):
        return _open_json(path)
    if path.suffix in (".model", ".gguf"):
        from llmnb.formats.foreign import open_foreign  # Part 5

        return open_foreign(path)
    if path.suffix == ".json":
        return read_vocab(path)
    return (read_encoding if path.suffix == ".bin" else tokenizer.load)(path)


def _open_json(path):
    """The tokenizer of a tokenizer.json: of GPT-2's kind, or another."""
    from llmnb.formats.foreign import open_foreign  # Part 5

    ours = None
    with suppress(ValueError):
        ours = read_tokenizer_json(path)
    try:
        theirs = open_foreign(path)
    except ValueError:
        if ours is None:
            raise
        return ours
    # a text may end with another special token, or one that ours leaves out
    alike = ours and ours.special_tokens_set == {EOT}
    return ours if alike and ours.eot_token == theirs.eot_token else theirs


# a tokenizer kept in a folder
# names that a kept tokenizer may have
KEPT = {
    "tokenizer.tiktoken", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model",
}  # fmt: skip


def keep_encoding(encoding, folder):
    """Write a tokenizer into a folder, where open_encoding finds it.

    encoding: as open_encoding gives it, or a tiktoken.Encoding whose one
    special token is `<|endoftext|>`. One that was kept there before is
    removed. Raises ValueError, and writes nothing, when the folder holds
    another's vocab.json.

    Derived in chapter 4.6.
    """
    from llmnb.text import tokenizer

    folder, files = Path(folder), getattr(encoding, "files", {})
    other = folder / "vocab.json"  # which is looked for before these files
    if files and other.is_file():
        raise ValueError(f"{other}: is of another tokenizer than {folder}'s")
    if not files:
        tokenizer.save(encoding, folder / TOKENIZER_FILES[0])
    for name, raw in files.items():
        write_whole(folder / name, raw)
    for name in KEPT - {*(files or TOKENIZER_FILES[:1])}:
        (folder / name).unlink(missing_ok=True)
