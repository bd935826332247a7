"""The bits of every layer, of cold and warm processes and any threads."""

import json
from pathlib import Path

import bits as recorder
import pytest
from processes import output

TESTS = Path(__file__).parent

PROGRAM = """
import json
import bits
print(json.dumps({
    f"{precision} {shape}": bits.three_steps(shape, "cpu", precision, True)
    for precision in ("fp32", "fp64")
    for shape in bits.SHAPES
}))
"""


def test_bits_do_not_depend_on_the_cache_or_the_threads(tmp_path):
    """A process that compiles its kernels computes what one that loads them
    does: a run that is resumed must go on with the same bits."""
    place = {"LLMNB_CACHE": str(tmp_path), "cwd": TESTS}
    cold, warm, alone = (
        json.loads(output(PROGRAM, NUMBA_NUM_THREADS=threads, **place))
        for threads in "221"
    )
    assert len(cold) == 8 and sum(map(len, cold.values())) > 300
    assert warm == cold and alone == cold


@pytest.mark.parametrize("part", ["on_host", "on_simulator", "run_folder"])
def test_the_bits_are_the_recorded_ones(part):
    """Losses, logits, gradients, weights and files, commit after commit."""
    record = json.loads(recorder.RECORD.read_text())
    if recorder.machine() not in record:
        pytest.skip(f"no record for {recorder.machine()}; see tests/bits.py")
    found = getattr(recorder, part)()
    assert not recorder.different(found, record[recorder.machine()])
