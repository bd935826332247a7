# Written by `make export` from notebooks/01_tokens.py: edit that file.

"""Turn text into tokens.

Byte-level BPE trained from scratch, the text to train on, and the shards and
batches that bring tokens to the model.
"""

__all__ = [
    "encode_documents",
    "files_below",
    "load",
    "split",
]


# imports of the corpora
import hashlib
import os
import sys
import sysconfig
import tokenize
import urllib.request
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmnb.files import replacing


# where the text is
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
)


# files below a folder
def files_below(folder, skipped=()):
    """Paths of all files below a folder, sorted by name.

    Hidden files and folders are left out, and folders named in `skipped`.

    Derived in chapter 1.
    """
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [x for x in folders if x not in skipped and x[0] != "."]
        found += [Path(here, x) for x in names if x[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# the text of a file
def _read(path):
    """The text of a file: UTF-8, or what a .py file declares; else None."""
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as file:
                text = file.read()
        else:
            text = path.read_text("utf-8-sig")
    except (UnicodeDecodeError, SyntaxError):
        return None
    return None if "\0" in text else text


# the standard library
def _standard_library():
    """Yield the source and the manual pages of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    readers = {}
    for path in files_below(root, SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
            readers[name] = lambda path=path: _read(path)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name, text in topics.items():
        readers[f"topic {name}"] = lambda text=text: text
    for name in sorted(readers, key=_hash):
        yield readers[name]()


def _hash(text):
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# keep a download
def _cache_folder():
    """The folder of this user in which downloads are kept."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmnb"


# fetch a file
def _download(url, path):
    """Fetch a file into place; progress goes to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = bytearray()
    with urllib.request.urlopen(url, timeout=30) as reply:
        size = int(reply.headers.get("Content-Length") or 0) or None
        how = {"unit_scale": True, "disable": None}  # no bar in a file
        bar = tqdm(total=size, unit="B", desc=path.name, **how)
        with bar:
            while block := reply.read(1 << 16):
                raw += block
                bar.update(len(block))
    _check_hash(raw, url)
    with replacing(path) as file:
        file.write(raw)


# check a download
def _check_hash(raw, name):
    """Raise ValueError unless these bytes are tinyshakespeare."""
    got = hashlib.sha256(raw).hexdigest()
    if got != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{name} must have the SHA-256 {SHAKESPEARE_SHA256} to be "
            f"tinyshakespeare, got {got}"
        )


# find tinyshakespeare
def _tinyshakespeare():
    """The text of tinyshakespeare, from LLMNB_DATA, the cache or the web."""
    name = "tinyshakespeare.txt"
    folder = os.environ.get("LLMNB_DATA")
    path = Path(folder, name) if folder else None
    if path is None or not path.exists():
        path = _cache_folder() / name
        if not path.exists():
            try:
                _download(SHAKESPEARE_URL, path)
            except OSError as error:
                raise ConnectionError(
                    f"cannot fetch tinyshakespeare from {SHAKESPEARE_URL} "
                    f"({error}); put it as {name} into a folder and name "
                    f"the folder in LLMNB_DATA"
                ) from error
    raw = path.read_bytes()
    _check_hash(raw, path)
    return raw.decode("utf-8")


# documents
def _speeches(text):
    """Yield the sections of a text, each with the blank line that ends it."""
    sections = text.split("\n\n")
    for section in sections[:-1]:
        yield section + "\n\n"
    yield sections[-1]


def _own_files(paths):
    """Yield the text of these files, and of all text files in folders."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in map(Path, paths):
        if path.is_dir():
            yield from map(_read, files_below(path))
        elif path.is_file():
            text = _read(path)
            if text is None:
                raise ValueError(f"load: {path} must be UTF-8 text")
            yield text
        else:
            raise FileNotFoundError(
                f"load: there is no corpus and no file called {path}; the "
                f"corpora are stdlib and tinyshakespeare"
            )


# load a corpus
def load(source="stdlib", limit=None):
    """The documents of a corpus, a list of str.

    source: "stdlib", the source and manual pages of the running Python;
    "tinyshakespeare", downloaded once unless the folder that LLMNB_DATA
    names has it; or a path or a list of paths of text files and folders, of
    which files that are not UTF-8 text are passed over. limit: keep at most
    that many characters; the last document is cut to fit. The order is the
    same on every call. Raises FileNotFoundError, ConnectionError, or
    ValueError for a bad limit, a file that is no text, or an empty corpus.

    Derived in chapter 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load: limit must be at least 1, got {limit}")
    if source == "stdlib":
        texts = _standard_library()
    elif source == "tinyshakespeare":
        texts = _speeches(_tinyshakespeare())
    else:
        texts = _own_files(source)
    documents = list(_take(filter(None, texts), limit))
    if not documents:
        raise ValueError(f"load: no text in {source}")
    return documents


# keep to a limit
def _take(texts, limit):
    """Yield texts until they hold `limit` characters, the last one cut."""
    for text in texts:
        if limit is None:
            yield text
        elif limit > 0:
            yield text[:limit]
            limit -= len(text)
        else:
            return


# tokens of documents
def encode_documents(encoding, documents):
    """Encode documents into one array, `<|endoftext|>` before each.

    encoding: a tiktoken.Encoding of at most 65,536 tokens, or ValueError is
    raised. documents: an iterable of str. Returns a uint16 array of shape
    (N,). Text that reads `<|endoftext|>` is encoded as ordinary text.

    Derived in chapter 1.
    """
    if encoding.n_vocab > 65536:
        raise ValueError(
            f"encode_documents: the encoding must have at most 65536 tokens, "
            f"got {encoding.n_vocab}"
        )
    if isinstance(documents, str):
        documents = [documents]
    eot, parts, rest = [encoding.eot_token], [], iter(documents)
    while group := list(islice(rest, 256)):
        for ids in encoding.encode_ordinary_batch(group):
            parts.append(np.array(eot + ids, np.uint16))
    if not parts:
        raise ValueError("encode_documents: there are no documents")
    return np.concatenate(parts)


# train and validation
def split(tokens, validation=None):
    """Cut tokens into (train, validation); both are views.

    tokens: array of shape (N,). The first `validation` tokens are set aside;
    by default 32,768, as llm.c does, or a tenth of the tokens if that is
    less. Raises ValueError unless both parts hold a token.

    Derived in chapter 1.
    """
    if validation is None:
        validation = min(32768, len(tokens) // 10)
    if not 0 < validation < len(tokens):
        raise ValueError(
            f"split: validation must lie between 0 and the number of tokens, "
            f"{len(tokens)}, got {validation}"
        )
    return tokens[validation:], tokens[:validation]
