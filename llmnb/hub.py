# Written by `make export` from notebooks/17_models.py: edit that file.

"""Carry models in and out.

A model made elsewhere is read, proved to compute the same here, and written so
that other programs read it back.
"""

__all__ = [
    "SOURCES",
    "fetch",
    "read_vocab",
]


# imports of the hub
from pathlib import Path

from llmnb.checkpoint import _read_json
from llmnb.starter import encoding_of


# what can be fetched
_FILES = "config.json", "vocab.json", "merges.txt", "model.safetensors"
_PACK = (
    "gpt2_124M.bin",
    "gpt2_124M_bf16.bin",
    "gpt2_124M_debug_state.bin",
    "gpt2_tokenizer.bin",
    "tiny_shakespeare_train.bin",
    "tiny_shakespeare_val.bin",
)
# name: kind of repository, its name, its files
SOURCES = {
    "gpt2": ("model", "openai-community/gpt2", _FILES),
    "gpt2-medium": ("model", "openai-community/gpt2-medium", _FILES),
    "gpt2-large": ("model", "openai-community/gpt2-large", _FILES),
    "gpt2-xl": ("model", "openai-community/gpt2-xl", _FILES),
    "starter-pack": ("dataset", "karpathy/llmc-starter-pack", _PACK),
}


# fetch
def fetch(name):
    """The folder of a published model or of llm.c's pack, downloaded once.

    name: one of SOURCES, else ValueError. The library huggingface_hub, the
    extra `hub` of llmnb, downloads what its cache lacks, with a bar on
    stderr, and goes on where an earlier download broke off; with the files
    in the cache no network is needed. Raises ImportError when the library
    is missing and OSError when the files cannot be had, in one sentence.

    Derived in chapter 17.
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
    kind, repo, files = SOURCES[name]
    try:
        paths = [hf_hub_download(repo, x, repo_type=kind) for x in files]
    except Exception as error:  # its errors have no root in common
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"fetch: cannot get {name} from {repo}: {why}") from None
    return Path(paths[-1]).parent


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
def read_vocab(path):
    """The tiktoken.Encoding of a vocab.json of GPT-2's kind.

    Raises ValueError, naming the file, when its numbers are not 0, 1, 2, ...
    or its tokens not those of a byte-level BPE in order of rank.

    Derived in chapter 17.
    """
    vocab, letters = _read_json(path), _letters()
    if set(map(repr, vocab.values())) != set(map(str, range(len(vocab)))):
        raise ValueError(f"{path}: must number its tokens 0, 1, 2, ...")
    tokens = sorted(vocab, key=vocab.get)
    for token in tokens:
        if not set(token) <= set(letters):
            raise ValueError(f"{path}: {token!r} has letters of no byte")
    return encoding_of(
        path, [bytes(letters[x] for x in token) for token in tokens]
    )
