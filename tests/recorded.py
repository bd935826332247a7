"""What the scripts that record share: places, facts, and JSON."""

import json
import platform
from datetime import date
from pathlib import Path

BOOK = Path(__file__).parents[1] / "book"
DATA = Path(__file__).parent / "data"


def here():
    """The processor and the day, for a record to name."""
    today = date.today().isoformat()
    return {"processor": platform.machine(), "date": today}


def write_json(path, found):
    text = json.dumps(found, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
