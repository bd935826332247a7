"""The bits that a GPT-2 computes, as hashes: recorded, and compared.

    python tests/bits.py            say what differs from the record
    python tests/bits.py --record   write tests/data/bits.json anew

The last bits of float32 depend on the processor, on NumPy's and numba's
versions, so that the record has one set of hashes for each such machine. Any
other has no set: there, record one before a change, and compare after it.
On some processors NumPy's depend on the threads of its BLAS too. `make test`
gives it one: a set that is kept is recorded with OPENBLAS_NUM_THREADS=1.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("LLMNB_CUDA", "simulator")

import numba
import numpy as np

import llmnb

DATA = Path(__file__).with_name("data")
RECORD = DATA / "bits.json"
# max_seq_len, V, L, NH, C; B, T: even sizes, odd ones, more heads, one of each
SHAPES = [
    ((16, 61, 2, 2, 16), 2, 8),
    ((32, 257, 3, 4, 64), 3, 32),
    ((24, 300, 1, 3, 48), 1, 17),
    ((5, 7, 1, 1, 3), 1, 1),
]
ON_HOST = [
    ("reference", "fp32"),
    ("reference", "fp64"),
    ("cpu", "fp32"),
    ("cpu", "fp64"),
    ("cpu", "bf16"),
]
RUN = (
    "train --out run --corpus library.jsonl.gz --limit 30000 --steps 6 "
    "--learning-rate 0.002 "
    "--channels 32 --num-heads 2 --num-layers 2 --seq-len 16 --batch-size 4 "
    "--eval-every 3 --eval-batches 2 --save-every 3 --vocab-size 300"
)


def digest(data):
    """The first 12 hexadecimal digits of an array's, or bytes', SHA-256."""
    if not isinstance(data, bytes):
        data = np.ascontiguousarray(np.asarray(data)).tobytes()
    return hashlib.sha256(data).hexdigest()[:12]


def machine():
    """What the last bits depend on, in a line."""
    from numba.core.codegen import get_host_cpu_features

    features = digest(get_host_cpu_features().encode())
    tile = os.environ.get("LLMNB_TILE", "own")
    versions = f"numpy {np.__version__} numba {numba.__version__}"
    return f"features {features} tile {tile} {versions}"


def three_steps(shape, backend, precision, clip):
    """Hashes of what three steps of training compute, by name."""
    sizes, B, T = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = llmnb.GPT2Config(*sizes)
        model = llmnb.GPT2(cfg, B, T, backend, precision, seed=7)
    draw, found = np.random.RandomState(3), {}
    for step in (1, 2, 3):
        tokens = draw.randint(0, cfg.vocab_size, (B, T + 1))
        loss = model.forward(tokens[:, :-1], tokens[:, 1:])
        found[f"loss {step}"] = digest(np.float64(loss))
        found[f"logits {step}"] = digest(model.logits)
        model.backward()
        if step == 1:
            for name, array in model.grads.items():
                found[f"gradient of {name}"] = digest(array)
        if clip:
            norm = model.clip_gradients(0.5)
            found[f"norm {step}"] = digest(np.float64(norm))
        decay = ("wte", "qkvw", "fcw") if step == 3 else None
        model.update(learning_rate=1e-3, step=step, decay=decay)
    for name, array in model.params.items():
        found[f"{name} after three steps"] = digest(array)
    return found


def run_folder():
    """Hashes of the files of a trained run, without what the clock says."""
    from llmnb.cli.__main__ import main

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("library.jsonl.gz").symlink_to(DATA / "library.jsonl.gz")
        main(RUN.split())
        files = sorted(Path("run").iterdir())
        return {"run folder": {x.name: digest(without_time(x)) for x in files}}


def without_time(path):
    """A file's bytes, without speeds, versions and the machine's name."""
    if path.name == "config.json":
        config = json.loads(path.read_bytes())
        del config["versions"], config["machine"]
        return json.dumps(config).encode()
    if path.name == "log.csv":
        rows = [row.split(",") for row in path.read_text().splitlines()]
        return json.dumps([row[:5] + row[6:] for row in rows]).encode()
    return b"" if path.suffix == ".png" else path.read_bytes()


def cases(backends, numbers):
    """Hashes of the shapes of some numbers, clipped and not, by name."""
    return {
        f"{backend} {precision} shape {n}{' clipped' * clip}": three_steps(
            SHAPES[n], backend, precision, clip
        )
        for backend, precision in backends
        for n in numbers
        for clip in (False, True)
    }


def on_host():
    """All hashes of the backends that compute on the processor."""
    return cases(ON_HOST, range(len(SHAPES)))


def on_simulator():
    """All hashes of the cuda backend, run by the simulator."""
    return cases([("cuda", "fp32")], (0, 3))


def main():
    found = on_host() | on_simulator() | run_folder()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "--record" in sys.argv:
        record[machine()] = found
        RECORD.write_text(as_lines(record))
        return
    if machine() not in record:
        sys.exit(f"no record for {machine()}: make one with --record")
    if wrong := different(found, record[machine()]):
        sys.exit("\n".join(["not the recorded bits:", *wrong]))


def as_lines(record):
    """A record as JSON, a line for each case."""
    sets = []
    for name, found in record.items():
        rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
        sets.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "}")
    return "{" + ",\n".join(sets) + "}\n"


def different(found, record):
    """Names of what is not as recorded."""
    return [
        f"{case}: {name}"
        for case in found
        for name in record[case] | found[case]
        if found[case].get(name) != record[case].get(name)
    ]


if __name__ == "__main__":
    main()
