"""Record what training on several processes costs, for chapter 6.3.

    python tests/record_machines.py here          on this machine
    python tests/record_machines.py link          on two hosts with a link
    python tests/record_machines.py overlap       what sending meanwhile gains
    python tests/record_machines.py ddp PYTHON    PyTorch's DDP over gloo

needs the extra `mpi`, 8 GB of memory and two cores that nothing else uses.
Each part replaces its own in book/machines.json. `link` needs root on Linux:
two network namespaces stand for two hosts, and `tc` sets the rate between
them. `ddp` takes a Python that has torch and transformers.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
from recorded import BOOK, write_json

from llmnb.bench.race import Settings, facts_of
from llmnb.text.data import DataLoader
from llmnb.train.loop import Progress, train_step
from llmnb.train.machines import find_group
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

PLACE = BOOK / "machines.json"
MPIRUN = Path(sys.executable).with_name("mpirun")
B, T, V = 4, 64, 50257
RATES = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit", "10 Gbit/s": "10gbit"}
NAMES = "llmnbA", "llmnbB"


# in a rank


def timed(group):
    """A group that adds up the seconds in its calls."""
    group.seconds = 0.0

    def counting(call):
        def counted(*args):
            start = time.perf_counter()
            result = call(*args)
            group.seconds += time.perf_counter() - start
            return result

        return counted

    for name in ("gather", "exchange", "spread"):
        if hasattr(group, name):
            setattr(group, name, counting(getattr(group, name)))
    return group


def training(batches):
    """How GPT-2 124M trains with so many batches a step, and what it reads."""
    config = TrainConfig(
        depth=12, seq_len=T, batch_size=B, total_batch=B * T * batches,
        steps=100, learning_rate=3e-4,
    )  # fmt: skip
    text = np.random.default_rng(0).integers(0, V, 100 * B * T + 1)
    return config, DataLoader([text.astype(np.uint16)], B, T)


def leave(group, found, out):
    """The first rank writes what was found; then the group ends."""
    if group.first:
        Path(out).write_text(json.dumps(found), "utf-8")
    if group.size > 1:
        group.close()


def digest(model):
    return hashlib.sha256(model.memory.flat("params")).hexdigest()[:12]


def worker(micro, steps, threads, out):
    """Train GPT-2 124M for some steps, and write what it took."""
    numba.set_num_threads(threads)
    group, at = timed(find_group()), Progress()
    config, feed = training(micro)
    model = new_model(config, V, group)
    rows = []
    for _ in range(steps):
        group.gather("all are here")
        group.seconds, sent = 0.0, getattr(group, "sent", 0)
        start = time.perf_counter()
        loss, *_ = train_step(config, model, feed, at)
        seconds = time.perf_counter() - start
        sent = int(getattr(group, "sent", 0) - sent)
        rows.append((seconds, group.seconds, sent, loss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = {"arena": model.memory.nbytes} | model.memory.sizes()
    found = group.gather({
        "steps": rows, "peak": peak, "weights": digest(model), "sizes": sizes,
    })  # fmt: skip
    leave(group, found, out)


def overlap(steps, out):
    """Steps of two ranks that send meanwhile, and that do not, in turns.

    steps: of each kind; none of those that send meanwhile if negative.
    """
    from overlapped import Overlapped

    numba.set_num_threads(1)
    group, at, turns = find_group(), Progress(), [False, steps > 0]
    config, feed = training(2)
    model = Overlapped.of(group)(config.model(V), B, T, seed=config.seed)
    model.prepare()
    rows = [[], []]
    for _ in range(abs(steps)):
        for turn, model.on in enumerate(turns):
            group.gather("all are here")
            start = time.perf_counter()
            train_step(config, model, feed, at)
            seconds = time.perf_counter() - start
            rows[turn].append(max(group.gather(seconds)))
    weights = sorted({*group.gather(digest(model))})
    found = {"after": rows[0], "meanwhile": rows[1], "weights": weights}
    leave(group, found, out)


def wire(out):
    """Seconds that two ranks take to spread arrays of several lengths."""
    group, rows = find_group(), []
    for size in (2, 1 << 12, 1 << 16, 1 << 20, 1 << 23):
        array, half = np.zeros(size, np.float32), size // 2
        times = []
        for _ in range(20 if size < 1 << 20 else 4):
            group.gather("all are here")
            start = time.perf_counter()
            group.spread(array, [(0, half), (half, size)])
            times.append(time.perf_counter() - start)
        rows.append((half * 4, statistics.median(times)))
    leave(group, rows, out)


# from outside


def launched(count, *args, before=(), options=()):
    """What a rank of this script writes, started alone or by mpirun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        line = [sys.executable, __file__, *map(str, args), str(out)]
        if count > 1:
            root = ["--allow-run-as-root"] if os.getuid() == 0 else []
            line = [MPIRUN, *root, "--oversubscribe", "--bind-to", "none",
                    *options, "-n", str(count), *line]  # fmt: skip
        paths = {"PYTHONPATH": str(BOOK.parent)}
        subprocess.run([*before, *line], check=True, env=os.environ | paths)
        return json.loads(out.read_text("utf-8"))


def summary(ranks):
    """Medians over the steps but the first, which compiles and touches."""
    steps = [x["steps"][1:] for x in ranks]
    seconds, waiting, sent, _ = np.array(steps).transpose(2, 0, 1)
    return {
        "seconds": float(np.median(seconds.max(axis=0))),
        "spread": [float(seconds.max(axis=0).min()),
                   float(seconds.max(axis=0).max())],
        "communication": float(np.median(waiting.min(axis=0))),
        "sent": [int(x) for x in sent[:, 0]],
        "peak": [x["peak"] for x in ranks],
        "arena": [x["sizes"]["arena"] for x in ranks],
        "m": [x["sizes"]["m"] for x in ranks],
        "weights": sorted({x["weights"] for x in ranks}),
    }  # fmt: skip


def here():
    """One process and several ranks on this machine."""
    found = {}
    for name, count, micro, steps, threads in (
        ("one process, 2 threads", 1, 2, 6, 2),
        ("2 ranks, 1 thread each", 2, 2, 6, 1),
        ("one process, 1 thread", 1, 2, 4, 1),
        ("one process, 4 batches", 1, 4, 3, 2),
        ("4 ranks, 1 thread each", 4, 4, 3, 1),
    ):
        made = launched(count, "worker", micro, steps, threads)
        found[name] = {"batches": micro, "ranks": count, "threads": threads}
        found[name] |= summary(made)
        print(name, found[name], flush=True)
    found["memory of one machine"] = launched(2, "wire")
    return found


@contextlib.contextmanager
def hosts():
    """Two network namespaces with a link; yields how to launch there."""

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    folder = tempfile.TemporaryDirectory()
    agent, listed = Path(folder.name, "agent"), Path(folder.name, "hosts")
    agent.write_text(
        f'#!/bin/sh\nshift\nexec ip netns exec {NAMES[1]} unshare -u '
        f'sh -c "hostname {NAMES[1]}; $*"\n'
    )  # fmt: skip
    agent.chmod(0o755)
    listed.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", NAMES[0], "type", "veth",
           "peer", "name", "veth0", "netns", NAMES[1])  # fmt: skip
        for k, name in enumerate(NAMES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{k}/24", "dev", "veth0")
            for device in ("veth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield {
            "before": ["ip", "netns", "exec", NAMES[0]],
            "options": ["--hostfile", listed, "--map-by", "node",
                        "--prtemca", "plm_ssh_agent", agent],
        }  # fmt: skip
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)
        folder.cleanup()


def counted(name):
    """Bytes that a namespace's end of the link has sent."""
    path = "/sys/class/net/veth0/statistics/tx_bytes"
    line = ["ip", "netns", "exec", name, "cat", path]
    return int(subprocess.run(line, check=True, capture_output=True).stdout)


def set_rate(rate):
    """Let both ends of the link send at a rate of tc."""
    for host in NAMES:
        subprocess.run(
            ["ip", "netns", "exec", host, "tc", "qdisc", "replace",
             "dev", "veth0", "root", "tbf", "rate", rate,
             "burst", "2mb", "latency", "50ms"], check=True,
        )  # fmt: skip


def link():
    """Two ranks on two hosts, with three rates of the link between them."""
    found = {}
    with hosts() as where:
        for name, rate in RATES.items():
            set_rate(rate)
            row = {"wire": launched(2, "wire", **where)}
            if rate != "100mbit":
                start = [counted(host) for host in NAMES]
                made = launched(2, "worker", 2, 4, 1, **where)
                row |= summary(made)
                row["on the link"] = [
                    counted(host) - x
                    for host, x in zip(NAMES, start, strict=True)
                ]
                row["steps"] = 4
            found[name] = row
            print(name, row, flush=True)
    return found


def overlapping(turns=4):
    """The steps of `overlap` on one machine, and over two rates of a link."""
    plain = launched(2, "overlap", -turns)["weights"]
    found = {"one machine": launched(2, "overlap", turns)}
    with hosts() as where:
        for name in ("1 Gbit/s", "10 Gbit/s"):
            set_rate(RATES[name])
            found[name] = launched(2, "overlap", turns, **where)
            print(name, found[name], flush=True)
    for row in found.values():
        row["same as without"] = row["weights"] == plain
    return found


DDP = """
import json, os, statistics, sys, time
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
config = GPT2Config(n_positions=T_, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
model = torch.nn.parallel.DistributedDataParallel(GPT2LMHeadModel(config))
best = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
times = []
for step in range(6):
    tokens = torch.randint(0, 50257, (B_, T_))
    dist.barrier()
    start = time.perf_counter()
    best.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    best.step()
    times.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    found = {"seconds": statistics.median(times[1:])}
    found["torch"] = torch.__version__
    open(sys.argv[1], "w").write(json.dumps(found))
"""


def ddp(python):
    """The same two ranks, one thread each, by PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "ddp.py"), Path(folder, "found.json")
        script.write_text(DDP.replace("T_", str(T)).replace("B_", str(B)))
        subprocess.run(
            [python, "-m", "torch.distributed.run", "--nproc_per_node", "2",
             "--master_port", "29611", script, out], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(out.read_text())
    ours = summary(launched(2, "worker", 2, 6, 1))
    return found | {"ours": ours["seconds"]}


def main(part, *args):
    if part in ("link", "overlap") and not shutil.which("tc"):
        sys.exit("no tc here: the rate of a link cannot be set")
    parts = {"here": here, "link": link, "overlap": overlapping, "ddp": ddp}
    found = parts[part](*map(int, args) if part == "overlap" else args)
    known = json.loads(PLACE.read_text("utf-8")) if PLACE.exists() else {}
    facts = facts_of(Settings())
    names = "machine", "date", "commit", "load"
    where = {name: facts[name] for name in names}
    where |= {"cores": os.cpu_count()}
    where |= {"command": f"python tests/record_machines.py {part}"}
    known[part] = where | found
    write_json(PLACE, known)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(*map(int, sys.argv[2:5]), sys.argv[5])
    elif sys.argv[1] == "overlap" and len(sys.argv) == 4:
        overlap(int(sys.argv[2]), sys.argv[3])
    elif sys.argv[1] == "wire":
        wire(sys.argv[2])
    else:
        main(*sys.argv[1:])
