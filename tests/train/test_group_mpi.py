"""Real processes that train together, started by the wheel's mpirun.

LLMNB_KILLS=30 kills at 30 random moments instead of two.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from commands import LIBRARY
from processes import ROOT, output, wait_for
from runs import learnt, rows

MPIRUN = Path(sys.executable).with_name("mpirun")
HERE = importlib.util.find_spec("mpi4py") and MPIRUN.exists()
NONE = "no mpi4py and mpirun here: pip install llmnb[mpi]"
PROC = Path("/proc/self/environ").exists()
pytestmark = [
    pytest.mark.skipif(not HERE, reason=NONE),
    pytest.mark.skipif(not PROC, reason="ranks are found in /proc"),
]
OPTIONS = (
    "-m llmnb.cli train --tokenizer byte --limit 30000 --num-layers 1 "
    "--num-heads 2 --channels 32 --seq-len 16 --batch-size 2 "
    "--total-batch 128 --steps 50 --eval-every 20 --eval-batches 3 "
    "--save-every 5 --keep 3 --skip-loss 2 --skip-norm 2 --skip-window 8"
)
TRAIN = [*OPTIONS.split(), "--corpus", LIBRARY, "--threads", 1]
LIMIT = 10  # seconds in which all ranks must be gone


def ranks(*commands):
    """Start mpirun with some (count, environment, arguments of Python).

    Returns its Popen, and the mark by which its ranks are found.
    """
    mark = uuid.uuid4().hex
    line = [MPIRUN, "--oversubscribe", "--bind-to", "none"]
    line += ["--allow-run-as-root"] if os.getuid() == 0 else []
    for count, where, args in commands:
        pairs = [f"{name}={value}" for name, value in where.items()]
        line += ["-n", count, "env", *pairs, sys.executable, *args, ":"]
    process = subprocess.Popen(
        [str(x) for x in line[:-1]], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LLMNB_MARK": mark},
    )  # fmt: skip
    return process, mark


def run(*commands):
    """Run to the end: its code, and all that it wrote."""
    process, mark = ranks(*commands)
    out, err = process.communicate(timeout=300)
    assert not found(mark)
    return process.returncode, out + err


def ended(*commands):
    """What is written by a run that must not fail."""
    code, said = run(*commands)
    assert code == 0, said
    return said


def refused(*commands):
    """The one line of error of a run that must fail."""
    code, said = run(*commands)
    lines = [x for x in said.splitlines() if "llmnb: error" in x]
    assert code != 0 and len(lines) == 1, said
    return lines[0]


def alone(*args, **where):
    """What a command writes in one process that mpirun did not start."""
    program = "from llmnb.cli.__main__ import main; main()"
    return output(program, *args, **where)


def found(mark):
    """The living ranks that have a mark: pid by rank."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2]
        except OSError:
            continue
        name = b"OMPI_COMM_WORLD_RANK="
        rank = [x[len(name) :] for x in words if x.startswith(name)]
        marked = f"LLMNB_MARK={mark}".encode() in words
        if marked and rank and "Z" not in state:
            pids[int(rank[0])] = int(path.parent.name)
    return pids


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process, which mpirun did not start."""
    folder = tmp_path_factory.mktemp("one") / "a"
    alone(*TRAIN[2:], "--out", folder, "--threads", 2)
    return folder


@pytest.fixture
def args(tmp_path):
    """The arguments of a run in the folder a."""
    return [*TRAIN, "--out", tmp_path / "a"]


@pytest.mark.parametrize(("size", "count"), [(2, 1), (2, 2), (4, 1)])
def test_the_bits_are_those_of_one(size, count, one, args, tmp_path):
    said = ended((size, {}, [*args, "--threads", count]))
    assert said.count("corpus  ") == 1, "one speaks for all"
    assert learnt(tmp_path / "a") == learnt(one)


@pytest.mark.parametrize(
    "number", range(int(os.environ.get("LLMNB_KILLS", 2)))
)
def test_a_killed_rank_loses_nothing(number, one, args, tmp_path):
    """At any moment after the first state, in the midst of another too."""
    draw, folder = random.Random(number), tmp_path / "a"
    size, other = draw.sample([1, 2, 4], 2)
    size = max(size, 2)
    process, mark = ranks((size, {}, args))
    at = draw.randint(2, 45)
    wait_for(lambda: rows(folder) > at)
    time.sleep(draw.random() / 10)
    victim = found(mark)[draw.randrange(size)]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    wait_for(lambda: not found(mark))
    assert time.monotonic() - start < LIMIT
    assert process.returncode != 0 and "rank" in out + err
    if not any(folder.glob("state_*")):
        other = size
    again = ["-m", "llmnb.cli", "train", "--resume", folder, "--threads", 1]
    ended((other, {}, again))
    assert learnt(folder) == learnt(one)


def endless(args, folder):
    """Two ranks of a run that goes on and on, after some steps."""
    process, mark = ranks((2, {}, [*args, "--steps", 10**6]))
    wait_for(lambda: rows(folder) > 6)
    return process, mark


def test_a_rank_that_hangs_ends_all(args, tmp_path):
    process, mark = endless(args, tmp_path / "a")
    os.kill(found(mark)[1], signal.SIGSTOP)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < LIMIT
    assert err.count("llmnb: error: rank 1 on ") == 1, err
    assert "has not answered for" in err and not found(mark)


EXITS = """
from llmnb.train import run
from llmnb.cli.__main__ import main

def leave(*args):
    raise SystemExit(3)

run.save_state = leave
main()
"""


def test_a_rank_that_ends_ends_all(args):
    """It says why, and the others do not wait for it."""
    said = refused((1, {}, args), (1, {}, ["-c", EXITS, *args[2:]]))
    assert "rank 1 on" in said and "it has left with 3" in said


@pytest.mark.parametrize(("where", "more", "words"), [
    ({}, ["--seed", "7"], "another seed than rank 0: 7, not 42"),
    ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, [],
     "another NUMBA_CPU_FEATURES than rank 0"),
])  # fmt: skip
def test_ranks_that_differ_are_refused(where, more, words, args, tmp_path):
    """By what they were asked for, and by what their processes are."""
    said = refused((1, {}, args), (1, where, [*args, *more]))
    assert "rank 1 on" in said and words in said
    assert not (tmp_path / "a" / "config.json").exists()


def test_an_mpi_of_one_thread_is_refused(args, tmp_path):
    few = {"MPI4PY_RC_THREAD_LEVEL": "serialized"}
    code, said = run((2, few, args))
    assert code != 0 and "MPI_THREAD_MULTIPLE" in said
    assert not (tmp_path / "a" / "config.json").exists()


def test_a_group_that_is_asked_to_stop_saves(args, tmp_path):
    process, mark = endless(args, tmp_path / "a")
    os.kill(found(mark)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "and saved" in out and "llmnb: error" not in out + err
    assert not found(mark)


UNEVEN = """
import numpy as np
from llmnb.train.exchange import exchange, shards
from llmnb.train.group import Tree
from llmnb.train.machines import find_group

def tree(pieces):
    made = Tree(lambda a, b: np.add(a, b, out=b))
    for k in pieces:
        made.push(k, k + 1, given[k].copy())
    return made

group = find_group()
given = np.random.default_rng(0).normal(size=(15, 1001)).astype("f4")
blocks = tree(group.share(15)).blocks
grads = blocks[-1][2]
exchange(group, grads, blocks, 15)
mine = slice(*shards(1001, group.size)[group.rank])
same = np.array_equal(grads[mine], tree(range(15)).whole()[mine])
print(f"{len(blocks)} blocks, the same: {same}")
group.close()
"""


def test_ranks_with_unlike_numbers_of_blocks():
    """Who has no block in a round sends nothing, and receives."""
    said = ended((3, {}, ["-c", UNEVEN]))
    assert said.count("2 blocks, the same: True") == 1, said
    assert said.count("3 blocks, the same: True") == 2, said


# Each rank has a simulated GPU

GPU = (
    "-m llmnb.cli train --tokenizer byte --limit 3000 --num-layers 1 "
    "--num-heads 1 --channels 8 --seq-len 4 --batch-size 1 --total-batch 8 "
    "--steps 2 --eval-every 2 --eval-batches 1 --save-every 2 --skip-loss 9 "
    "--skip-norm 9 --backend cuda --threads 1"
)
ON_GPU = [*GPU.split(), "--corpus", LIBRARY]
SIMULATED = {"LLMNB_CUDA": "simulator"}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """The folder of a run of a group of one."""
    pytest.importorskip("greenlet", reason="the simulator needs greenlet")
    folder = tmp_path_factory.mktemp("gpu") / "a"
    alone(*ON_GPU[2:], "--group", "mpi", "--out", folder, **SIMULATED)
    return folder


@pytest.mark.parametrize("over", ["mpi", "nccl"])
def test_gpus_have_the_bits_of_one(over, one_gpu, nccl_path, tmp_path):
    """Through the hosts, and over the stand-in for NCCL."""
    where = {"LD_LIBRARY_PATH": nccl_path.parent} if over == "nccl" else {}
    args = [*ON_GPU, "--group", over, "--out", tmp_path / "a"]
    ended((2, SIMULATED | where, args))
    assert learnt(tmp_path / "a") == learnt(one_gpu)


def test_gpus_without_nccl_end_with_one_error(tmp_path):
    for name in "nvidia", "nvidia.nccl":  # the second is looked for in it
        if not importlib.util.find_spec(name):
            break
    else:
        pytest.skip("there is an NCCL")
    args = [*ON_GPU, "--group", "nccl", "--out", tmp_path / "a"]
    said = refused((2, SIMULATED, args))
    assert "needs NCCL" in said and "--group mpi" in said


BENCH = (
    "-m llmnb.cli bench --num-layers 1 --num-heads 2 --channels 32 "
    "--seq-len 16 --batch-size 2 --vocab-size 300 --steps 2 --threads 1"
)


def test_bench_measures_a_group(tmp_path):
    more = ["--total-batch", 4 * 32, "--json", tmp_path / "a.json"]
    said = ended((2, {}, [*BENCH.split(), *more]))
    assert said.count("efficiency") == 1, "one reports for all"
    found = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert found["ranks"] == 2 and found["threads"] == 1
    (contest,) = found["contests"]
    alone, both, *each = contest["contestants"]
    speed = [x["tokens_per_second"] * x["step_seconds"] for x in (alone, both)]
    assert speed == pytest.approx([128, 128])
    share = alone["step_seconds"] / both["step_seconds"]
    assert both["efficiency"] == pytest.approx(share / 2)
    assert sum(x["sent"] for x in each) == 8 * contest["parameters"]
    assert all(x["memory_bytes"] > 1e7 for x in each)
    assert all(0 < x["waiting_seconds"] < max(both["seconds"]) for x in each)


@pytest.mark.parametrize(("more", "words"), [
    (["--write"], "--write is of one process"),
    (["--in-backward"], "--in-backward is of one process"),
    (["--total-batch", "96"], "a multiple of 64 tokens"),
    (["--backend", "reference"], "backend must be"),
])  # fmt: skip
def test_bench_refuses_what_a_group_cannot(more, words):
    assert words in refused((2, {}, [*BENCH.split(), *more]))


def files(folder):
    return {x.name: x.read_bytes() for x in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`llmnb data` of four batches, without its folder, and its files."""
    folder = tmp_path_factory.mktemp("data") / "a"
    args = ["--tokenizer", "byte", "--shard-tokens", 30_000, "--threads", 1]
    args += ["--corpus", LIBRARY, LIBRARY]
    alone("data", folder, *args)
    return args, files(folder)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_has_the_bytes_of_one(size, data, tmp_path):
    args, want = data
    line = ["-m", "llmnb.cli", "data", tmp_path / "a", *args]
    said = ended((size, {}, [*line, "--group", "mpi"]))
    assert said.count("corpus  ") == 1, "one speaks for all"
    assert len(want) > 100 and files(tmp_path / "a") == want


def test_data_goes_on_with_other_ranks(data, tmp_path):
    args, want = data
    line = ["-m", "llmnb.cli", "data", tmp_path / "a", *args]
    process, mark = ranks((2, {}, line))
    wait_for(lambda: len([*tmp_path.glob("a/train*")]) > 3)
    os.kill(found(mark)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0, out + err
    wait_for(lambda: not found(mark))
    assert (tmp_path / "a" / "unfinished.json").exists()
    ended((3, {}, line))
    assert files(tmp_path / "a") == want


def test_data_of_ranks_that_differ_is_refused(data, tmp_path):
    args, _ = data
    (tmp_path / "b.txt").write_text("another text")
    line = ["-m", "llmnb.cli", "data", tmp_path / "a", *args]
    other = [*line[:4], "--corpus", tmp_path / "b.txt", *args[:-3]]
    said = refused((1, {}, line), (1, {}, other))
    assert "another corpus than rank 0" in said
    assert not [*tmp_path.glob("a/*")]


@pytest.fixture(scope="module")
def scored(one, tmp_path_factory):
    """`llmnb eval` of a text and of five examples, and what it prints."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "a.txt").write_text("def spam(eggs):\n    return eggs\n" * 20)
    ends = ["sat on it", "ate", "went away again", "is not here"]
    example = {"ctx": "The cat", "endings": ends}
    lines = [json.dumps(example | {"label": k % 4}) for k in range(5)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    args = ["-m", "llmnb.cli", "eval", one, "--threads", 1]
    args += ["--text", folder / "a.txt", "--hellaswag", folder / "a.jsonl"]
    return args, alone(*args[2:])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_scores_are_those_of_one(size, scored):
    args, want = scored
    said = ended((size, {}, [*args, "--group", "mpi"]))
    assert "acc_norm" in want and want in said
    assert said.count("perplexity") == 1, "one speaks for all"


def test_scores_of_ranks_that_differ_are_refused(scored):
    args, _ = scored
    said = refused((1, {}, args), (1, {}, [*args, "--stride", "3"]))
    assert "another stride than rank 0" in said
