"""Draw book/_static/card.png, what a message shows that links to the book.

.venv/bin/python book/_ext/social_card.py
"""

from pathlib import Path

from matplotlib.figure import Figure

STATIC = Path(__file__).parents[1] / "_static"
BLUE, ORANGE, INK, PAPER = "#0a5f9e", "#f08a3c", "#15191e", "#dfe5eb"
TITLE = "GPT-2 from its equations"
LINES = ("derived by hand, proved, made fast, trained:", "one layer a chapter")
EQUATION = (
    r"$dx_j = r\,\left( d\hat x_j - \overline{d\hat x}"
    r" - \hat x_j\;\overline{d\hat x\,\hat x} \right)$"
)


def draw():
    """The card, 1200 by 630 pixels."""
    fig = Figure(figsize=(12, 6.3), dpi=100, facecolor=INK)
    fig.text(0.07, 0.8, "llmnb", size=30, color=ORANGE, family="monospace")
    fig.text(0.07, 0.62, TITLE, size=50, color="white", weight="bold")
    for i, line in enumerate(LINES):
        fig.text(0.07, 0.51 - 0.08 * i, line, size=27, color=PAPER)
    fig.text(0.07, 0.17, EQUATION, size=40, color="#7dbdf0")
    ax = fig.add_axes((0, 0, 1, 0.03))
    ax.set_facecolor(BLUE)
    ax.set(xticks=[], yticks=[])
    return fig


if __name__ == "__main__":
    draw().savefig(STATIC / "card.png", facecolor=INK)
