"""Learning rate schedules, and which tensors decay."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.train.schedule import KINDS, learning_rate


def test_warm_up_is_a_staircase():
    for kind in KINDS:
        rates = [learning_rate(s, 0.3, 3, 10, kind) for s in range(4)]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_cosine():
    # halfway down it is half way between peak and end
    assert learning_rate(60, 2.0, 20, 100, "cosine", 0.5) == 1.5
    want = 2.0 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(40, 2.0, 20, 100) == pytest.approx(want)


def test_linear():
    assert learning_rate(40, 2.0, 20, 100, "linear") == pytest.approx(1.5)
    assert learning_rate(60, 2.0, 20, 100, "linear", 0.5) == 1.5


def test_constant():
    rates = {learning_rate(s, 2.0, 0, 9, "constant", 0.1) for s in range(20)}
    assert rates == {2.0}


def test_wsd():
    assert learning_rate(80, 2.0, 20, 100, "wsd") == 2.0
    assert learning_rate(85, 2.0, 20, 100, "wsd") == pytest.approx(1.0)
    want = 2.0 * (0.1 + 0.9 * (1 - math.sqrt(0.5)))
    got = learning_rate(90, 2.0, 20, 100, "wsd", 0.1)
    assert got == pytest.approx(want)


@pytest.mark.parametrize("kind", KINDS)
def test_no_warm_up_starts_at_the_peak(kind):
    assert learning_rate(0, 0.7, 0, 100, kind, 0.1) == pytest.approx(0.7)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 40),
    rest=st.integers(0, 100),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_shape(kind, warmup, rest, final):
    """It climbs, never climbs again, and ends where it should."""
    total = max(1, warmup + rest)
    rates = [
        learning_rate(s, 0.5, warmup, total, kind, final)
        for s in range(total + 3)
    ]
    climb, fall = rates[:warmup], rates[warmup:]
    assert climb == sorted(climb)
    assert all(a >= b - 1e-15 for a, b in zip(fall, fall[1:], strict=False))
    assert all(0 <= r <= 0.5 + 1e-15 for r in rates)
    if rest:
        end = 0.5 if kind == "constant" else 0.5 * final
        assert rates[total] == pytest.approx(end)
        assert rates[total + 2] == rates[total]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"peak": -0.5}, "peak must be at least 0, got -0.5"),
        ({"peak": math.nan}, "peak must be at least 0, got nan"),
        ({"warmup": 11}, r"warmup must be in \[0, 10\], got 11"),
        ({"warmup": -1}, r"warmup must be in \[0, 10\], got -1"),
        ({"total": 0, "warmup": 0}, "total must be at least 1, got 0"),
        ({"final": 1.5}, r"final must be in \[0, 1\], got 1.5"),
        ({"kind": "cos"}, "no kind 'cos', only cosine, linear, constant"),
    ],
)
def test_bad_numbers(change, message):
    good = {"step": 0, "peak": 1.0, "warmup": 2, "total": 10}
    learning_rate(**good)
    with pytest.raises(ValueError, match="learning_rate: " + message):
        learning_rate(**(good | change))
