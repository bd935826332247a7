# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.hub: "Published models, downloaded and checked."
#       formats.letters: "The letters in which GPT-2's vocabulary writes bytes."
#       formats.library: "A tokenizer.json as the library tokenizers reads it."
#       formats.vocabulary: "A model's tokenizer, in any file that it may lie in."
# ---

# %% [markdown]
# # The hub: models and their vocabularies, downloaded
#
# > Fetch GPT-2 and know that it is GPT-2; then find the tokenizer that belongs
# > to a model, in any of the five files in which it may lie.
#
# *Reading time: 28 minutes. You need: [chapter
# 1.2](../1_by_hand/02_tokens.ipynb) for ranks and merges, and [chapter
# 4.4](04_published.ipynb).*

# %% [markdown]
# ## Where we are
#
# The models of the GPT-2 paper and llm.c's starter pack lie on the Hugging
# Face hub. A download is a stranger's file under a friend's name. And a model
# is useless without its tokenizer, of which it does not say which it is. At
# the end of this chapter you can
#
# - say what to compare so that what you fetched is what was meant;
# - rebuild an encoder from a list of tokens, and say when that is not
#   possible;
# - read GPT-2's vocabulary, in which a space is `Ġ`;
# - say which tokenizer a model is given, and when you are asked.

# %% imports of the hub tags=["export"]
import hashlib
from pathlib import Path

from llmnb.files import package

# %% imports of the vocabularies tags=["export"] module="formats.vocabulary"
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
    HEADER_BYTES,
    check_header,
    header_of,
    read_header,
)
from llmnb.text.bpe import EOT, WORDS, byte, from_tokens

# %% [markdown]
# ## Setup

# %% setup
import tempfile

from llmnb.book.verify import verdict
from llmnb.text import tokenizer

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Fetch
#
# The library `huggingface_hub` downloads with a progress bar, goes on where a
# download broke off, keeps what it has in a cache, and answers from the cache
# when there is no network. It is an extra: `pip install 'llmnb[hub]'`.
#
# What is fetched should be what was meant. A name on the hub can be written
# anew by its owner, so for OpenAI's four models the *revision* is part of the
# address: a commit, which cannot change. And each file is compared with a hash
# after every download, and on every later call, since a cache lies on a disk
# too. For the large files we name the hash ourselves where it is widely
# known: of GPT-2's smallest and largest model, of its vocabulary, and of
# llm.c's pack, which has no commit that we know of. The rest is compared with
# the hash that the hub gives: the cache calls a file by it, by SHA-256 where
# it is large and by git's hash where it is small. That finds damage, but it
# believes the hub. (On Windows the cache often goes without such names, and
# then only the hashes that we name are compared.)

# %% what can be fetched tags=["export"]
# files and their SHA-256, or "" for the hash that the hub gives
_OPENAI = dict.fromkeys(
    ("config.json", "vocab.json", "merges.txt", "model.safetensors"), ""
)
_HASHES = """
vocab.json
196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
merges.txt
1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
model.safetensors
"""
_GPT2 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
_XL = "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"
_PACK = """
gpt2_124M.bin
3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162
gpt2_124M_bf16.bin
6661f45628102b4c6e86835d9057b5ba2c024dbf9b81445175e258b7878a1a6f
gpt2_124M_debug_state.bin
a80c4448eed47c561314a2189e62c49b2c7477c265fc2f15c8470d18401693d9
gpt2_tokenizer.bin
6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13
tiny_shakespeare_train.bin
8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8
tiny_shakespeare_val.bin
fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62
"""


def _hashes(text):
    """File -> hash, for lines that take turns."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def _openai(name, revision, hashes=""):
    """One of OpenAI's models: see SOURCES."""
    files = _OPENAI | _hashes(hashes)
    return "model", f"openai-community/{name}", revision, files


# name: kind of repository, its name, the revision, its files
SOURCES = {
    name: _openai(name, revision, hashes)
    for name, revision, hashes in (
        ("gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", _HASHES + _GPT2),
        ("gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", ""),
        ("gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", ""),
        ("gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", _HASHES + _XL),
    )
} | {
    "starter-pack": (
        "dataset", "karpathy/llmc-starter-pack", "main", _hashes(_PACK)
    ),
    "smollm2": (
        "model", "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        dict.fromkeys(("config.json", "generation_config.json",
                       "tokenizer.json", "tokenizer_config.json",
                       "model.safetensors"), ""),
    ),
}  # fmt: skip


# %% fetch tags=["export"]
def fetch(name):
    """The folder of a published model or of llm.c's pack, downloaded once.

    name: one of SOURCES, else ValueError. The library huggingface_hub, the
    extra `hub` of llmnb, downloads what its cache lacks, with a bar on
    stderr, and goes on where an earlier download broke off; with the files
    in the cache no network is needed. All are of one revision, and each has
    the hash it should have. Raises ImportError when the library is missing
    and OSError when the files cannot be had or are others, in one sentence.
    """
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"fetch: no {name!r}: choose from {known}")
    hub = package("huggingface_hub", "hub", "fetch")
    kind, repo, revision, files = SOURCES[name]
    paths = {}
    try:
        for file in files:
            how = {"repo_type": kind, "revision": revision}
            paths[file] = Path(hub.hf_hub_download(repo, file, **how))
            revision = paths[file].parent.name  # a commit, for all the others
    except Exception as error:  # its errors have no root in common
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"fetch: cannot get {name} from {repo}: {why}") from None
    for file, path in paths.items():
        _check_hash(path, files[file])
    return path.parent


# %% compare its hash tags=["exporti"]
def _check_hash(path, want):
    """Raise OSError unless a file has a SHA-256, or the hub's own hash."""
    path = path.resolve()  # in the cache a file is called by its hash
    want = want or path.name
    if len(want) == 64:
        digest = hashlib.sha256()
    elif len(want) == 40:  # git's, which begins with the size
        start = b"blob %d\0" % path.stat().st_size
        digest = hashlib.sha1(start, usedforsecurity=False)
    else:  # a cache without links, as on Windows
        return
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != want:
        raise OSError(
            f"fetch: {path} is not what was published, its hash is "
            f"{digest.hexdigest()}, not {want}: remove it and fetch again"
        )


# %% [markdown]
# With a network, `fetch("gpt2")` returns a model folder for
# `GPT2.from_checkpoint`, and on the command line
#
#     llmnb fetch gpt2                           prints the folder
#     llmnb verify $(llmnb fetch starter-pack)   the acceptance test
#
# This page was built without a network. The tests serve small files from
# a server on the same machine, break a download off, and switch the network
# off; llm.c's own pack could not be fetched where this was written, and the
# test has been run on packs that `tests/record_starter.py` makes with PyTorch.

# %% a mistake costs no download
try:
    fetch("gpt3")
except ValueError as error:
    print(error)

# %% [markdown]
# ## The tokenizer's file
#
# llm.c decodes and does not encode, so its file holds no more than the bytes
# of each token: after the header (20240328, version 2, count, EOT) one byte
# for the length, then the token.

# %% read a tokenizer tags=["export"] module="formats.vocabulary"
_MAGIC, _VERSION = 20240328, 2


def read_tokenizer(path):
    """The tokens of llm.c's tokenizer file: a list of bytes, and EOT.

    Raises ValueError, naming the file, when it is none of version 2, when
    it ends early or late, and for an empty token.
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


# %% write a tokenizer tags=["export"] module="formats.vocabulary"
def write_tokenizer(path, encoding):
    """Write the tokens of a tiktoken.Encoding in llm.c's format.

    Raises ValueError for a number without a token, and for a token that is
    longer than 255 bytes, which one byte cannot count. The file appears
    whole or not at all.
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


# %% [markdown]
# Can we encode all the same? A byte-level BPE is its list of merges, in order
# ([chapter 1.2](../1_by_hand/02_tokens.ipynb)). The list is not in the file,
# but tiktoken needs no merges: it joins the neighbouring pair whose *joined*
# token has the lowest rank, and in GPT-2's vocabulary the rank is the token's
# number. So the encoder can be rebuilt, if three things hold, and they can be
# checked: all 256 bytes are there, every other token joins two earlier ones,
# and none comes twice. A vocabulary of another kind, say WordPiece's, fails
# the second. The check tries every place where a token may be joined, which is
# quadratic in its length: a token of more than 255 bytes is refused, not
# tried. What the file cannot tell is how a text is cut into words before; we
# take GPT-2's rule.

# %% an encoder from a decoder tags=["export"] module="formats.vocabulary"
_LONGEST_TOKEN = 255  # bytes; GPT-2's longest has 128


def read_encoding(path):
    """The tiktoken.Encoding of a tokenizer file, if it is a byte-level BPE.

    The text is split as GPT-2 does, which the file does not say. Raises
    ValueError, naming the file, as encoding_of does.
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


# %% a token and two earlier ones tags=["exporti"] module="formats.vocabulary"
def _joins(token, i, rank):
    """Whether a token is some two tokens of lower rank, joined."""
    return any(
        rank.get(token[:k], i) < i and rank.get(token[k:], i) < i
        for k in range(1, len(token))
    )


# %% there and back
trained = tokenizer.train("low lower lowest, newer newest " * 3, 270)
write_tokenizer(folder / "tokenizer.bin", trained)
rebuilt = read_encoding(folder / "tokenizer.bin")
for sample in ("newer lowest", "naïve\n\n", "<|endoftext|>"):
    same = rebuilt.encode_ordinary(sample) == trained.encode_ordinary(sample)
    verdict(repr(sample), same, "encoded alike")

# %% [markdown]
# ## GPT-2's own letters
#
# A model folder brings its vocabulary as `vocab.json`: token to number. JSON
# holds text and no bytes, so GPT-2's authors wrote each byte as a letter:
# bytes that print stand for themselves, and the other 68 for the letters from
# number 256 on. A space is `Ġ`. Turned back, it is the list of tokens in order
# of rank, and gives an encoder without another download.


# %% GPT-2's letters tags=["export"] module="formats.letters"
def byte_letters():
    """The byte that each letter of vocab.json stands for.

    Bytes that print stand for themselves, the others in order for the
    letters from number 256.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in plain]
    letters = {chr(x): x for x in plain}
    return letters | {chr(256 + i): x for i, x in enumerate(others)}


LETTERS = byte_letters()


# %% [markdown]
# The merges come in a file of their own, `merges.txt`, two tokens a line. With
# it we need not guess how a token was made. Every token is a byte, or joins
# two tokens as the merge of its line says, or it is *special*: no text becomes
# it. Programs other than GPT-2's give special tokens the first numbers, or add
# some behind the last, to pad with; those behind are left out, and the rows of
# the model that belong to them become padding ([chapter
# 4.4](04_published.ipynb)). tiktoken wants the merges in order of the tokens'
# numbers, and so do we.

# %% read a vocabulary tags=["export"] module="formats.vocabulary"
_LONGEST_VOCAB = 1 << 23  # bytes of a file; GPT-2's have one to four million


def read_vocab(path):
    """The tiktoken.Encoding of a vocab.json of GPT-2's kind.

    With a merges.txt beside it, as the merges say. Raises ValueError, naming
    the file, when its numbers are not 0, 1, 2, ... or its tokens not those of
    a byte-level BPE in order of rank.
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


# %% read the merges tags=["exporti"] module="formats.vocabulary"
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


# %% a vocabulary and its merges tags=["exporti"] module="formats.vocabulary"
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


# %% an encoder from letters
letters = {number: letter for letter, number in LETTERS.items()}
tokens = map(trained.decode_single_token_bytes, range(trained.n_vocab))
spelt = ["".join(letters[x] for x in token) for token in tokens]
print(spelt[257:263])
vocab = {token: number for number, token in enumerate(spelt)}
(folder / "vocab.json").write_text(json.dumps(vocab))
sample = "the newest naïve lower\n"
got = read_vocab(folder / "vocab.json").encode_ordinary(sample)
verdict("vocab.json", got == trained.encode_ordinary(sample), "encodes alike")

# %% [markdown]
# Newer folders have one file instead, `tokenizer.json`, which can describe any
# tokenizer at all. The library `tokenizers` reads it, an extra:
# `pip install 'llmnb[tokenizers]'`. We take from it what is a byte-level BPE,
# which nearly every GPT-2 has, and build the same encoder from its vocabulary
# and its merges. Whether that is right the library says itself: both must
# encode a text that has something of everything alike.

# %% imports of the library's reader tags=["export"] module="formats.library"
import json

from llmnb.files import package, read_small, what_is


# %% a tokenizer.json, read tags=["export"] module="formats.library"
def library_json(path, most):
    """The library's tokenizer of a tokenizer.json, and what that holds.

    most: the file's bytes, at most. Raises as `read_tokenizer_json`.
    """
    library = package("tokenizers", "tokenizers", path)
    raw = read_small(path, most)
    try:
        theirs = library.Tokenizer.from_str(raw.decode("utf-8"))
        said = json.loads(raw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        what = what_is(path) or f"not a tokenizer ({error!s:.200})"
        raise ValueError(f"{path}: {what}") from None
    theirs.no_truncation()
    theirs.no_padding()
    return theirs, said


# %% read a tokenizer.json tags=["export"] module="formats.vocabulary"
_PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 \x00\x7f I'LL we've don't__ \u2028end  "
)


def read_tokenizer_json(path):
    """The tiktoken.Encoding of a tokenizer.json, if it is of GPT-2's kind.

    Raises ImportError without the library tokenizers, ValueError, naming the
    file, when it cannot read it or the tokenizer is of another kind.
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


# %% [markdown]
# ## Which tokenizer
#
# With the wrong tokenizer a model writes nonsense and scores badly, and
# nothing else tells: many models have 50,257 tokens that are not GPT-2's. So
# what lies beside the weights is taken. Where nothing does, GPT-2's is certain
# for one format: llm.c knows no other. Of any other model we ask.
#
# A folder may hold several files. `vocab.json` needs no library, so it comes before
# `tokenizer.json`; but it does not say how a text is cut into words. The models of
# Part 5 cut it in other ways than GPT-2, so of theirs it is the last choice.

# %% find and open a tokenizer tags=["export"] module="formats.vocabulary"
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
    """The path of a folder's tokenizer, or None."""
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


# %% a tokenizer kept in a folder tags=["export"] module="formats.vocabulary"
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


# %% what lies beside
beside = folder / "elsewhere"
beside.mkdir()
(beside / "model.safetensors").touch()
try:
    tokenizer_of(beside, 257)
except ValueError as error:
    print(str(error).partition("elsewhere: ")[2])
tokenizer.save(trained, beside / "tokenizer.tiktoken")
found = open_encoding(tokenizer_of(beside, 257))
same = found.encode_ordinary(sample) == trained.encode_ordinary(sample)
verdict("the tokenizer", same, "is found beside the weights")

# %% [markdown]
# ## Take away
#
# - A name can be written anew, a commit and a hash cannot.
# - For a byte-level BPE the tokens in order of rank are enough to encode; for
#   any other tokenizer they are not, and it can be told.
# - What lies beside the weights is the tokenizer. Where nothing lies, ask.
#
# ## Design note
#
# Why not let the library `tokenizers` do the encoding, since it reads every
# tokenizer? Because then a text would pass through another program depending
# on which file a model came with, with other rules for broken text, other
# speeds and other bugs. We translate what we can prove to be of GPT-2's kind
# into the one encoder that this book has, and refuse the rest in one sentence.
#
# ## Exercises
#
# **1** (★). Why are the tokens `<|endoftext|>` and `[PAD]` not in the list of
# merges, and how does `_merged` tell them from a token that a merge was lost
# for?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# No text becomes them, so nothing is merged to them. They are known by a list in
# the file, or by their brackets. Any other token without a merge is refused.
# :::

# %% exercise 1, checked tags=["hide-cell"]
(folder / "merges.txt").write_text("#version: 0.2\nl o\n")  # cut short
try:
    read_vocab(folder / "vocab.json")
except ValueError as error:
    print(str(error).replace(f"{folder}", "").lstrip("/\\"))

# %% [markdown]
# ## Further reading
#
# - [GPT-2's
#   encoder.py](https://github.com/openai/gpt-2/blob/master/src/encoder.py):
#   `bytes_to_unicode`, where `Ġ` comes from.
# - [huggingface_hub](https://huggingface.co/docs/huggingface_hub): how its
#   cache is laid out.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.6")
