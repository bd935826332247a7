"""What the tests of the bench share."""

from pathlib import Path

import pytest

EXTENSIONS = Path(__file__).parents[2] / "book" / "_ext"


@pytest.fixture(scope="module")
def results_page():
    """The program that writes the book's page of results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXTENSIONS))
        import results_page
    return results_page
