"""nbval gives a cell 5 s for its output after it has run: too few here."""


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60
