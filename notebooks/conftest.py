"""What nbval does otherwise here than by default.

It gives a cell 5 s for its output after it has run: too few for ours. And of
pictures it skips PNG only: yours may be PNG where an SVG is stored.
"""

PICTURES = ("image/svg+xml",)


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60
            book = item.parent
            book.skip_compare = tuple({*book.skip_compare, *PICTURES})
