# Written by `make export` from notebooks/4_practice/04_published.py: edit that file.

"""Published models, downloaded and checked."""

__all__ = [
    "BESIDE",
    "LONGEST_VOCAB",
    "PROBE",
    "SOURCES",
    "fetch",
    "open_encoding",
    "read_tokenizer_json",
    "read_vocab",
    "tokenizer_of",
]


# imports of the hub
import hashlib
import json
import re
from pathlib import Path

from llmnb.formats.checkpoint import _find, _read_json
from llmnb.files import read_small, what_is
from llmnb.formats.starter import encoding_of, read_encoding


# what can be fetched
_BPE = {
    "vocab.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
    "merges.txt": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
}
# files and their SHA-256, or "" for the hash that the hub gives
_FILES = dict.fromkeys(
    ("config.json", "vocab.json", "merges.txt", "model.safetensors"), ""
)
_SMALL = (
    _FILES
    | _BPE
    | {
        "model.safetensors": (
            "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
        ),
    }
)
_XL = (
    _FILES
    | _BPE
    | {
        "model.safetensors": (
            "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"
        ),
    }
)
_PACK = {
    "gpt2_124M.bin": (
        "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162"
    ),
    "gpt2_124M_bf16.bin": (
        "6661f45628102b4c6e86835d9057b5ba2c024dbf9b81445175e258b7878a1a6f"
    ),
    "gpt2_124M_debug_state.bin": (
        "a80c4448eed47c561314a2189e62c49b2c7477c265fc2f15c8470d18401693d9"
    ),
    "gpt2_tokenizer.bin": (
        "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"
    ),
    "tiny_shakespeare_train.bin": (
        "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8"
    ),
    "tiny_shakespeare_val.bin": (
        "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62"
    ),
}
# name: kind of repository, its name, the revision, its files
SOURCES = {
    "gpt2": (
        "model",
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        _SMALL,
    ),
    "gpt2-medium": (
        "model",
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        _FILES,
    ),
    "gpt2-large": (
        "model",
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        _FILES,
    ),
    "gpt2-xl": (
        "model",
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        _XL,
    ),
    "starter-pack": ("dataset", "karpathy/llmc-starter-pack", "main", _PACK),
}


# fetch
def fetch(name):
    """The folder of a published model or of llm.c's pack, downloaded once.

    name: one of SOURCES, else ValueError. The library huggingface_hub, the
    extra `hub` of llmnb, downloads what its cache lacks, with a bar on
    stderr, and goes on where an earlier download broke off; with the files
    in the cache no network is needed. All are of one revision, and each has
    the hash it should have. Raises ImportError when the library is missing
    and OSError when the files cannot be had or are others, in one sentence.

    Derived in chapter 4.4.
    """
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"fetch: no {name!r}: choose from {known}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(
            "fetch needs the package huggingface_hub: pip install 'llmnb[hub]'"
        ) from None
    kind, repo, revision, files = SOURCES[name]
    paths = {}
    try:
        for file in files:
            how = {"repo_type": kind, "revision": revision}
            paths[file] = Path(hf_hub_download(repo, file, **how))
            revision = paths[file].parent.name  # a commit, for all the others
    except Exception as error:  # its errors have no root in common
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"fetch: cannot get {name} from {repo}: {why}") from None
    for file, path in paths.items():
        _check_hash(path, files[file])
    return path.parent


# compare its hash
def _check_hash(path, want):
    """Raise OSError unless a file has a SHA-256, or the hub's own hash."""
    path = path.resolve()  # in the cache a file is called by its hash
    want = want or path.name
    kinds = {64: (hashlib.sha256, b""), 40: (hashlib.sha1, _git(path))}
    if len(want) not in kinds:  # a cache without links, as on Windows
        return
    new, before = kinds[len(want)]
    digest = new(before, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != want:
        raise OSError(
            f"fetch: {path} is not what was published, its hash is "
            f"{digest.hexdigest()}, not {want}: remove it and fetch again"
        )


def _git(path):
    """What git puts before a file when it computes its hash."""
    return b"blob %d\0" % path.stat().st_size


# GPT-2's letters
def _letters():
    """The byte that each letter of vocab.json stands for.

    Bytes that print stand for themselves, the others in order for the
    letters from number 256.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


# read a vocabulary
LONGEST_VOCAB = 1 << 23  # bytes of a file; GPT-2's have one to four million


def read_vocab(path):
    """The tiktoken.Encoding of a vocab.json of GPT-2's kind.

    With a merges.txt beside it, as the merges say. Raises ValueError, naming
    the file, when its numbers are not 0, 1, 2, ... or its tokens not those of
    a byte-level BPE in order of rank.

    Derived in chapter 4.4.
    """
    path = Path(path)
    vocab, merges = _read_json(path, LONGEST_VOCAB), path.parent / "merges.txt"
    if set(map(repr, vocab.values())) != set(map(str, range(len(vocab)))):
        raise ValueError(f"{path}: must number its tokens 0, 1, 2, ...")
    if merges.is_file():
        return _merged(path, vocab, _read_merges(merges))
    tokens = sorted(vocab, key=vocab.get)
    letters = _letters()
    return encoding_of(path, [_bytes_of(path, x, letters) for x in tokens])


def _bytes_of(path, token, letters):
    """The bytes of a token that is written in letters."""
    if not letters.keys() >= set(token):
        raise ValueError(f"{path}: {token!r:.80} has letters of no byte")
    return bytes(letters[x] for x in token)


# read the merges
def _read_merges(path):
    """The pairs of a merges.txt, in order."""
    lines = read_small(path, LONGEST_VOCAB).decode("utf-8", "replace")
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
def _merged(path, vocab, merges, added=()):
    """The encoding of a vocabulary, letters to numbers, and its merges.

    added: tokens that are known to be special; so are those in brackets.
    """
    from tiktoken import Encoding

    from llmnb.text.tokenizer import EOT, WORDS

    letters = _letters()
    plain = _joined(path, {x: vocab.get(x) for x in letters}, vocab, merges)
    rest = {x: n for x, n in vocab.items() if x not in plain}
    for x in rest:
        if x not in added and not re.fullmatch(r"<.*>|\[.*\]", x, re.DOTALL):
            raise ValueError(
                f"{path}: no merge makes the token {x!r:.80}: the merges are "
                "cut short, or another vocabulary's"
            )
    top = max(*plain.values(), vocab.get(EOT, 0))
    special = {x: n for x, n in rest.items() if n <= top}
    if len({*plain.values(), *special.values()}) <= top:
        raise ValueError(f"{path}: must number its tokens 0, 1, 2, ...")
    if EOT not in special:
        raise ValueError(
            f"{path}: has no {EOT}, by which texts begin and end here"
        )
    ranks = {_bytes_of(path, x, letters): n for x, n in plain.items()}
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
PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 \x00\x7f I'LL we've don't__ \u2028end  "
)


def read_tokenizer_json(path):
    """The tiktoken.Encoding of a tokenizer.json, if it is of GPT-2's kind.

    Raises ImportError without the library tokenizers, ValueError, naming the
    file, when it cannot read it or the tokenizer is of another kind.

    Derived in chapter 4.4.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError(
            f"{path} needs the package tokenizers: pip install "
            "'llmnb[tokenizers]'"
        ) from None
    path = Path(path)
    raw = read_small(path, LONGEST_VOCAB)
    try:
        theirs = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # the library has no class of its own for it
        what = what_is(path) or f"not a tokenizer ({error!s:.200})"
        raise ValueError(f"{path}: {what}") from None
    theirs.no_truncation()
    theirs.no_padding()
    model = json.loads(theirs.to_str())["model"]
    if model["type"] != "BPE" or theirs.get_vocab_size() > 65536:
        raise ValueError(
            f"{path}: must be a BPE of at most 65,536 tokens, is "
            f"{model['type']} of {theirs.get_vocab_size():,}"
        )
    merges = [x.split(" ") if type(x) is str else x for x in model["merges"]]
    added = {x.content for x in theirs.get_added_tokens_decoder().values()}
    ours = _merged(path, theirs.get_vocab(), merges, added)
    known = theirs.encode(PROBE, add_special_tokens=False).ids
    if ours.encode_ordinary(PROBE) != known:
        raise ValueError(
            f"{path}: cuts or merges a text in another way than GPT-2's "
            "byte-level BPE, which is the only one known here"
        )
    return ours


# find and open a tokenizer
# names of tokenizers beside a model
BESIDE = (
    "tokenizer.tiktoken",
    "vocab.json",
    "tokenizer.json",
    "gpt2_tokenizer.bin",
)


def tokenizer_of(path, vocab_size):
    """The tokenizer of a model on disk, by a name for `open_encoding`.

    path: as for llmnb.formats.checkpoint.read_config, of a model with vocab_size
    tokens. Raises ValueError when it is not certain.

    Derived in chapter 4.4.
    """
    path = Path(path)
    if found := _beside(path if path.is_dir() else path.parent):
        return str(found)
    llmc = _find(path).suffix not in (".safetensors", ".json")
    if llmc and 50257 <= vocab_size <= 50304:
        return "gpt2"
    raise ValueError(
        f"{path}: which tokenizer? None of {', '.join(BESIDE[:3])} lies "
        "beside it: name it, as in --tokenizer gpt2"
    )


def _beside(folder):
    """The path of a folder's tokenizer, or None."""
    paths = (folder / name for name in BESIDE)
    return next((path for path in paths if path.is_file()), None)


def open_encoding(name):
    """The tiktoken.Encoding that a name stands for.

    name: gpt2, byte, or the path of a rank file, a vocab.json, a
    tokenizer.json, llm.c's .bin, or a folder that holds one. Raises
    ValueError, OSError, or ImportError for a library that is missing.

    Derived in chapter 4.4.
    """
    from llmnb.text import tokenizer

    if name in ("gpt2", "byte"):
        return getattr(tokenizer, name)()
    path = Path(name)
    if path.is_dir():
        path, folder = _beside(path), path
        if path is None:
            known = ", ".join(BESIDE)
            raise FileNotFoundError(f"{folder}: holds none of {known}")
    if path.suffix == ".json":
        whole = path.name.endswith("tokenizer.json")
        return (read_tokenizer_json if whole else read_vocab)(path)
    return (read_encoding if path.suffix == ".bin" else tokenizer.load)(path)
