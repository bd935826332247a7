"""What a layer takes: the same from every backend.

tests/floor/test_shapes.py makes wrong arrays of each kind from what a layer
says it takes; here the backends say it, each for itself.
"""

import inspect

import layers
import pytest

from llmnb import cpu, cuda, reference

LAYERS = [
    name
    for name in reference.__all__
    if hasattr(getattr(reference, name), "arguments")
]
OWN = {"work", "bf16", "version"}  # what only compiled layers take
ALONE = {
    "adamw_update", "clip_gradients", "global_norm", "matmul_learn",
    "softcap_forward", "capped_crossentropy_backward",
}  # fmt: skip
ON_HOSTS = {"matmul_learn"}  # what no GPU has


def parameters(layer):
    found = inspect.signature(layer).parameters
    return [x for name, x in found.items() if name not in OWN]


def taken(layer):
    """Names, sizes and marks of the arrays that both backends have."""
    return (
        [
            (a.name, a.sizes, a.names, a.written, a.optional, a.same, a.limit)
            for a in layer.arguments.arrays
            if a.name != "work"
        ],
        layer.arguments.numbers,
        layer.arguments.below,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_the_backends_take_the_same(name):
    want, compiled = getattr(reference, name), getattr(cpu, name)
    assert taken(compiled) == taken(want)
    there = [compiled] if name in ON_HOSTS else [compiled, getattr(cuda, name)]
    for layer in there:
        assert parameters(layer) == parameters(want)


def test_all_layers_are_compared():
    """Those with a row in tests/layers.py, and some that have no twin."""
    rows = [way for layer in layers.LAYERS for way in layer.ways]
    assert {*rows, *ALONE} == {*LAYERS}
