"""Byte-pair encoding, against its definition."""

import random
import time
from collections import Counter
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import STORY, TEXT, tokens_of

from llmnb.text import bpe

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def slow_merges(text, number):
    """The definition: count all pairs anew before each merge."""
    words = [[*w.encode()] for w in regex.findall(bpe.WORDS, text)]
    merges = []
    for new in range(256, 256 + number):
        count = Counter(pair for word in words for pair in pairwise(word))
        if not count:
            break
        merges.append(min(count, key=lambda pair: (-count[pair], pair)))
        words = [joined(word, merges[-1], new) for word in words]
    return merges


def joined(word, pair, new):
    """A word in which a pair has become one token, from left to right."""
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def slow_encode(text, tokens):
    """Apply the merges one after the other, each from left to right."""
    out = []
    for word in regex.findall(bpe.WORDS, text):
        parts = [bytes([b]) for b in word.encode()]
        for token in tokens[256:]:
            i = 0
            while i + 1 < len(parts):
                if parts[i] + parts[i + 1] == token:
                    parts[i : i + 2] = [token]
                i += 1
        out += [tokens.index(part) for part in parts]
    return out


@pytest.fixture(scope="module")
def story():
    return bpe.train(STORY, 330)


@QUICK
@given(st.text("aaab .\n", max_size=120), st.integers(0, 50))
@example(STORY, 73)
def test_training_equals_its_definition(text, number):
    merges = slow_merges(text, number)
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    encoding = bpe.train(text, 257 + len(merges))
    assert tokens_of(encoding)[:-1] == tokens


def test_vocabulary_counts_bytes_merges_and_the_special_token(story):
    assert (story.n_vocab, story.eot_token) == (330, 329)
    assert story.special_tokens_set == {"<|endoftext|>"}
    assert tokens_of(story)[:256] == [bytes([i]) for i in range(256)]
    assert len(set(tokens_of(story))) == 330
    # in a text it is ordinary text
    ids = story.encode_ordinary("a<|endoftext|>b")
    assert story.eot_token not in ids
    assert story.decode(ids) == "a<|endoftext|>b"


def test_documents_train_as_one_text_where_words_do_not_cross():
    lines = STORY.splitlines(keepends=True)
    a, b = bpe.train(iter(lines), 300), bpe.train(STORY, 300)
    assert tokens_of(a) == tokens_of(b)


LIKELY = st.lists(st.sampled_from("ogfrs at'\n"), max_size=80).map("".join)


@QUICK
@given(TEXT | LIKELY)
def test_encoding_repeats_the_merges(story, text):
    got = story.encode_ordinary(text)
    assert got == slow_encode(text, tokens_of(story)[:-1])
    assert story.decode(got) == text


@QUICK
@given(st.binary(max_size=100))
def test_every_byte_string_has_tokens(story, raw):
    ids = [tokens_of(story).index(bytes([b])) for b in raw]
    assert story.decode_bytes(ids) == raw
    text = raw.decode("latin-1")
    assert story.decode(story.encode_ordinary(text)) == text


@QUICK
@given(TEXT)
def test_byte_encoding_is_utf8(text):
    encoding = bpe.byte()
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert bytes(encoding.encode_ordinary(text)) == text.encode()


@pytest.mark.parametrize("size", [0, 256, 65537, 258.5, "258"])
def test_vocabulary_size_out_of_range(size):
    with pytest.raises(ValueError, match=rf"\[257, 65536\], got {size!r}"):
        bpe.train("text", size)


@pytest.mark.parametrize("text", ["", "abc", "aaaa"])
def test_text_too_small_for_the_vocabulary(text):
    most = 259 if text else 257
    assert bpe.train(text, most).n_vocab == most
    with pytest.raises(ValueError, match=f"at most {most}, got {most + 1}"):
        bpe.train(text, most + 1)


@pytest.mark.parametrize("text, kind", [
    (b"raw", "bytes"), ([b"raw"], "bytes"), ([1], "int"),
    (["good", None], "NoneType"),
])  # fmt: skip
def test_text_of_another_type(text, kind):
    with pytest.raises(TypeError, match=f"text must be str, got {kind}"):
        bpe.train(text, 257)


def test_one_long_word_is_not_quadratic():
    rng = random.Random(3)
    word = "".join(rng.choices("abcdefgh", k=100_000))
    start = time.process_time()
    bpe.train(word, 2000)
    assert time.process_time() - start < 10
