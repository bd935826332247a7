"""Sampling: distributions, draws, the loop, text from tokens."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.config import GPT2Config
from llmnb.model.generate import (
    decoded,
    distribution,
    draw,
    generate,
    generate_samples,
    window_logits,
    window_start,
)
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer

few = settings(max_examples=50, deadline=None, derandomize=True)

T, V = 8, 131
CFG = GPT2Config(16, V, 2, 2, 16)


def tiny_model(seq_len=T, batch_size=1):
    model = GPT2(CFG, batch_size, seq_len, "reference", "fp64")
    for p in model.params.values():
        p *= 5  # far from uniform
    return model


# distributions


def by_definition(z, heat, top_k, top_p):
    """Sort all, keep the first k, then the fewest that reach p."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = np.array(order[: top_k if heat else 1])
    p = np.exp((z[order] - z.max()) / (heat or 1))
    p /= p.sum()
    inside = np.cumsum(p) - p < (top_p or 1)
    inside[0] = True
    out = np.zeros(len(z))
    out[order[inside]] = p[inside] / p[inside].sum()
    return out


@settings(few, max_examples=150)
@given(
    st.integers(0, 99),
    st.integers(1, 3000),
    st.integers(0, 2),
    st.sampled_from([0, 1.0]) | st.floats(0.1, 10),
    st.none() | st.integers(1, 4000),
    st.none() | st.floats(0.01, 1),
)
def test_a_distribution_is_what_a_sort_keeps(seed, V, digits, heat, k, top_p):
    z = np.random.RandomState(seed).normal(0, 2, V).round(digits)  # equals
    got = distribution(z, heat, k, top_p)
    want = by_definition(z, heat, k, top_p)
    assert abs(got - want).max() < 1e-12 or near_the_border(z, heat, k, top_p)


def test_a_sum_that_reaches_p_is_enough():
    p = distribution(np.zeros(4), top_p=0.5)  # a quarter each, exactly
    assert p.tolist() == [0.5, 0.5, 0, 0]


def near_the_border(z, heat, top_k, top_p):
    """Whether a rounding decides if one more token is kept."""
    p = np.sort(by_definition(z, heat, top_k, None))[::-1]
    return top_p is not None and abs(np.cumsum(p) - top_p).min() < 1e-12


@pytest.mark.parametrize("shape", [(), (0,), (3, 3), (1, 3)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_are_those_of_one_token(shape, temperature):
    with pytest.raises(
        ValueError, match=r"logits must have shape \(V,\), got"
    ):
        distribution(np.zeros(shape), temperature)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("least", [5e-324, np.float32(1e-45), 1e-300])
def test_the_lowest_temperatures_are_greedy(least):
    """Though a difference divided by them is beyond all numbers."""
    logits = np.array([-3e38, 1, 2, -np.inf])
    assert distribution(logits, least).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits(bad):
    with pytest.raises(ValueError, match="not finite"):
        distribution(np.array([0.0, bad, 1.0]))


# draws


@few
@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5]), min_size=1, max_size=9)
    .map(np.array)
    .filter(lambda p: p.sum() > 0),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_falls_on_its_piece(probs, u):
    p = probs / probs.sum()
    token = draw(p, u)
    assert p[token] > 0
    below, above = p[:token].sum(), p[: token + 1].sum()
    assert below - 1e-12 <= u <= above + 1e-12


# the loop


def by_hand(model_of, tokens, count):
    """Greedy continuation with a model of exactly the text's length."""
    text = list(tokens)
    for _ in range(count):
        last = list(text)
        while len(last) > T:
            last = last[T // 2 :]
        model = model_of(len(last))
        model.forward(np.array([last]))
        text.append(int(np.argmax(model.logits[0, -1])))
    return text[len(tokens) :]


@pytest.mark.parametrize("start", [[5], [1, 2, 3], list(range(20))])
def test_greedy_is_what_a_model_of_that_length_says(start):
    want = by_hand(tiny_model, start, 15)
    got = list(generate(tiny_model(), start, 15, temperature=0))
    assert got == want
    assert len(set(got)) > 1, "a text of one token would show little"


SEED = r"must be a whole number in \[0, 2\*\*32\)"
COLD = "must be at least 0 and finite"
WHOLE = "must be a whole number of at least"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, f"{COLD}, got -0.1"),
        ({"temperature": np.nan}, ValueError, f"{COLD}, got nan"),
        ({"temperature": np.inf}, ValueError, f"{COLD}, got inf"),
        ({"temperature": "1"}, ValueError, f"{COLD}, got '1'"),
        ({"temperature": None}, ValueError, f"{COLD}, got None"),
        ({"top_k": "3"}, ValueError, "must be a whole number of at least 1"),
        ({"top_k": 0}, ValueError, "must be a whole number of at least 1"),
        ({"top_k": 2.5}, ValueError, "must be a whole number"),
        ({"top_k": np.inf}, ValueError, "must be a whole number"),
        ({"top_k": np.nan}, ValueError, "must be a whole number"),
        ({"top_p": 0}, ValueError, "must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, ValueError, "must be above 0 and at most 1, got 1.1"),
        ({"top_p": np.nan}, ValueError, "must be above 0 and at most 1"),
        ({"top_p": "1"}, ValueError, "must be above 0 and at most 1, got '1'"),
        ({"tokens": []}, ValueError, "must hold at least one token"),
        ({"tokens": [V]}, ValueError, rf"must lie in \[0, {V}\)"),
        ({"tokens": ["a"]}, TypeError, "must hold integers"),
        ({"tokens": "a"}, TypeError, "must hold integers"),
        ({"tokens": iter([1])}, TypeError, "must hold integers"),
        ({"tokens": [[1]]}, ValueError, r"must have shape \(n,\), got \(1, 1"),
        ({"count": -1}, ValueError, f"{WHOLE} 0, got -1"),
        ({"count": 1.0}, ValueError, f"{WHOLE} 0, got 1.0"),
        ({"samples": 0}, ValueError, f"{WHOLE} 1, got 0"),
        ({"samples": np.inf}, ValueError, f"{WHOLE} 1, got inf"),
        ({"seed": -1}, ValueError, SEED),
        ({"seed": 2**32}, ValueError, SEED),
        ({"seed": 1.5}, ValueError, SEED),
        ({"seed": None}, ValueError, SEED),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(change, error, message):
    ask, (name,) = {"tokens": [1], "count": 1, "samples": 1} | change, change
    calls = [partial(generate_samples, tiny_model(), **ask)]
    if name in ("temperature", "top_k", "top_p"):
        calls.append(partial(distribution, np.zeros(3), **change))
    for call in calls:
        with pytest.raises(error, match=f"{name} {message}"):
            call()


# several texts


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_samples_are_the_texts_of_the_next_seeds(batch_size):
    model = tiny_model(batch_size=batch_size)
    steps = list(generate_samples(model, [1, 2], 25, 3, seed=5))
    assert len(steps) == 25 and all(len(step) == 3 for step in steps)
    for i in range(3):
        alone = list(generate(model, [1, 2], 25, seed=5 + i))
        assert [step[i] for step in steps] == alone
    assert len(set(zip(*steps, strict=True))) == 3


def test_a_text_is_drawn_with_its_seed():
    """By a model without weights, to which all tokens are alike."""
    model = GPT2(CFG, 1, T, "reference", seed=None)
    draws = np.random.RandomState(11).random_sample(9)
    wanted = [int(u * V) for u in draws]
    assert list(generate(model, [0], 9, seed=11)) == wanted


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint32, np.int64])
def test_numbers_of_numpy(kind):
    """However narrow they are."""
    model, text = tiny_model(), np.array([1, 2], kind)
    steps = generate_samples(model, text, kind(5), kind(2), seed=kind(127))
    want = generate_samples(model, [1, 2], 5, 2, seed=127)
    assert list(steps) == list(want)


@pytest.mark.parametrize("length", [0, T + 1])
def test_a_text_that_fits_no_window(length):
    says = f"a text must have 1 to {T} tokens, got {length}"
    with pytest.raises(ValueError, match=f"window_logits: {says}"):
        window_logits(tiny_model(), [[1] * length])


def test_the_seed_after_the_last_is_the_first():
    steps = generate_samples(tiny_model(), [1], 5, 2, seed=2**32 - 1)
    second = [step[1] for step in steps]
    assert second == list(generate(tiny_model(), [1], 5, seed=0))


def test_samples_end_one_by_one():
    model = tiny_model()
    free = [list(generate(model, [1], 40, seed=s)) for s in (3, 4, 5)]
    stop = free[1][2]
    want = [x[: x.index(stop)] if stop in x else x for x in free]
    steps = list(generate_samples(model, [1], 40, 3, seed=3, stop=stop))
    for i, text in enumerate(want):
        got = [step[i] for step in steps]
        assert got == text + [None] * (len(steps) - len(text))
    assert len(steps) == max(map(len, want))


@pytest.mark.parametrize("T", [1, 2, 3, 8, 1024])
def test_window(T):
    before = 0
    for length in range(1, 5 * T + 3):
        first = window_start(length, T)
        assert length - first <= T and first >= before
        assert first == 0 if length <= T else length - first >= T // 2
        assert first == before or length - before > T, "moves when full"
        before = first


# text


@few
@given(st.text(max_size=20))
def test_decoded_text(text):
    encoding = tokenizer.byte()
    pieces = list(decoded(encoding, text.encode("utf-8")))
    assert "".join(pieces) == text
    assert all(pieces)


def test_decoded_waits_for_the_whole_character():
    encoding = tokenizer.byte()
    assert list(decoded(encoding, "é€".encode())) == ["é", "€"]
    assert list(decoded(encoding, b"a\xffb\xc3")) == ["a", "�", "b", "�"]


def test_a_row_without_a_token_can_be_printed():
    """Many models have more rows than their tokenizer has tokens."""
    encoding = tokenizer.byte()
    assert encoding.n_vocab == 257
    assert list(decoded(encoding, [97, 257, 98])) == ["a", "\ufffd", "b"]
