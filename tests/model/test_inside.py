"""Measures of what a model does inside."""

import numpy as np
import pytest

from llmnb import GPT2, GPT2Config
from llmnb.model.inside import induction_score, repeated_tokens, without_head

CFG = GPT2Config(8, 5, 2, 3, 6)


@pytest.mark.parametrize("head", [0, 1, 2, -1, np.int64(2)])
def test_a_head_is_silenced_and_nothing_else(head):
    params = GPT2(CFG, 1, 8, "reference", "fp64").params
    before = params["attprojw"].copy()
    silenced = without_head(params, 1, head, 3)
    changed = silenced["attprojw"] != before
    wanted = np.zeros_like(changed)
    wanted[1][:, [2 * head % 6, 2 * head % 6 + 1]] = True
    assert np.array_equal(changed, wanted)
    assert not silenced["attprojw"][wanted].any()
    assert np.array_equal(params["attprojw"], before)
    assert all(silenced[n] is params[n] for n in params if n != "attprojw")


@pytest.mark.parametrize("place", [(0, 3), (0, -4), (2, 0)])
def test_a_head_that_there_is_not(place):
    params = GPT2(CFG, 1, 8, "reference").params
    with pytest.raises(IndexError):
        without_head(params, *place, 3)


@pytest.mark.parametrize("repeat", [2, 3, 7])
def test_a_perfect_finder(repeat):
    tokens = repeated_tokens(9, repeat, batch_size=2)
    assert np.array_equal(tokens[:, :repeat], tokens[:, repeat:])
    T = tokens.shape[1]
    maps = np.zeros((2, 1, T, T))  # (B, NH, T, T)
    for t in range(T):
        maps[..., t, t - repeat + 1 if t >= repeat else 0] = 1
    assert induction_score(maps, repeat) == [1]


@pytest.mark.parametrize(("repeat", "T"), [(3, 5), (3, 7), (6, 6), (1, 2)])
def test_a_text_that_does_not_come_twice(repeat, T):
    says = f"must be of twice {repeat} tokens, got {T}"
    with pytest.raises(ValueError, match=f"induction_score: maps {says}"):
        induction_score(np.ones((1, 1, T, T)), repeat)
