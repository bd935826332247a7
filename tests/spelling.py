"""Tokenizer files of published models, written for tests."""

import json

from fuzz import header
from hypothesis import strategies as st

from llmnb.formats.letters import byte_letters


def vocab_of(encoding):
    """vocab.json of an encoding, by the letters of GPT-2's own table."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    tokens = enumerate(tokens_of(encoding))
    return {"".join(letters[b] for b in x): i for i, x in tokens}


def own_files(folder, encoding, before=(), behind=(), merges=True):
    """vocab.json and merges.txt: special tokens first, or EOT alone last."""
    *spelt, eot = vocab_of(encoding)
    tokens = [*before, *spelt] if before else [*spelt, eot]
    vocab = {x: i for i, x in enumerate([*tokens, *behind])}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2"] + [" ".join(x) for x in merges_of(encoding)]
    if merges:
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "vocab.json"


def tokenizer_bin(tokens, eot):
    """The bytes of llm.c's file of some tokens."""
    body = b"".join(bytes([len(x)]) + x for x in tokens)
    return header(20240328, 2, len(tokens), eot) + body


def merges_of(encoding):
    """The pairs, in letters, that were joined to the tokens, in order."""
    spelt = [x for x in vocab_of(encoding) if x != "<|endoftext|>"]
    rank, pairs = {}, []
    for number, token in enumerate(spelt):
        parts = list(token)
        while len(parts) > 2:
            found = [rank.get(a + b, 1 << 30) for a, b in
                     zip(parts, parts[1:], strict=False)]  # fmt: skip
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        rank[token] = number
        if len(parts) == 2:
            pairs.append(parts)
    return pairs


STORY = """\
Four frogs sat on a log. One frog jumped, and three frogs sat on the log.
Then it rained for a week; the log floated off with three frogs on it, and
the fourth, who couldn't swim well, swam after them anyway. 'Wait!' it cried.
"""
# assigned characters only: libraries may differ on those of a newer Unicode
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=200)


def tokens_of(encoding):
    """Its tokens as bytes, by number."""
    n = encoding.n_vocab
    return [encoding.decode_single_token_bytes(i) for i in range(n)]
