"""Byte-pair encoding, against its definition."""

import random
import time
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.text import bpe

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
# assigned characters only: libraries may differ on those of a newer Unicode
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=200)
STORY = """\
Four frogs sat on a log. One frog jumped, and three frogs sat on the log.
Then it rained for a week; the log floated off with three frogs on it, and
the fourth, who couldn't swim well, swam after them anyway. 'Wait!' it cried.
"""


def slow_merges(text, number):
    """The definition: count all pairs anew before each merge."""
    words = Counter(regex.findall(bpe.WORDS, text))
    words = {tuple(w.encode()): n for w, n in words.items()}
    merges = []
    for new in range(256, 256 + number):
        count = Counter()
        for word, n in words.items():
            for i in range(len(word) - 1):
                count[word[i : i + 2]] += n
        if not count:
            break
        merges.append(min(count, key=lambda pair: (-count[pair], pair)))
        changed = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                hit = word[i : i + 2] == merges[-1]
                out.append(new if hit else word[i])
                i += 1 + hit
            changed[tuple(out)] = n
        words = changed
    return merges


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


def tokens_of(encoding):
    return [
        encoding.decode_single_token_bytes(i)
        for i in range(encoding.n_vocab - 1)
    ]


@pytest.fixture(scope="module")
def story():
    return bpe.train(STORY, 330)


@QUICK
@given(st.text("aaab .\n", max_size=120), st.integers(0, 50))
def test_training_equals_its_definition(text, number):
    merges = slow_merges(text, number)
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    encoding = bpe.train(text, 257 + len(merges))
    assert tokens_of(encoding) == tokens


def test_training_equals_its_definition_on_prose():
    merges = slow_merges(STORY, 73)
    assert bpe._learn(bpe._count_words(STORY), 73) == merges


def test_ties_go_to_the_lowest_pair():
    assert tokens_of(bpe.train("zy xw", 258))[256] == b" x"
    assert tokens_of(bpe.train("zy,ba", 258))[256] == b"ba"


def test_overlapping_pairs_merge_from_the_left():
    encoding = bpe.train("aaaaaaa", 259)
    assert tokens_of(encoding)[256:] == [b"aa", b"aaaa"]
    got = encoding.decode_tokens_bytes(encoding.encode_ordinary("aaaaaaa"))
    assert got == [b"aaaa", b"aa", b"a"]


def test_vocabulary_counts_bytes_merges_and_the_special_token(story):
    assert story.n_vocab == 330
    assert story.eot_token == 329
    assert story.special_tokens_set == {"<|endoftext|>"}
    assert tokens_of(story)[:256] == [bytes([i]) for i in range(256)]
    assert len(set(tokens_of(story))) == 329


def test_special_token_in_a_text_is_ordinary_text(story):
    ids = story.encode_ordinary("a<|endoftext|>b")
    assert story.eot_token not in ids
    assert story.decode(ids) == "a<|endoftext|>b"


def test_documents_train_as_one_text_where_words_do_not_cross():
    lines = STORY.splitlines(keepends=True)
    a, b = bpe.train(iter(lines), 300), bpe.train(STORY, 300)
    assert tokens_of(a) == tokens_of(b)


def test_smaller_vocabulary_is_the_start_of_a_larger(story):
    small = bpe.train(STORY, 290)
    assert tokens_of(small) == tokens_of(story)[:289]


@QUICK
@given(TEXT)
def test_encoding_repeats_the_merges(story, text):
    got = story.encode_ordinary(text)
    assert got == slow_encode(text, tokens_of(story))
    assert story.decode(got) == text


@QUICK
@given(st.lists(st.sampled_from("ogfrs at'\n"), max_size=80).map("".join))
def test_encoding_repeats_the_merges_on_likely_words(story, text):
    assert story.encode_ordinary(text) == slow_encode(text, tokens_of(story))


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
    assert encoding.n_vocab == 257
    assert encoding.eot_token == 256
    assert bytes(encoding.encode_ordinary(text)) == text.encode()


@pytest.mark.parametrize("size", [0, 256, 65537])
def test_vocabulary_size_out_of_range(size):
    with pytest.raises(ValueError, match=rf"\[257, 65536\], got {size}"):
        bpe.train("text", size)


@pytest.mark.parametrize(
    "text, most", [("", 257), ("abc", 259), ("aaaa", 259)]
)
def test_text_too_small_for_the_vocabulary(text, most):
    assert bpe.train(text, most).n_vocab == most
    with pytest.raises(ValueError, match=f"at most {most}, got {most + 1}"):
        bpe.train(text, most + 1)


@pytest.mark.parametrize("text", [[b"raw"], [1], ["good", None]])
def test_text_of_another_type(text):
    with pytest.raises(TypeError, match="text must be str, got"):
        bpe.train(text, 257)


def random_prose(size):
    """Text with some tens of thousands of distinct words."""
    rng = random.Random(7)
    parts = ["ta", "ri", "mon", "es", "qua", "lu", "ber", "in", "o", "ck"]
    words = ["".join(rng.choices(parts, k=1 + k % 6)) for k in range(60_000)]
    rank = [1 / (k + 1) for k in range(len(words))]
    return " ".join(rng.choices(words, rank, k=size // 7))


def test_five_megabytes_to_1024_tokens_in_30_seconds():
    text = random_prose(5_000_000)
    assert len(text) > 4_500_000
    start = time.process_time()
    encoding = bpe.train(text, 1024)
    assert time.process_time() - start < 30
    assert encoding.n_vocab == 1024


def test_one_long_word_is_not_quadratic():
    rng = random.Random(3)
    word = "".join(rng.choices("abcdefgh", k=100_000))
    start = time.process_time()
    bpe.train(word, 2000)
    assert time.process_time() - start < 10
