"""Write data/library.jsonl.gz, the text that chapters and tests learn from.

    python3.11 tests/record_library.py

The beginning of the corpus `stdlib`. It depends on the Python that runs this:
the file that is kept was written by 3.11.7.
"""

import gzip
import io
import json
import sys

from recorded import DATA

from llmnb.text import corpus

CHARACTERS = 2_000_000


def main():
    documents = corpus.load_corpus("stdlib", limit=CHARACTERS)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        for text in documents:
            line = json.dumps({"text": text}, ensure_ascii=False)
            file.write(line.encode() + b"\n")
    (DATA / "library.jsonl.gz").write_bytes(packed.getvalue())
    print(f"Python {sys.version.split()[0]}: {len(documents)} documents")


if __name__ == "__main__":
    main()
