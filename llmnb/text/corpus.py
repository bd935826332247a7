# Written by `make export` from notebooks/4_practice/08_corpora.py: edit that file.

"""Texts to train on, found, downloaded and kept."""

__all__ = [
    "describe", "downloads_folder", "encode_documents", "files_below",
    "files_of", "load_corpus",
]


# imports of the corpora
import hashlib
import os
import re
import sys
import sysconfig
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmnb.files import write_whole
from llmnb.text.reader import (
    NotText, Tally, open_stream, passing_over, read_documents, read_text,
)
from llmnb.text.bpe import EOT
from llmnb.text.tokenizer import document_start, encode_text, token_dtype


# where the text is
SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip


# files below a folder
_OUTPUT = re.compile(
    r"(tokenizer\.tiktoken|unfinished\.json|state_\d+\.safetensors)(\..*)?"
)


def files_below(folder, skipped=(), tally=None):
    """Paths of all files below a folder, sorted by name.

    Hidden files and folders are left out, and folders named in `skipped`.
    What is noted in `tally`, a `Tally`: runs and folders of shards, links to
    folders, folders that cannot be read, and pipes, devices, and links that
    lead nowhere.

    Derived in chapter 4.8.
    """
    found, tally = [], tally or Tally()

    def unreadable(error):
        tally.note("not readable", error.filename)

    for here, folders, names in os.walk(folder, onerror=unreadable):
        if any(map(_OUTPUT.fullmatch, names)):
            tally.note("runs or shards", here)
            folders.clear()
            continue
        folders[:] = [x for x in folders if x not in skipped and x[0] != "."]
        for link in filter(os.path.islink, (Path(here, x) for x in folders)):
            tally.note("links to folders", link)
        for path in (Path(here, x) for x in names if x[0] != "."):
            if os.path.isfile(path):
                found.append(path)
            else:
                tally.note("not files", path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# the standard library
def _standard_library():
    """Yield the source and the manual pages of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in files_below(root, SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
            found[name] = path
    with suppress(ImportError):
        from pydoc_data.topics import topics

        found |= {f"topic {name}": text for name, text in topics.items()}
    for name in sorted(found, key=_hash):
        with suppress(NotText):
            x = found[name]
            yield read_text(x) if isinstance(x, Path) else x


def _hash(text):
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# what a corpus is called
def describe(names, documents, characters):
    """A line on a corpus: its names, with Python's version, and its size.

    Derived in chapter 4.8.
    """
    where = " ".join(map(str, names))
    if where == "stdlib":
        where += f" (Python {'.'.join(map(str, sys.version_info[:3]))})"
    many = "document" if documents == 1 else "documents"
    return f"{where}: {documents:,} {many}, {characters:,} characters"


# keep a download
def downloads_folder():
    """The folder of this user in which downloads are kept.

    Derived in chapter 4.8.
    """
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmnb"


# fetch a file
def _download(url, path):
    """Fetch a file of a megabyte into place; progress goes to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=30) as reply:
        how = {"total": reply.length, "desc": path.name}
        how["disable"] = None  # no bar in a file
        with tqdm.wrapattr(reply, "read", **how) as body:
            raw = body.read()
    _check_hash(raw, url)
    write_whole(path, raw)


# check a download
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
)


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
        try:
            path = downloads_folder() / name
            if not path.exists():
                _download(SHAKESPEARE_URL, path)
        # RuntimeError: no home; HTTPException: broken off
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConnectionError(
                f"cannot fetch tinyshakespeare from {SHAKESPEARE_URL} "
                f"({error}); put it as {name} into a folder and name "
                f"the folder in LLMNB_DATA"
            ) from error
    raw = path.read_bytes()
    _check_hash(raw, path)
    return raw.decode("utf-8")


# documents of a play
def _speeches(text):
    """The sections of a text, each with the blank line that ends it."""
    return re.findall(r".*?\n\n|.+", text, re.DOTALL)


# files of a corpus
def files_of(path, tally):
    """Yield (path, whether it was named) for a file, or a folder's files.

    path: a Path. tally: as for `files_below`. Raises FileNotFoundError, or
    ValueError for a pipe or a device.

    Derived in chapter 4.8.
    """
    if path.is_dir():
        for inner in files_below(path, (), tally):
            yield inner, False
    elif path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file or a folder")
    elif path.exists():
        yield path, True
    else:
        raise FileNotFoundError(
            f"there is no corpus and no file called {path}; the corpora are "
            "stdlib and tinyshakespeare"
        )


# documents of own files
def _own_files(path, field, skip_bad, tally):
    """Yield the documents of a file, or of all files in a folder."""
    for inner, named in files_of(Path(path), tally):
        errors = nullcontext() if named else passing_over(inner, tally)
        with errors, open_stream(inner) as (stream, _):
            how = field, skip_bad, tally
            for _, blocks in read_documents(inner, stream, *how):
                yield "".join(blocks)


def _texts(name, *how):
    """The documents of a corpus, or of the files that have this name."""
    if name == "stdlib":
        return _standard_library()
    if name == "tinyshakespeare":
        return _speeches(_tinyshakespeare())
    return _own_files(name, *how)


# load a corpus
def load_corpus(
    source="stdlib", limit=None, field="text", skip_bad=False, tally=None
):
    """The documents of a corpus, a list of str.

    source: "stdlib", the source and manual pages of the running Python;
    "tinyshakespeare", downloaded once unless the folder that LLMNB_DATA
    names has it; a path of a file or a folder; or a list of these. Files
    that end in .jsonl, .jsonl.gz or .jsonl.zst have a document a line, in
    the field `field`; any other file, unpacked when it ends in .gz or .zst,
    is a document. Of folders, files that are no text are passed over, and
    noted in `tally`, a `Tally`; with skip_bad, bad lines too. limit: keep at
    most that many characters; the last document is cut to fit. The order is
    the same on every call. Raises FileNotFoundError, ConnectionError, or
    ValueError for a bad limit, a bad line, a file that is no text, or an
    empty corpus.

    Derived in chapter 4.8.
    """
    tally = tally or Tally()
    if limit is not None and limit < 1:
        raise ValueError(f"load_corpus: limit must be at least 1, got {limit}")
    names = [source] if isinstance(source, (str, os.PathLike)) else source
    found = (_texts(name, field, skip_bad, tally) for name in names)
    texts = chain.from_iterable(found)
    documents = list(_take(filter(None, texts), limit or sys.maxsize))
    if not documents:
        raise ValueError(f"load_corpus: no text in {source}{tally.words()}")
    if times := sum(text.count(EOT) for text in documents):
        tally.note(EOT, source, times)
    return documents


# keep to a limit
def _take(texts, limit):
    """Yield texts until they hold `limit` characters, the last one cut."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


# tokens of documents
def encode_documents(encoding, documents, endoftext=False):
    """Encode documents into one array, `<|endoftext|>` before each.

    encoding: as for `encode_text`; before each stands its `document_start`.
    documents: an iterable of str. Returns an array of shape (N,), of
    `token_dtype`. Text that reads `<|endoftext|>` is encoded as ordinary
    text, or with `endoftext` as a document's start. Raises ValueError when
    there are no documents.

    Derived in chapter 4.8.
    """
    if isinstance(documents, str):
        documents = [documents]
    kind = token_dtype(encoding.n_vocab)
    parts, before = [], np.array(document_start(encoding), kind)
    encode = partial(encode_text, encoding, endoftext=endoftext)
    with ThreadPoolExecutor(8) as pool:  # tiktoken lets go of the lock
        for ids in pool.map(encode, documents):
            parts += [before, ids.astype(kind)]
    if not parts:
        raise ValueError("encode_documents: there are no documents")
    return np.concatenate(parts)
