"""What a layer takes: the same from every backend.

tests/floor/test_shapes.py makes wrong arrays of each kind from what a layer
says it takes; here two backends say it, each for itself.
"""

import pytest

from llmnb import cpu, reference

BOTH = [
    name
    for name in reference.__all__
    if hasattr(getattr(reference, name), "arguments")
]


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


@pytest.mark.parametrize("name", BOTH)
def test_the_backends_take_the_same(name):
    assert taken(getattr(cpu, name)) == taken(getattr(reference, name))


def test_all_layers_are_compared():
    assert len(BOTH) == 33
