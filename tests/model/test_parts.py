"""What follows from the table of tensors: who decays, and where it lies."""

import llmnb
from llmnb.model.tensors import decaying


def test_matrices_and_tables_decay():
    names = ["wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"]
    assert decaying(llmnb.GPT2Config()) == names
    assert decaying(llmnb.GemmaConfig()) == [x for x in names if x != "wpe"]


def test_who_decays_lies_first_in_memory():
    cfg = llmnb.GPT2Config(8, 20, 2, 2, 8)
    model = llmnb.GPT2(cfg, 1, 8, "reference")
    ranges = model._ranges(decaying(cfg))
    assert [x[2] for x in ranges] == [True, False]
    assert ranges[0][1] == ranges[1][0]
    assert ranges[1][1] == model.memory.flat("params").size
    assert len(model._ranges(("wte", "fcw"))) == 4
    assert model._ranges(None) == [(0, ranges[1][1], True)]
