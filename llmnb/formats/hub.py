# Written by `make export` from notebooks/4_practice/06_hub.py: edit that file.

"""Published models, downloaded and checked."""

__all__ = ["SOURCES", "fetch"]


# imports of the hub
import hashlib
from pathlib import Path

from llmnb.files import package


# what can be fetched
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


# fetch
def fetch(name):
    """The folder of a published model or of llm.c's pack, downloaded once.

    name: one of SOURCES, else ValueError. The library huggingface_hub, the
    extra `hub` of llmnb, downloads what its cache lacks, with a bar on
    stderr, and goes on where an earlier download broke off; with the files
    in the cache no network is needed. All are of one revision, and each has
    the hash it should have. Raises ImportError when the library is missing
    and OSError when the files cannot be had or are others, in one sentence.

    Derived in chapter 4.6.
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


# compare its hash
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
