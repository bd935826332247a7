# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.bench: "A training step measured, part by part."
#       bench.peers: 'The other contestants of the race: PyTorch and llm.c.'
#       bench.race: "A race in turns, on the same machine at the same time."
#       bench.clock: "Time on a GPU, by its own events."
#       bench.ladders: "Every version of every GPU kernel, with its draws and its judge."
#       bench.contest: "The versions of a GPU kernel against each other."
# ---

# %% [markdown]
# # Measure a training step and race it
#
# > Where a step's time goes, layer by layer, and how to say that one program
# > is faster than another on a machine that never keeps still.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure A.8.1. Every box takes its share of a training step. Which one takes
# most, and is the whole faster than another program's?*
#
# A speed that you cannot measure is a speed that you cannot improve. This
# chapter builds `llmnb bench`: a stopwatch around the layers, and a race
# against PyTorch and llm.c. At its end you can
#
# - say which layer takes the time of a step, on your machine;
# - compare two programs so that the machine's moods cancel;
# - tell a cold start from a warm one, and say what each costs;
# - time a kernel on a GPU with events, a busy queue and a cold cache;
# - read the [results page](../../book/results.md).
#
# You need the training step of [chapter 1.16](../1_by_hand/16_training.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.book.verify import verdict

V, B, T = 1024, 8, 64
cfg = GPT2Config(T, V, num_layers=4, num_heads=4, channels=128)
model = GPT2(cfg, batch_size=B, seq_len=T)

# %% [markdown]
# ## Where the time goes
#
# Chapters 1.5 to 1.12 timed their layers alone. In a training step they run
# together, and we want to know which one to make faster next. The model
# calls its layers through one object, its backend. `Stopwatch` stands in
# for that object: it hands out the same functions, each wrapped so that
# its time is added up.

# %% imports of the benchmark tags=["export"] module="bench.bench"
import time


# %% a stopwatch around a backend tags=["export"] module="bench.bench"
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. wait: what to call
    before a clock is read, where functions return before their work is
    done, as on a GPU. seconds, calls: dicts from function name to what has
    been added up since `reset`.
    """

    def __init__(self, backend, wait=lambda: None):
        self._backend, self.wait = backend, wait
        self.reset()

    def reset(self):
        """Forget what has been measured."""
        self.seconds, self.calls = {}, {}

    def __getattr__(self, name):
        function = getattr(self._backend, name)
        if not callable(function):
            return function

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


# %% [markdown]
# The step that we measure is forward, backward and update. It does not clip
# gradients: llm.c's program on a CPU does not, and further down all programs
# must do the same work.


# %% one measured step tags=["export"] module="bench.bench"
PARTS = ("forward", "backward", "update")


def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.
    """
    model.ops.reset()
    times = [time.perf_counter()]
    loss = model.forward(tokens, targets)
    times.append(time.perf_counter())
    model.backward()
    model.ops.wait()
    times.append(time.perf_counter())
    model.update(step=step)
    model.ops.wait()
    times.append(time.perf_counter())
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {
        "loss": loss,
        "parts": dict(zip(PARTS, spent, strict=True)),
        "layers": model.ops.seconds,
        "calls": model.ops.calls,
    }


# %% the model above, measured tags=["nbval-ignore-output"]
from llmnb.bench.bench import Stopwatch, timed_step

text = np.random.RandomState(19).randint(0, V, (B, T + 1))
tokens, targets = text[:, :-1], text[:, 1:]
layers, model.ops = model.ops, Stopwatch(model.ops)
found = [timed_step(model, tokens, targets, 1 + i) for i in range(5)][-1]
model.ops = layers
whole = sum(found["parts"].values())
for name, spent in found["layers"].items():
    print(f"{name:<30} {found['calls'][name]:3} {spent / whole:6.1%}")

# %% [markdown]
# Most of the time goes into `matmul`, as the counts of
# [chapter 1.7](../1_by_hand/07_matmul.ipynb) foretold, and the backward pass takes more
# than the forward pass: it forms two products for each one of the forward
# pass. `llmnb bench` prints such a table for any configuration, and
# `llmnb bench --plot layers.png` draws it.
#
# The arena keeps a promise of [chapter 1.13](../1_by_hand/13_memory.ipynb). It is laid out
# before the first step and holds weights, gradients, optimiser state and
# activations. What the process holds beyond it is Python, the libraries,
# the compiled kernels and the text. One group is left out below, `work`: it is
# the scratch of the matrix products, some megabytes whose number goes by the
# processor's tile and by its threads.

# %% where the memory goes
for group, size in model.memory.sizes().items():
    if group != "work":
        print(f"{group:<8} {size / 1e6:8.2f} MB")

# %% [markdown]
# ## Fast compared with what?
#
# A time says little until it stands beside another: the time PyTorch takes
# for the same step, or llm.c. Such a comparison goes wrong in three ways,
# and `llmnb bench` has an answer to each.
#
# **The machine changes.** Another program wakes up, the processor gets hot
# and lowers its clock. Run all steps of one program and then all of the
# other, and the second may meet another machine. So the programs take
# turns: a **round** is one step of each, and a disturbance that lasts longer
# than a round hits all of them.
#
# **One number hides the noise.** Within a round, take the ratio of two
# times: what slows both cancels. Over the rounds, take the median of the
# ratios: a disturbance that hits a single step makes one bad ratio, and the
# median ignores it.
#
# **Programs disturb each other.** Two libraries in one process share its
# memory, and their threads compete for the cores. So each program has a
# process of its own, and there it sleeps until its turn: it waits for a line
# on its standard input.
#
# Let us try the first two answers on a machine that we make up. Program a
# takes 1 second a step, program b takes 1.1. The machine gets slower by half
# at a third of the way, and now and then a step takes three times as long.

# %% a machine with moods
draw = np.random.RandomState(13)
turns = np.arange(60)
slow = np.where(turns < 20, 1.0, 1.5) * draw.uniform(0.98, 1.02, 60)
slow *= np.where(draw.random_sample(60) < 0.1, 3.0, 1.0)
blocks = np.mean(1.1 * slow[30:]) / np.mean(1.0 * slow[:30])
each = (1.1 * slow[1::2]) / (1.0 * slow[0::2])
print(f"one after the other, means: {blocks:.2f}")
print(f"in turns, mean of ratios:   {np.mean(each):.2f}")
print(f"in turns, median of ratios: {np.median(each):.2f}")
verdict("median of ratios", abs(np.median(each) - 1.1) < 0.03, "is near 1.1")
verdict("blocks", abs(blocks - 1.1) > 0.1, "mislead")

# %% [markdown]
# ### What runs in the process
#
# The programs are contestants, and `peers` is the file that each of them
# runs, except llm.c. It must also run in a Python that has PyTorch and not
# llmnb, so it imports nothing but the standard library at its top.

# %% imports of the peers tags=["export"] module="bench.peers"
import json
import os
import sys
import time
from statistics import median


# %% peak memory tags=["export"] module="bench.peers"
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    if pid != "self":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# %% [markdown]
# On Linux a process inherits the peak that `getrusage` reports from the
# process that started it. The line `VmHWM` of `/proc/self/status` begins
# anew with each program, so we read that where it exists.
#
# `serve` is the contestant's side of the conversation. It answers each line
# `step` with a line of JSON, and any other line with the facts it has
# gathered. It also watches itself sleep: a library whose threads spin while
# they wait takes time from the program whose turn it is. So it reports the
# processor time that a wait cost, all threads together.


# %% take orders tags=["export"] module="bench.peers"
def serve(step, facts, commands, reply):
    """Train one step for each line "step" of a file, until another line.

    step: a function that returns a dict, which is answered with the
    seconds it took. facts: a function that returns what to answer at the
    end. commands: a text file. reply: takes each answer, a dict.
    """
    waits = []
    while True:
        start = time.process_time()
        command = commands.readline().strip()
        waits.append(time.process_time() - start)
        if command != "step":
            break
        start = time.perf_counter()
        found = step()
        reply({"seconds": time.perf_counter() - start, **found})
    waited = {"cpu_seconds_a_wait": median(waits)}
    reply({"peak_bytes": peak_memory(), **waited, **facts()})


# %% the batch tags=["export"] module="bench.peers"
def random_batch(spec):
    """Tokens and targets for a spec: the same for every contestant.

    spec: a dict with model, batch_size and seq_len. Returns an int64 array
    (2, B, T).
    """
    import numpy as np

    shape = 2, spec["batch_size"], spec["seq_len"]
    draw = np.random.RandomState(0)
    return draw.randint(0, spec["model"]["vocab_size"], shape, np.int64)


# %% [markdown]
# Our own contestant is a `GPT2` behind a `Stopwatch`. A precision that this
# processor lacks is refused, not replaced by another: timing float32 twice
# would tell you that bfloat16 gains nothing.


# %% why a precision is missing tags=["export"] module="bench.peers"
def missing(precision, backend="cpu"):
    """Why a backend cannot train with a precision here; None if it can."""
    home = {"bf16": "cpu", "tf32": "cuda"}.get(precision, backend)
    if backend != home:
        return f"not available in the {backend} backend"
    if precision != "bf16":
        return None
    from llmnb.cpu.tile import has_bf16

    return None if has_bf16() else "not available on this CPU"


# %% our contestant tags=["export"] module="bench.peers"
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend and precision.
    Raises NotImplementedError, saying why, when the precision is missing.
    """
    from itertools import count

    from llmnb.bench.bench import Stopwatch, timed_step
    from llmnb.config import GPT2Config
    from llmnb.model.gpt2 import GPT2

    backend, precision = spec["backend"], spec["precision"]
    if missing(precision, backend):
        raise NotImplementedError(missing(precision, backend))
    if backend == "cuda":
        return _cuda_contestant(spec)
    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    model = GPT2(cfg, *sizes, backend=backend, precision=precision)
    model.ops = Stopwatch(model.ops)
    batch, numbers = random_batch(spec), count(1)
    return (
        lambda: timed_step(model, *batch, next(numbers)),
        lambda: {"arena_bytes": model.memory.nbytes, **_our_facts(backend)},
    )


# %% [markdown]
# On a GPU the contestant is the same model. It waits until the work is done
# before the clock is read. It comes in two kinds: one calls the model's
# `step`, which launches the CUDA graph that it captured
# ([chapter 1.15](../1_by_hand/15_model.ipynb)); the other launches its kernels one by one
# and waits for the loss and for the norm, and the difference is what
# capturing saves. `step` computes the norm of the gradients, so on a GPU all
# contestants do, PyTorch too; nobody scales them. Layers cannot be told
# apart inside a graph, nor without waiting after each of them. So the layers
# are timed after the race, in three steps of their own.


# %% our contestant on a GPU tags=["exporti"] module="bench.peers"
def _cuda_contestant(spec):
    """As llmnb_contestant, for the cuda backend; spec: also graph."""
    from itertools import count

    from llmnb.config import GPT2Config
    from llmnb.bench.clock import no_times
    from llmnb.model.gpt2 import GPT2

    if no_times():
        raise NotImplementedError(no_times())
    from numba import cuda as real

    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    how = {name: spec[name] for name in ("backend", "precision")}
    model = GPT2(cfg, *sizes, **how)
    batch, numbers = random_batch(spec), count(1)

    def step():
        if spec["graph"]:
            loss, _ = model.step(*batch, step=next(numbers))
        else:
            loss = model.forward(*batch)
            model.backward()
            model.clip_gradients(float("inf"))
            model.update(step=next(numbers))
        real.synchronize()
        return {"loss": loss}

    return step, lambda: _cuda_facts(model, batch, numbers, spec["graph"])


def _cuda_facts(model, batch, numbers, graph):
    """Memory, versions, limits, and without a graph where the time goes."""
    from numba import cuda as real

    from llmnb.bench.bench import Stopwatch, timed_step
    from llmnb.bench.clock import Clock, limits

    facts = {"arena_bytes": model.memory.nbytes, **_our_facts("cuda")}
    facts |= {"device_bytes": model.memory.nbytes, **limits(Clock())}
    if not graph:
        model.ops = Stopwatch(model.ops, real.synchronize)
        steps = [timed_step(model, *batch, next(numbers)) for _ in range(3)]
        facts["apart"] = steps
    return facts


# %% our facts tags=["exporti"] module="bench.peers"
def _our_facts(backend):
    """Threads, versions, and for the cpu backend the peak of FMAs."""
    from importlib.metadata import version

    import numba

    names = ["llmnb", "numpy", "numba"]
    names += ["numba-cuda"] * (backend == "cuda")
    facts = {"threads": numba.get_num_threads()}
    facts["versions"] = {name: version(name) for name in names}
    if backend == "cpu":
        from llmnb.bench.peak import fma_peak

        facts["fma_peak"] = float(fma_peak())
    return facts


# %% [markdown]
# PyTorch's contestant is the GPT-2 that a user of PyTorch would write:
# fused attention, fused AdamW, the head tied to the embedding. The
# vocabulary is padded as ours is, so that both form products of the same
# shapes. On a GPU, PyTorch may use the tensor cores in TF32 or not; both
# are asked for by name, so that each of ours meets its like.


# %% a block in PyTorch tags=["exporti"] module="bench.peers"
def _torch_block(C, NH):
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def attention(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(x).view(B, T, 3, NH, C // NH)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.attproj(y.transpose(1, 2).reshape(B, T, C))

        def forward(self, x):
            x = x + self.attention(self.ln1(x))
            h = F.gelu(self.fc(self.ln2(x)), approximate="tanh")
            return x + self.fcproj(h)

    return Block()


# %% GPT-2 in PyTorch tags=["exporti"] module="bench.peers"
def _torch_gpt2(max_seq_len, vocab_size, num_layers, num_heads, channels):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(-(-vocab_size // 128) * 128, channels)
            self.wpe = nn.Embedding(max_seq_len, channels)
            blocks = [_torch_block(channels, num_heads)]
            for _ in range(num_layers - 1):
                blocks.append(_torch_block(channels, num_heads))
            self.blocks = nn.Sequential(*blocks)
            self.lnf = nn.LayerNorm(channels)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
            x = self.lnf(self.blocks(x))
            logits = F.linear(x, self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
    return model


# %% PyTorch's contestant tags=["export"] module="bench.peers"
def torch_contestant(spec):
    """A step of PyTorch's GPT-2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, compile and bf16, and for
    a GPU device ("cuda") and tf32. Raises ImportError where there is no
    torch, NotImplementedError where it finds no GPU.
    """
    import torch

    device = _torch_device(torch, spec)
    torch.manual_seed(0)
    model = _torch_gpt2(**spec["model"]).to(device)
    run = torch.compile(model) if spec["compile"] else model
    rules = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=True, **rules
    )
    batch = torch.from_numpy(random_batch(spec)).to(device)
    half = {"dtype": torch.bfloat16, "enabled": spec["bf16"]}

    def step():
        with torch.autocast(device, **half):
            loss = run(*batch)
        loss.backward()
        if device == "cuda":
            grads = [p.grad for p in model.parameters()]
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.item()}

    return step, lambda: _torch_facts(torch, device)


# %% PyTorch on a GPU tags=["exporti"] module="bench.peers"
def _torch_device(torch, spec):
    """Where a spec trains; on a GPU with or without TF32, as it says."""
    device = spec.get("device", "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise NotImplementedError("torch finds no GPU")
        torch.backends.cuda.matmul.allow_tf32 = spec["tf32"]
        torch.backends.cudnn.allow_tf32 = spec["tf32"]
    return device


def _torch_facts(torch, device):
    """Threads and versions; on a GPU the most memory that torch held."""
    versions = {"torch": torch.__version__}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    if device == "cuda":
        facts["device_bytes"] = torch.cuda.max_memory_reserved()
        facts["used_bytes"] = torch.cuda.max_memory_allocated()
    return facts


# %% [markdown]
# Two more write text instead of training: the `Decoder` of
# [chapter 4.13](../4_practice/13_cache.ipynb), and the `generate` of Hugging Face's
# transformers. A step continues a prompt of random tokens, new in each round
# and the same for both, always by the likeliest token. A clock is read at
# each token. The first one costs the whole prompt; the median of the others
# is what a token costs.


# %% one text with a clock tags=["exporti"] module="bench.peers"
def _prompts(spec):
    """Lists of random tokens without end, the same for every writer."""
    import numpy as np

    draw = np.random.RandomState(0)
    while True:
        yield draw.randint(0, spec["vocab_size"], spec["prompt"]).tolist()


def _pace(times, tokens):
    """The answer to a step, from the clock at the start and each token."""
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    pace = {"first_seconds": spent[0], "token_seconds": median(spent[1:])}
    return {**pace, "tokens": tokens}


# %% our writer tags=["export"] module="bench.peers"
def decoder_contestant(spec):
    """A text from a Decoder and its facts: two functions for `serve`.

    spec: a dict with folder (of a model), vocab_size, prompt and count:
    tokens to read and to write, at least 2.
    """
    from llmnb.model.decode import Decoder
    from llmnb.model.generate import generate

    length = spec["prompt"] + spec["count"]
    decoder = Decoder.from_checkpoint(spec["folder"], 1, length)
    prompts = _prompts(spec)

    def step():
        prompt, tokens = next(prompts), []
        times = [time.perf_counter()]
        for token in generate(decoder, prompt, spec["count"], temperature=0):
            tokens.append(token)
            times.append(time.perf_counter())
        return _pace(times, tokens)

    return step, lambda: _our_facts("reference")


# %% their writer tags=["export"] module="bench.peers"
def transformers_contestant(spec):
    """A text from transformers' generate, and its facts, for `serve`.

    spec: as for decoder_contestant; the folder must be one that
    transformers reads. Raises ImportError where it is not installed.
    """
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(spec["folder"])
    model.eval()
    how = {"max_new_tokens": spec["count"], "do_sample": False}
    how |= {"eos_token_id": None, "pad_token_id": 0}
    prompts, times = _prompts(spec), []

    class Clock:
        def put(self, value):
            times.append(time.perf_counter())

        def end(self):
            pass

    def step():
        prompt = torch.tensor([next(prompts)])
        mask = torch.ones_like(prompt)
        times[:] = []  # the clock is given the prompt first
        out = model.generate(
            prompt, attention_mask=mask, streamer=Clock(), **how
        )
        return _pace(times, out[0, prompt.shape[1] :].tolist())

    versions = {x.__name__: x.__version__ for x in (torch, transformers)}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    return step, lambda: facts


# %% the contestant's program tags=["export"] module="bench.peers"
CONTESTANTS = {
    "llmnb": llmnb_contestant,
    "torch": torch_contestant,
    "llmnb-decoder": decoder_contestant,
    "transformers": transformers_contestant,
}


def main(argv=None):
    """Be a contestant: build what a spec says, then `serve` standard input.

    argv: one argument, the spec as JSON; its kind is a name in
    `CONTESTANTS`. The first answer says {"ready": true}, or why not. What
    libraries print goes to standard error.
    """
    spec = json.loads((sys.argv[1:] if argv is None else argv)[0])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def reply(answer):
            print(json.dumps(answer), file=out, flush=True)

        try:
            contestant = CONTESTANTS[spec["kind"]](spec)
        except NotImplementedError as why:
            return reply({"unmeasured": str(why)})
        except Exception as error:
            return reply({"error": str(error) or type(error).__name__})
        reply({"ready": True})
        return serve(*contestant, sys.stdin, reply)


# %% [markdown]
# ### The race
#
# The other side starts the processes and gives the turns. All contestants
# get the same number of threads. How their idle threads wait is left as each
# library sets it, because a setting that puts threads to sleep at once slows
# the program it is meant for: GNU's OpenMP, which PyTorch uses, lets a thread
# spin for some milliseconds before it sleeps; numba's sleep sooner, because
# `kernel` of [chapter 1.5](../1_by_hand/05_encoder.ipynb) says so. Between two turns we
# pause until the threads of the last contestant are asleep. The processor
# time of a wait is written down with the results, so you can see that the
# pause is long enough.

# %% imports of the race tags=["export"] module="bench.race"
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from llmnb.bench import peers
from llmnb.arena import Arena
from llmnb.formats.checkpoint import write_checkpoint, write_folder
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.text.data import write_shard
from llmnb.model.init import init_params
from llmnb.model.layout import footprint, gpt2_layout
from llmnb.room import SMALLER, check_room


# %% what a race is told tags=["export"] module="bench.race"
WARM_UP = 2  # rounds that are not measured: they compile and touch memory
WRITERS = {"llmnb": "llmnb-decoder", "transformers": "transformers"}
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
_PLAIN = {"kind": "torch", "compile": False, "bf16": False, "tf32": False}
PEERS = {
    "torch": _PLAIN,
    "torch-compile": _PLAIN | {"compile": True},
    "torch-bf16": _PLAIN | {"bf16": True},
    "torch-tf32": _PLAIN | {"tf32": True},
    "torch-compile-tf32": _PLAIN | {"compile": True, "tf32": True},
}


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many are measured, one a
    round. threads: of each contestant, or None for all cores. backend: of
    `GPT2`. torch_python: the interpreter that has torch.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable


# %% the cores tags=["export"] module="bench.race"
def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# %% the contestant's environment tags=["exporti"] module="bench.race"
def _environment(threads, cache=None):
    """Threads for every library; a folder for every compiler's cache."""
    count = str(threads or cores())
    env = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
    if cache:
        env |= {"LLMNB_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    # a file's own folder is no place to look for modules
    env = os.environ | env | {"PYTHONSAFEPATH": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # ours would slow PyTorch: see `kernel`
    return env


# %% a contestant tags=["export"] module="bench.race"
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. python: the interpreter. cache: a
    folder for compiled code, or None for the usual ones. unmeasured: None,
    or why there is nothing to measure. Raises ChildProcessError, in one
    sentence, when the process cannot do what it was asked.
    """

    def __init__(self, name, spec, python, threads=None, cache=None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = _environment(threads, cache)
        if spec["kind"].startswith("llmnb"):
            package = str(Path(peers.__file__).parents[1])
            env["PYTHONPATH"] = package
        self._process = subprocess.Popen(
            [python, peers.__file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        try:
            self.unmeasured = self._answer().get("unmeasured")
        except ChildProcessError:
            self.close()
            raise

    def _answer(self):
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ChildProcessError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self):
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        said = [x for x in lines if x.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            return f"was ended by {name}: is there enough memory?"
        return said[-1] if said else f"ended with code {code}"

    def _ask(self, command):
        with suppress(OSError):  # the answer will say why
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        return self._ask("step")

    def finish(self):
        """Stop; a dict of what the process knows about itself."""
        return self._ask("finish")

    def close(self):
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()


# %% [markdown]
# llm.c's program takes no orders: it trains forty-one steps and prints a line
# after each. We let it believe that it runs alone. When its line has come, we
# stop the process with a signal, and when its turn is there another signal
# wakes it. Its own times would include the sleep, so we take the time from
# the wake-up, or from the last other line it printed, to the step's line.
# What it computes between printing and falling asleep is lost to the
# measurement: well below a millisecond of a step that takes seconds.
#
# The program has its batch of 4 times 64 tokens compiled in, and it wants its
# model and its tokens under certain names.


# %% what llm.c reads tags=["exporti"] module="bench.race"
def _llmc_folder(folder, cfg):
    """A folder with a random model and random tokens for train_gpt2."""
    arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
    init_params(arena["params"], cfg, 42)
    path = Path(folder)
    write_checkpoint(path / "gpt2_124M.bin", cfg, arena.flat("params"))
    data = path / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(0, cfg.vocab_size, 1 << 16)
    for part in ("train", "val"):
        name = f"tiny_shakespeare_{part}.bin"
        write_shard(data / name, tokens.astype(np.uint16))


# %% llm.c as a contestant tags=["export"] module="bench.race"
class LlmC:
    """llm.c's train_gpt2, asleep between its steps; see `Contestant`.

    binary: the path of the program. shape: a dict with model, batch_size and
    seq_len.
    """

    def __init__(self, binary, shape, threads=None):
        self.unmeasured = None
        if (shape["batch_size"], shape["seq_len"]) != (4, 64):
            self.unmeasured = "has B=4 T=64 compiled in"
        if os.name != "posix":
            self.unmeasured = "can be put to sleep on Linux and macOS only"
        if self.unmeasured:
            return
        import pty  # its end of a terminal makes C print line by line

        self._folder = tempfile.TemporaryDirectory()
        _llmc_folder(self._folder.name, GPT2Config(**shape["model"]))
        screen, keyboard = pty.openpty()
        self._lines = os.fdopen(screen, errors="replace")
        self._process = subprocess.Popen(
            [str(Path(binary).resolve())],
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=keyboard,
            stderr=keyboard,
            env=_environment(threads),
        )
        os.close(keyboard)
        self._sleep()

    def _sleep(self):
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        self._process.send_signal(signal.SIGCONT)
        start, line = time.perf_counter(), ""
        while True:
            try:
                line = self._lines.readline()
            except OSError:  # how a terminal says that its program has ended
                line = ""
            now = time.perf_counter()
            if not line:
                raise ChildProcessError("llm.c: the program has ended")
            found = re.match(r"step \d+: train loss (\S+)", line)
            if found:
                self._sleep()
                return {"seconds": now - start, "loss": float(found[1])}
            start = now

    def finish(self):
        """A dict of what is known about the process."""
        return {"peak_bytes": peers.peak_memory(self._process.pid)}

    def close(self):
        """End the process and remove its folder."""
        if self.unmeasured is None:
            self._process.kill()
            self._process.wait()
            self._lines.close()
            self._folder.cleanup()


# %% who races tags=["export"] module="bench.race"
def lineup(settings):
    """The names of all contestants of some `Settings`, each with its spec.

    Returns a dict; llm.c's spec holds the path of its program. Raises
    ValueError for a name that nobody has and a number below 1, OSError for
    a program that is not there.
    """
    for name in ("steps", "threads"):
        number = getattr(settings, name)
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    specs = {}
    for precision in settings.precisions:
        ours = {"backend": settings.backend, "precision": precision}
        specs[f"llmnb {precision}"] = {"kind": "llmnb", **ours}
        if settings.backend == "cuda":
            specs[f"llmnb {precision}"]["graph"] = True
            alone = {"kind": "llmnb", **ours, "graph": False}
            specs[f"llmnb {precision}, no graph"] = alone
    for name in settings.against:
        _check_peer(name, settings.backend)
        kind, _, path = name.partition("=")
        if kind == "llmc" and path:
            if not os.access(path, os.X_OK):
                raise FileNotFoundError(f"{path} is not a program")
            specs["llm.c"] = {"kind": "llmc", "path": path}
        elif name in PEERS:
            device = "cuda" if settings.backend == "cuda" else "cpu"
            specs[name] = PEERS[name] | {"device": device}
        else:
            known = ", ".join([*PEERS, "llmc=PATH"])
            raise ValueError(f"no contestant {name!r}: choose from {known}")
    return specs


def _check_peer(name, backend):
    """Raise for a contestant that the backend's device cannot run."""
    if backend == "cuda" and name.startswith("llmc="):
        raise ValueError("llmc: train_gpt2 runs on the CPU, not on a GPU")
    if backend != "cuda" and name in PEERS and PEERS[name]["tf32"]:
        raise ValueError(f"{name} needs a GPU: --backend cuda")


def no_device(backend):
    """Why nothing can be timed with a backend here; empty if it can."""
    if backend != "cuda":
        return ""
    from llmnb.bench.clock import no_times

    return no_times()


# %% start a contestant tags=["exporti"] module="bench.race"
def _start(name, spec, shape, settings, cache=None):
    spec = {**shape, **spec}
    if spec["kind"] == "llmc":
        return LlmC(spec["path"], shape, settings.threads)
    ours = spec["kind"] == "llmnb"
    python = sys.executable if ours else settings.torch_python
    try:
        return Contestant(name, spec, python, settings.threads, cache)
    except ChildProcessError as error:
        if "No module named 'torch'" not in str(error):
            raise
        raise ChildProcessError(
            f"{name}: {python} has no torch; name a Python that has it with "
            "--torch-python"
        ) from None


# %% in turns tags=["export"] module="bench.race"
def take_turns(contestants, rounds):
    """One step of each contestant a round; who begins changes each round.

    contestants: a dict from name to an object with `step`. rounds: an
    iterable of round numbers. Returns a dict from name to a list of what
    `step` returned.
    """
    names = [*contestants]
    replies = {name: [] for name in names}
    for number in rounds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            replies[name].append(contestants[name].step())
    return replies


# %% all in memory at once tags=["exporti"] module="bench.race"
def _check_together(shape, settings):
    """Raise MemoryError when our own contestants alone do not fit."""
    specs = lineup(settings).values()
    ours = [
        x for x in specs
        if x["kind"] == "llmnb"
        and x["backend"] != "cuda"
        and not peers.missing(x["precision"], x["backend"])
    ]  # fmt: skip
    if ours:
        cfg = GPT2Config(**shape["model"])
        layout = gpt2_layout(cfg, shape["batch_size"], shape["seq_len"])
        size = sum(footprint(layout).values())
        check_room(len(ours) * size, "fewer precisions, or " + SMALLER)


# %% the race tags=["export"] module="bench.race"
def race(shape, settings, bar=iter):
    """Race all contestants of some `Settings` on one shape.

    shape: a dict with model (what GPT2Config takes), batch_size, seq_len.
    bar: takes the rounds and gives them back, such as tqdm. Returns two
    dicts by name: of each contestant its steps (one dict a round, the
    `WARM_UP` rounds first) and its facts, or else why it is unmeasured.
    """
    found, why = {}, {}
    if no_device(settings.backend):
        reason = no_device(settings.backend)
        return found, dict.fromkeys(lineup(settings), reason)
    _check_together(shape, settings)
    with ExitStack() as stack:
        runners = {}
        for name, spec in lineup(settings).items():
            runner = _start(name, spec, shape, settings)
            stack.callback(runner.close)
            if runner.unmeasured:
                why[name] = runner.unmeasured
            else:
                runners[name] = runner
        if runners:
            rounds = bar(range(WARM_UP + settings.steps))
            replies = take_turns(runners, rounds)
            for name, runner in runners.items():
                facts = runner.finish()
                found[name] = {"steps": replies[name], "facts": facts}
    return found, why


# %% a race of writers tags=["export"] module="bench.race"
def race_writers(cfg, prompt, count, rounds, threads=None, python=None):
    """Race a Decoder and transformers' generate on one random model.

    cfg: a GPT2Config. prompt, count: tokens to read and to write. rounds:
    texts of each to measure, after one that is not. threads: of each, or
    None for all cores. python: the interpreter that has transformers.
    Returns a dict from name to the steps (dicts, as `peers` answers) and
    the facts. Raises ValueError for numbers that do not fit the model and
    ChildProcessError in one sentence.
    """
    if prompt < 1 or count < 2 or prompt + count > cfg.max_seq_len:
        raise ValueError(
            f"a prompt of {prompt} and {count} more tokens: must be at least "
            f"1 and 2, together at most {cfg.max_seq_len}"
        )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
        init_params(arena["params"], cfg, 42)
        write_folder(folder, cfg, arena["params"])
        spec = {"folder": folder, "vocab_size": cfg.vocab_size}
        spec |= {"prompt": prompt, "count": count}
        runners = {}
        for name, kind in WRITERS.items():
            ours = kind.startswith("llmnb")
            program = sys.executable if ours else python or sys.executable
            runner = Contestant(name, spec | {"kind": kind}, program, threads)
            stack.callback(runner.close)
            runners[name] = runner
        replies = take_turns(runners, range(1 + rounds))
        return {
            name: {"steps": replies[name][1:], "facts": runner.finish()}
            for name, runner in runners.items()
        }


# %% ratios tags=["export"] module="bench.race"
def ratios(seconds):
    """Compare every llmnb with every peer, round by round.

    seconds: a dict from name to a list, one number a round; ours begin with
    "llmnb". Returns a list of dicts: ours, peer, and of the rounds' ratios
    of our time to the peer's the median, the lowest and the highest.
    """
    ours = [x for x in seconds if x.startswith("llmnb")]
    table = []
    for a in ours:
        for b in [x for x in seconds if x not in ours]:
            pairs = zip(seconds[a], seconds[b], strict=True)
            each = [x / y for x, y in pairs]
            row = {"ours": a, "peer": b, "ratio": median(each)}
            table.append(row | {"low": min(each), "high": max(each)})
    return table


# %% [markdown]
# Two contestants that do nothing but wait show that the turns are given as
# promised: who begins changes, and the ratios are taken within a round.

# %% a race of two clocks
from itertools import cycle

from llmnb.bench.race import ratios, take_turns


class Clock:
    def __init__(self, *seconds):
        self.seconds = cycle(seconds)

    def step(self):
        return {"seconds": next(self.seconds)}


clocks = {"llmnb fp32": Clock(1.0, 3.0), "other": Clock(2.0, 6.0)}
turns = take_turns(clocks, range(4))
seconds = {k: [x["seconds"] for x in v] for k, v in turns.items()}
print(ratios(seconds))

# %% [markdown]
# ### How long until the first step
#
# A program that compiles itself makes you wait. `llmnb bench --start`
# measures from the start of a process to the end of its first step: **cold**,
# with an empty folder for compiled code, then **warm**, with what the cold
# start has left there. Python's own files are in the system's memory in both
# cases.


# %% time to the first step tags=["export"] module="bench.race"
STARTS = 3  # how often each contestant is started, cold and warm


def start_times(shape, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    shape, bar: see `race`. In each of `STARTS` rounds each contestant starts
    cold and then warm. Returns a list of dicts: name, cold and warm (lists
    of seconds), or name and unmeasured. llm.c is left out: it has no
    compiled code to keep.
    """
    specs = lineup(settings)
    specs.pop("llm.c", None)
    why = no_device(settings.backend)
    if why:
        return [{"name": name, "unmeasured": why} for name in specs]
    rows = {name: {"name": name, "cold": [], "warm": []} for name in specs}
    for _ in bar(range(STARTS)):
        for name, spec in specs.items():
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    what = spec, shape, settings, cache
                    spent, why = _first_step(name, *what)
                    rows[name][kind].append(spent)
            if why:
                rows[name] = {"name": name, "unmeasured": why}
                specs = {k: v for k, v in specs.items() if k != name}
    return [*rows.values()]


# %% one start tags=["exporti"] module="bench.race"
def _first_step(name, spec, shape, settings, cache):
    """Seconds to the first step, and why there are none."""
    start = time.perf_counter()
    runner = _start(name, spec, shape, settings, cache)
    try:
        if not runner.unmeasured:
            runner.step()
        return time.perf_counter() - start, runner.unmeasured
    finally:
        runner.close()


# %% [markdown]
# ### The benchmark
#
# What is left is to gather numbers, print them and draw them. Some
# configurations have names: a small model, GPT-2 with 124 million
# parameters on short and on long texts, and a batch that is worth a GPU.
#
# Taking turns does not make a busy machine a quiet one. When a third program
# wants a core, the contestants suffer differently: threads that spin until
# all of them have finished lose the most. So the report states the machine's
# **load** before the race. A load far below 1 is a quiet machine.

# %% imports of the report tags=["export"] module="bench.bench"
import math
import os
import re
import subprocess
from datetime import date
from pathlib import Path
from statistics import median

from llmnb.bench import peers
from llmnb.config import GPT2Config, flops_per_token, parameter_count
from llmnb.model.gpt2 import GPT2
from llmnb.bench.race import (
    WARM_UP,
    Settings,
    cores,
    lineup,
    no_device,
    race,
    race_writers,
    ratios,
    start_times,
)
from llmnb.timing import machine

# %% named configurations tags=["export"] module="bench.bench"
SMALL = GPT2Config(64, 256, 4, 4, 128)
CONFIGS = {
    "small": (SMALL, 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
    "124m-16x1024": (GPT2Config(), 16, 1024),
}


# %% a shape tags=["exporti"] module="bench.bench"
def _shape(cfg, batch_size, seq_len):
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    return {"model": dict(vars(cfg)), **sizes}


# %% the benchmark tags=["export"] module="bench.bench"
def bench(configs, settings=None, start=False, bar=iter):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure
    `start_times` of the small model too. bar: see `race`. Seconds are those
    of the rounds, in order; memory is in bytes. Raises ValueError,
    ChildProcessError, or FloatingPointError at a loss that is not finite, in
    one sentence.
    """
    settings = settings or Settings()
    lineup(settings)  # so that a mistake is found before anything is built
    result = {"date": date.today().isoformat(), "commit": _commit()}
    result |= {"machine": machine(), "threads": settings.threads or cores()}
    result |= {"load": load(), "backend": settings.backend}
    result["configs"] = [
        _config_result(name, *what, settings, bar)
        for name, what in configs.items()
    ]
    shape = _shape(*CONFIGS["small"])
    result["start"] = start_times(shape, settings, bar) if start else []
    if settings.backend == "cuda" and configs:
        result["losses"] = loss_curves(settings.precisions)
    return shares(result)


# %% the same losses tags=["export"] module="bench.bench"
def loss_curves(precisions, steps=20, shape=(SMALL, 12, 64)):
    """Train a small model on the CPU and on the GPU, from the same start.

    shape: a GPT2Config, batch size and length. Returns a dict of lists of
    losses, by backend and precision, and worst: the largest difference from
    the CPU's in fp32, by precision. Without a GPU it says unmeasured alone.
    Raises FloatingPointError when a loss is not finite.
    """
    if no_device("cuda"):
        return {"unmeasured": no_device("cuda")}
    batch = peers.random_batch(_shape(*shape))
    runs = [("cpu", "fp32"), *(("cuda", x) for x in precisions)]
    found = {}
    for backend, precision in runs:
        if peers.missing(precision, backend):
            continue
        model = GPT2(*shape, backend=backend, precision=precision)
        losses = found[f"{backend} {precision}"] = []
        for step in range(1, 1 + steps):
            losses.append(float(model.forward(*batch)))
            model.backward()
            model.update(step=step)
        _check_losses(f"{backend} {precision}", losses)
    want, *others = found.values()
    worst = [
        max(abs(a - b) for a, b in zip(want, x, strict=True)) for x in others
    ]
    return found | {"worst": dict(zip([*found][1:], worst, strict=True))}


def _check_losses(name, losses):
    """Raise at a loss that is not finite: who computes no numbers is fast."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{name}: the loss is {loss} at step {step}, so its time "
                "means nothing"
            )


# %% the benchmark of writing tags=["export"] module="bench.bench"
def bench_writers(cfg, prompt=64, count=64, rounds=10, threads=None, **how):
    """Measure tokens written against transformers; a dict ready for JSON.

    The arguments are those of `race_writers`, and so is what it raises.
    Seconds are those of the rounds, in order: of the first token, which
    reads the prompt, and of a later one, the median of a text.
    """
    result = {"date": date.today().isoformat(), "commit": _commit()}
    result |= {"machine": machine(), "threads": threads or cores()}
    result |= {"load": load(), "model": dict(vars(cfg))}
    found = race_writers(cfg, prompt, count, rounds, threads, **how)
    rows, texts = {}, []
    for name, each in found.items():
        steps = each["steps"]
        texts.append([x["tokens"] for x in steps])
        rows[name] = {
            kind: [x[kind] for x in steps]
            for kind in ("first_seconds", "token_seconds")
        }
    for kind in ("first_seconds", "token_seconds"):
        seconds = {name: row[kind] for name, row in rows.items()}
        result[f"{kind}_ratios"] = ratios(seconds)
    same = all(text == texts[0] for text in texts)
    result |= {"prompt": prompt, "count": count, "same_tokens": same}
    result["writers"] = {n: rows[n] | found[n]["facts"] for n in rows}
    return result


def writers_report(result):
    """The result of `bench_writers` as a text of lines to print."""
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    same = "the same tokens" if result["same_tokens"] else "OTHER TOKENS"
    lines += [
        f"a prompt of {result['prompt']} tokens, {result['count']} more: "
        f"{same}",
        "",
        f"{'':<16}{'first ms':>11}{'ms a token':>11}{'tokens/s':>11}",
    ]
    for name, row in result["writers"].items():
        first, each = (
            median(row[x]) for x in ("first_seconds", "token_seconds")
        )
        numbers = f"{first * 1e3:11.1f}{each * 1e3:11.2f}{1 / each:11.1f}"
        lines.append(f"{name:<16}{numbers}")
    for kind, what in (("first", "first token"), ("token", "later token")):
        for x in result[f"{kind}_seconds_ratios"]:
            lines.append(
                f"{what}: {x['ours']} / {x['peer']}: {x['ratio']:.2f} of its "
                f"time ({x['low']:.2f} to {x['high']:.2f})"
            )
    return "\n".join(lines)


# %% is the machine busy tags=["export"] module="bench.bench"
def load():
    """How many threads have wanted to run in the last minute, on average.

    None where the system does not say.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# %% which llmnb tags=["exporti"] module="bench.bench"
def _commit():
    """The commit of the checkout that this file is in; None elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(peers.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


# %% one configuration tags=["exporti"] module="bench.bench"
def _config_result(name, cfg, batch_size, seq_len, settings, bar):
    shape = _shape(cfg, batch_size, seq_len)
    found, why = race(shape, settings, bar)
    flops = flops_per_token(cfg, seq_len) * batch_size * seq_len
    rows = [_row(name, flops, shape, **x) for name, x in found.items()]
    rows += [{"name": k, "unmeasured": v} for k, v in why.items()]
    order = [*lineup(settings)]
    rows.sort(key=lambda row: order.index(row["name"]))
    seconds = {x["name"]: x["seconds"] for x in rows if "seconds" in x}
    facts = {"parameters": parameter_count(cfg), "flops_per_step": flops}
    facts |= {"contestants": rows, "ratios": ratios(seconds)}
    if settings.backend == "cuda":
        facts["captures"] = captures(seconds)
    return {"name": name, **shape, **facts}


# %% what a graph saves tags=["export"] module="bench.bench"
def captures(seconds):
    """Seconds a step that a captured graph saves, by contestant.

    seconds: a dict from name to a list, one number a round. Returns a list
    of dicts: name, and the median, lowest and highest of the rounds'
    differences, saved, low and high.
    """
    table = []
    for name, fast in seconds.items():
        slow = seconds.get(f"{name}, no graph")
        if slow:
            each = [b - a for a, b in zip(fast, slow, strict=True)]
            row = {"name": name, "saved": median(each)}
            table.append(row | {"low": min(each), "high": max(each)})
    return table


# %% shares of the peak tags=["export"] module="bench.bench"
def shares(result):
    """Give each row of a result its share of the machine's FMA peak.

    The peak is the highest that any row has measured: other programs can
    only lower it. Changes result in place and returns it.
    """
    rows = [row for c in result["configs"] for row in c["contestants"]]
    peak = max((row.get("fma_peak", 0) for row in rows), default=0)
    for row in rows:
        if peak and "flops_per_second" in row:
            row["share_of_peak"] = row["flops_per_second"] / peak
    return result


# %% one contestant tags=["exporti"] module="bench.bench"
def _row(name, flops, shape, steps, facts):
    _check_losses(name, [x["loss"] for x in steps])
    measured = steps[WARM_UP:]
    seconds = [x["seconds"] for x in measured]
    middle = median(seconds)
    row = {"name": name, "seconds": seconds, "step_seconds": middle}
    tokens = shape["batch_size"] * shape["seq_len"]
    row["tokens_per_second"] = tokens / middle
    row["flops_per_second"] = flops / middle
    apart = facts.pop("apart", None)  # steps whose layers were timed alone
    row |= {"first_loss": steps[0]["loss"], **facts}
    timed = apart or (measured if "layers" in steps[0] else None)
    if timed:
        row |= {"parts": _parts(timed), "layers": _layers(timed)}
    return row


# %% medians tags=["exporti"] module="bench.bench"
def _parts(steps):
    return {x: median(s["parts"][x] for s in steps) for x in PARTS}


def _layers(steps):
    """One dict a backend function, in the order of first use."""
    table = []
    for name, calls in steps[0]["calls"].items():
        seconds = median(x["layers"][name] for x in steps)
        table.append({"name": name, "calls": calls, "seconds": seconds})
    whole = [sum(x["parts"].values()) for x in steps]
    pairs = zip(whole, steps, strict=True)
    rest = [total - sum(x["layers"].values()) for total, x in pairs]
    table.append({"name": "(the rest)", "calls": 1, "seconds": median(rest)})
    return table


# %% a report in words tags=["export"] module="bench.bench"
def report(result):
    """The result of `bench` as a text of lines to print."""
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    for config in result["configs"]:
        lines += ["", *_config_lines(config)]
    if result["start"]:
        lines += ["", "seconds to the first step of the small model", ""]
        lines += [f"{'':<22} {'cold':>9} {'warm':>9}"]
        for row in result["start"]:
            times = row.get("unmeasured") or " ".join(
                f"{median(row[kind]):9.2f}" for kind in ("cold", "warm")
            )
            lines.append(f"{row['name']:<22} {times}")
    return "\n".join(lines + [*_losses_lines(result.get("losses"))])


def _losses_lines(losses):
    if losses is None:
        return
    yield ""
    if "unmeasured" in losses:
        yield f"losses against the CPU's: {losses['unmeasured']}"
        return
    for name, worst in losses["worst"].items():
        yield f"losses of {name} differ from the CPU's by at most {worst:.1e}"


# %% one configuration in words tags=["exporti"] module="bench.bench"
def _config_lines(config):
    shape = "L {num_layers}  NH {num_heads}  C {channels}  V {vocab_size}"
    yield (
        f"{config['name']}  {shape.format(**config['model'])}  "
        f"B {config['batch_size']}  T {config['seq_len']}: "
        f"{config['parameters']:,} parameters"
    )
    titles = "ms a step", "tokens/s", "GFLOP/s", "of peak", "peak MB"
    yield ""
    yield f"{'':<22}" + "".join(f"{x:>11}" for x in titles)
    for row in config["contestants"]:
        yield f"{row['name']:<22}" + _numbers(row)
    yield ""
    for x in config["ratios"]:
        yield (
            f"{x['ours']} / {x['peer']}: {x['ratio']:.2f} of its time, median "
            f"of the rounds ({x['low']:.2f} to {x['high']:.2f})"
        )
    for x in config.get("captures", []):
        yield f"{x['name']}: the graph saves {x['saved'] * 1e3:.2f} ms a step"
    for row in config["contestants"]:
        if "layers" in row:
            yield from ("", f"{row['name']}, where the time goes", "")
            yield from _table(row)


# %% the numbers of a row tags=["exporti"] module="bench.bench"
def _numbers(row):
    if "unmeasured" in row:
        return "  " + row["unmeasured"]
    share = row.get("share_of_peak")
    peak = row.get("device_bytes", row["peak_bytes"])
    cells = [
        f"{row['step_seconds'] * 1e3:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:.1f}",
        f"{share:.0%}" if share else "-",
        f"{peak / 1e6:,.0f}" if peak else "-",
    ]
    return "".join(f"{x:>11}" for x in cells)


# %% the table tags=["exporti"] module="bench.bench"
def _table(row):
    total = row["step_seconds"]
    rows = [(name, "", s) for name, s in row["parts"].items()]
    rows += [("", "", None)]
    rows += [(x["name"], x["calls"], x["seconds"]) for x in row["layers"]]
    yield f"{'':<30} {'calls':>6} {'ms':>9} {'share':>7}"
    for name, calls, s in rows:
        if s is None:
            yield ""
            continue
        yield f"{name:<30} {calls:>6} {s * 1e3:9.2f} {s / total:7.1%}"


# %% the bars tags=["export"] module="bench.bench"
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.
    """
    from matplotlib.figure import Figure

    rows = [
        (f"{config['name']}, {row['name']}", row)
        for config in result["configs"]
        for row in config["contestants"]
        if "layers" in row
    ]
    if not rows:
        raise ValueError("there is nothing to draw: no layer was measured")
    fig = Figure(figsize=(8, 0.4 + 2.9 * len(rows)), dpi=100)
    panels = fig.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (title, row) in zip(panels, rows, strict=True):
        _draw_bars(ax, row)
        ax.set_title(title, loc="left", size=11, parse_math=False)
    fig.tight_layout()
    return fig


# %% one panel tags=["exporti"] module="bench.bench"
def _draw_bars(ax, row):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    from llmnb.book.diagram import PALETTE

    times, names = {x["name"]: x["seconds"] * 1e3 for x in row["layers"]}, {}
    for name in times:
        names.setdefault(re.sub(r"_(for|back)ward$", "", name), None)
    left = dict.fromkeys(names, 0.0)
    for way, colour in (("forward", "blue"), ("backward", "orange")):
        width = [times.get(f"{x}_{way}", 0.0) for x in names]
        ax.barh([*names], width, left=[*left.values()], label=way,
                color=PALETTE[colour])  # fmt: skip
        left = dict(zip(names, width, strict=True))
    ax.barh([*names], [times.get(x, 0.0) for x in names], label="neither",
            color=PALETTE["grey"])  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds of a step")
    ax.legend(loc="lower right")


# %% [markdown]
# Here is the benchmark on this chapter's configuration, three rounds and
# nobody to race against.

# %% measured in a process of its own tags=["nbval-ignore-output"]
from llmnb.bench.bench import bench, report
from llmnb.bench.race import Settings

print(report(bench({"this chapter": (cfg, B, T)}, Settings(steps=3))))

# %% [markdown]
# With PyTorch or llm.c on your machine, `llmnb bench --config 124m-64
# --against torch llmc=PATH` races against them. The
# [results page](../../book/results.md) shows such races.

# %% [markdown]
# ## On a GPU
#
# A GPU adds three traps to the three above, and `llmnb bench --backend
# cuda` has to step around each of them.
#
# **A launch returns before the work is done.** The clock of the host reads
# how long it took to hand the work over. To time a whole step it must wait,
# so the contestants synchronise before they read the clock. To time one
# kernel, that wait would be longer than the kernel. A GPU keeps clocks of
# its own: an **event** is a mark in the stream of work, and the GPU notes
# the time as it passes. Two events, one before the kernel and one after it,
# differ by what the kernel took.
#
# **The host may be late.** If the GPU reaches the first event before the
# host has launched the kernel, the difference counts the GPU's waiting. So
# we give it something to do first, longer than the host needs to launch.
#
# **Memory remembers.** The second launch on the same arrays finds them in
# the L2 cache, 50 MB on an H100, and seems to beat the memory. In a training
# step other layers have been there in between. The work that keeps the GPU
# busy therefore reads a block larger than the L2, and what is timed begins
# with a **cold L2**.
#
# What a GPU is to do while it waits is a kernel that reads a block of
# memory and keeps one sum a thread; another copies, and a third does
# nothing but multiply and add, in as many chains as the additions need to
# overlap. The last two measure the machine's limits: bytes a second and
# operations a second.

# %% imports of the GPU's clock tags=["export"] module="bench.clock"
import subprocess
import time
from statistics import median

import numpy as np

from llmnb.gpu.launch import empty, kernel, missing, to_device
from llmnb.gpu.simulator import cuda, load4, store4

# %% three kernels that measure tags=["exporti"] module="bench.clock"
_CHAINS, _UNROLLED = 16, 8  # of multiply-adds: independent, and in a row


@kernel(launch_bounds=256)
def _sweep(out, inp):
    me, step = cuda.grid(1), cuda.gridsize(1)
    total = np.float32(0)
    for i in range(4 * me, inp.size, 4 * step):
        a, b, c, d = load4(inp, i)
        total += (a + b) + (c + d)
    out[me] = total


@kernel(launch_bounds=256)
def _copy(out, inp):
    me, step = cuda.grid(1), cuda.gridsize(1)
    for i in range(4 * me, inp.size, 4 * step):
        a, b, c, d = load4(inp, i)
        store4(out, i, a, b, c, d)


@kernel(launch_bounds=256)
def _multiply_add(out, turns):
    me = cuda.grid(1)
    x, chains = out[me], cuda.local.array(_CHAINS, np.float32)
    for k in range(_CHAINS):
        chains[k] = x + np.float32(k)
    for _ in range(turns):
        for _ in range(_UNROLLED):
            for k in range(_CHAINS):
                chains[k] = chains[k] * x + x
    for k in range(1, _CHAINS):
        chains[0] += chains[k]
    out[me] = chains[0]


# %% [markdown]
# The three are kernels as all others, so the simulator proves that they do
# what they say; only then is it worth anything to time them.

# %% the three on the simulated GPU
from llmnb.bench.clock import _copy, _multiply_add, _sweep
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.book.verify import compare

rng = np.random.default_rng(20)
block = simulated(rng.normal(size=640).astype(np.float32))
there, sums = empty(640, like=block), empty(64, like=block)
x = rng.uniform(0.1, 0.9, 64).astype(np.float32)
chain = simulated(x)
with watch() as seen:
    _copy[2, 32](there, block)
    _sweep[2, 32](sums, block)
    _multiply_add[2, 32](chain, 3)
want = x[:, None].astype(np.float64) + np.arange(16)
for _ in range(3 * 8):
    want = want * x[:, None] + x[:, None]
compare("copy", to_host(there), to_host(block), tol=1e-12)
total = to_host(block).sum(dtype=np.float64)
compare("sweep", to_host(sums).sum(dtype=np.float64), total, tol=1e-4)
errors = to_host(chain) / want.sum(1)
compare("multiply-add", errors, np.ones(64), tol=1e-5)
least = (3 * 640 + 3 * 64) * 4 // 32
print(f"{seen.sectors} sectors moved; the least are {least}")

# %% [markdown]
# `Clock` puts the events around what it is given. It asks how long the host
# takes to launch it, and sweeps as often as covers twice that. A GPU changes
# its clock rate as it warms up, and so the rounds are interleaved here too:
# `in_turns` times every version once a round, and the median is taken over
# the rounds.
#
# No GPU has run these lines yet. What could be tried without one has been:
# the kernels in the simulator, and the order of events and launches on a
# clock that is made up.


# %% a clock on the GPU tags=["export"] module="bench.clock"
class Clock:
    """Times what a GPU does, with a cold L2 and the host out of the way.

    Needs a GPU; it takes four times the memory of the L2 cache.
    """

    def __init__(self):
        from numba import cuda as real

        gpu = real.get_current_device()
        self._grid = 8 * gpu.MULTIPROCESSOR_COUNT
        floats = max(gpu.L2_CACHE_SIZE, 1 << 20)  # four times its bytes
        block = np.zeros(floats, np.float32)
        self._block, self._wait = to_device(block), real.synchronize
        self._sums = empty(256 * self._grid, like=self._block)
        self._marks = real.event(), real.event()
        swept = min(self._between(self._sweep) for _ in range(5))
        self._swept = max(swept, 1e-6)

    def _sweep(self):
        _sweep[self._grid, 256](self._sums, self._block)

    def _between(self, run):
        start, end = self._marks
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # from milliseconds

    def launching(self, run):
        """Seconds that the host needs for run(), which only launches."""
        run()  # compiles
        self._wait()
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        self._wait()
        return spent

    def seconds(self, run, launching):
        """Seconds that the GPU takes for what run() launches.

        launching: what the host takes, from the method of that name.
        """
        for _ in range(1 + int(2 * launching / self._swept)):
            self._sweep()
        return self._between(run)


# %% in turns tags=["export"] module="bench.clock"
def in_turns(clock, runs, budget=2.0, most=50):
    """Time each of some functions once a round; see `Clock`.

    runs: a dict from name to a function that launches. budget: seconds of
    GPU time to spend, roughly; at least five rounds and at most `most` are
    measured. Returns a dict from name to a list of seconds.
    """
    host = {name: clock.launching(run) for name, run in runs.items()}
    first = {name: clock.seconds(r, host[name]) for name, r in runs.items()}
    rounds = int(budget / max(sum(first.values()), 1e-9))
    found = {name: [] for name in runs}
    for _ in range(min(max(rounds, 5), most)):
        for name, run in runs.items():
            found[name].append(clock.seconds(run, host[name]))
    return found


# %% the limits of a GPU tags=["export"] module="bench.clock"
def limits(clock):
    """What a GPU reaches in the two kernels that do nothing else.

    Returns a dict: fma_peak, FLOP/s in float32 on registers alone, and
    copy_bytes, bytes read and written a second in a copy of 256 MB.
    """
    from numba import cuda as real

    grid = 8 * real.get_current_device().MULTIPROCESSOR_COUNT
    chains = to_device(np.full(256 * grid, 0.5, np.float32))
    here, turns = to_device(np.zeros(1 << 26, np.float32)), 4096
    there = empty(here.shape, like=here)
    runs = {
        "fma": lambda: _multiply_add[grid, 256](chains, turns),
        "copy": lambda: _copy[grid, 256](there, here),
    }
    spent = {k: median(v) for k, v in in_turns(clock, runs, 1.0).items()}
    flops = 2 * _CHAINS * _UNROLLED * turns * chains.size
    moved = 2 * here.nbytes
    return {
        "fma_peak": flops / spent["fma"],
        "copy_bytes": moved / spent["copy"],
    }


# %% which GPU tags=["export"] module="bench.clock"
def no_times():
    """Why nothing can be timed on a GPU here; empty where it can."""
    return f"no GPU: {missing()}" if missing() else ""


def gpu_facts():
    """The GPU's name, generation, processors, caches, clocks: a dict.

    Needs a GPU. clocks is what nvidia-smi says of them at this moment, or
    None where it is silent.
    """
    from numba import cuda as real

    gpu = real.get_current_device()
    name = gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name
    fields = "driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        said = None
    return {
        "name": name,
        "generation": list(gpu.compute_capability),
        "processors": gpu.MULTIPROCESSOR_COUNT,
        "l2_bytes": gpu.L2_CACHE_SIZE,
        "memory_bytes": real.current_context().get_memory_info()[1],
        "nvidia_smi": said,
    }


# %% [markdown]
# ### Every version of every layer
#
# The chapters climbed a ladder for each layer, version by version. Here all
# ladders hang in one table, `LADDERS`. A row says what a contest needs to
# know about a layer: how to draw its arguments, which of them it writes,
# what PyTorch calls the same operation, and how many bytes and operations
# the work takes at least. The rest follows from names: the layer's
# function, its tuple of versions and its reference bear the layer's name.
#
# The least bytes are those of the arguments: each array that is read or
# written once, each that is read and written twice. A table of vectors, as
# the encoder's, counts only the rows that the batch asks for.

# %% imports of the ladders tags=["export"] module="bench.ladders"
import functools
import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmnb.gpu.launch import empty
from llmnb.reference.adamw import AdamW


# %% sizes tags=["export"] module="bench.ladders"
class Sizes(NamedTuple):
    """What a layer's arguments are drawn for: the book's letters."""

    B: int
    T: int
    C: int
    NH: int
    V: int
    L: int

    @property
    def Vp(self):
        return -(-self.V // 128) * 128


GPT2_124M = Sizes(16, 1024, 768, 12, 50257, 12)
COUNTED = Sizes(1, 32, 64, 1, 253, 1)  # what the simulator counts
LONG_ROWS = Sizes(1, 4, 64, 1, 4301, 1)  # and of logits
TINY = Sizes(2, 5, 32, 2, 61, 1)  # for tests


# %% draw arguments tags=["exporti"] module="bench.ladders"
class _Draw:
    """Random arguments; what a layer must write is NaN before."""

    def __init__(self, seed):
        self._random = np.random.default_rng(seed)

    def floats(self, *shape, scale=1.0):
        x = self._random.standard_normal(shape, np.float32)
        return x if scale == 1 else x * np.float32(scale)

    def tokens(self, below, *shape):
        return self._random.integers(0, below, shape, np.int32)

    def nothing(self, *shape):
        return np.full(shape, np.nan, np.float32)


# %% one ladder tags=["export"] module="bench.ladders"
class Ladder(NamedTuple):
    """A layer whose versions are compared.

    module: of llmnb.cuda and llmnb.reference. layer: the function's name in
    both. arguments: a function of Sizes and a draw that returns the
    arguments as a dict, in order. writes, changes: names of those that are
    only written, and read and written. torch: a function of the module
    torch and the arguments that returns what to run; its tuple of results
    is in the order of writes and then changes, and may end early; None
    where PyTorch has no such operation. flops: a function of Sizes, or None
    where the bytes are what takes the time. moved: a function of the
    arguments, the least bytes; None for each array once or twice. work: a
    function of the module of llmnb.cuda, Sizes and a version, the floats of
    scratch memory. reference: in place of the function of that name.
    checked: at most how many rows of the batch are compared with the
    reference. tolerance: of that, relative to the largest element of a
    result. named: the tuple of versions, where it does not bear the layer's
    name. library: returns the calls of NVIDIA's library, by name, which are
    timed where it starts. counted: the sizes that the simulator counts at,
    large enough for the kernels that large sizes get.
    """

    module: str
    layer: str
    arguments: object
    writes: tuple = ()
    changes: tuple = ()
    torch: object = None
    flops: object = None
    moved: object = None
    work: object = None
    reference: object = None
    checked: int = 16
    tolerance: float = 5e-5
    named: str = ""
    library: object = None
    counted: Sizes = COUNTED

    def _found(self, package, name):
        module = importlib.import_module(f"llmnb.{package}.{self.module}")
        return getattr(module, name)

    @property
    def versions(self):
        """The functions of the versions, in order; the last is the layer's."""
        name, rungs = self.named or self.layer.upper(), ()
        module = importlib.import_module(f"llmnb.cuda.{self.module}")
        if hasattr(module, name):  # a layer that takes a version
            return getattr(module, name)
        plainer = f"llmnb.bench.rungs_{self.module}"
        if importlib.util.find_spec(plainer):
            rungs = getattr(importlib.import_module(plainer), name, ())
        return (*rungs, getattr(module, self.layer))

    def function(self, version):
        """The layer in a version."""
        layer = self._found("cuda", self.layer)
        if self.versions[-1] is layer:
            return self.versions[version - 1]
        return functools.partial(layer, version=version)

    def scratch(self, sizes, version):
        """How many floats of scratch memory a version wants, or 0."""
        if self.work is None:
            return 0
        module = importlib.import_module(f"llmnb.cuda.{self.module}")
        return self.work(module, sizes, version)

    def draw(self, sizes, seed=0):
        """The arguments as a dict of NumPy arrays and numbers."""
        return self.arguments(sizes, _Draw(seed))

    def expected(self, arguments):
        """What the layer should leave, by name, from float64."""
        wide = {
            k: v.astype(np.float64) if is_float(v) else v
            for k, v in arguments.items()
        }
        compute = self.reference or self._found("reference", self.layer)
        compute(*wide.values())
        return {name: wide[name] for name in self.writes + self.changes}

    def least_bytes(self, arguments):
        """Bytes that must be moved whatever the version."""
        if self.moved:
            return int(self.moved(SimpleNamespace(**arguments)))
        arrays = {k: v for k, v in arguments.items() if hasattr(v, "nbytes")}
        return sum(
            v.nbytes * (2 if k in self.changes else 1)
            for k, v in arrays.items()
            if getattr(v, "ndim", 0)
        )


def version_name(function):
    """The name of a version's function, which may be a functools.partial."""
    return getattr(function, "func", function).__name__.strip("_")


def is_float(x):
    """Whether x is an array of floats."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# %% [markdown]
# What follows is long but plain: for each layer its arguments, and what a
# user of PyTorch would call. Gradients by PyTorch come from its own
# backward operations where these have a name, so that no forward pass is
# timed with them.


# %% the encoder's row tags=["exporti"] module="bench.ladders"
def _encoder_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "inp": draw.tokens(s.V, s.B, s.T),
        "wte": draw.floats(s.Vp, s.C),
        "wpe": draw.floats(s.T, s.C),
    }


def _encoder_backward(s, draw):
    return {
        "dwte": draw.floats(s.Vp, s.C),
        "dwpe": draw.floats(s.T, s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": draw.tokens(s.V, s.B, s.T),
    }


def _torch_encoder(torch, a):
    from torch.nn import functional as F

    return lambda: (F.embedding(a.inp, a.wte) + a.wpe,)


def _torch_encoder_back(torch, a):
    inp, back = a.inp.long(), torch.ops.aten.embedding_dense_backward
    Vp = len(a.dwte)
    return lambda: (back(a.dout, inp, Vp, -1, False), a.dout.sum(0))


def _rows(a):
    """Bytes of the rows of a table that a batch asks for."""
    width = getattr(a, "wte", getattr(a, "dwte", None)).shape[1]
    return 4 * width * len(np.unique(a.inp))


# %% LayerNorm's row tags=["exporti"] module="bench.ladders"
def _layernorm_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "mean": draw.nothing(s.B, s.T),
        "rstd": draw.nothing(s.B, s.T),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(s.C),
        "bias": draw.floats(s.C),
    }


def _layernorm_backward(s, draw):
    inp = draw.floats(s.B, s.T, s.C)
    return {
        "dinp": draw.floats(s.B, s.T, s.C),
        "dweight": draw.floats(s.C),
        "dbias": draw.floats(s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": inp,
        "weight": draw.floats(s.C),
        "mean": inp.mean(-1),
        "rstd": 1 / np.sqrt(inp.var(-1) + np.float32(1e-5)),
    }


def _torch_layernorm(torch, a):
    layer, C = torch.native_layer_norm, a.weight.shape
    return lambda: layer(a.inp, C, a.weight, a.bias, 1e-5)


def _torch_layernorm_back(torch, a):
    back, bias = torch.ops.aten.native_layer_norm_backward, a.dbias
    fixed = a.inp, [len(bias)], a.mean[..., None], a.rstd[..., None]
    return lambda: back(a.dout, *fixed, a.weight, bias, [True] * 3)


# %% the product's row tags=["exporti"] module="bench.ladders"
def _matmul_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, 4 * s.C),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(4 * s.C, s.C, scale=0.02),
        "bias": draw.floats(4 * s.C),
    }


def _matmul_backward(s, draw):
    return {
        "dinp": draw.floats(s.B, s.T, s.C),
        "dweight": draw.floats(4 * s.C, s.C),
        "dbias": draw.floats(4 * s.C),
        "dout": draw.floats(s.B, s.T, 4 * s.C),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(4 * s.C, s.C, scale=0.02),
    }


def _library(name):
    """cuBLASLt's product, without and with TF32."""
    from llmnb.cuda import cublas

    multiply = getattr(cublas, name)
    work = empty(cublas.cublas_scratch())
    return {
        "cuBLASLt": functools.partial(multiply, work=work),
        "cuBLASLt, TF32": functools.partial(multiply, work=work, tf32=True),
    }


def _torch_matmul(torch, a):
    from torch.nn import functional as F

    return lambda: (F.linear(a.inp, a.weight, a.bias),)


def _torch_matmul_back(torch, a):
    inp, dout = a.inp.flatten(0, 1), a.dout.flatten(0, 1)
    return lambda: (
        (dout @ a.weight).view_as(a.inp),
        dout.T @ inp,
        dout.sum(0),
    )


# %% attention's row tags=["exporti"] module="bench.ladders"
def _attention_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "lse": draw.nothing(s.B, s.NH, s.T),
        "inp": draw.floats(s.B, s.T, 3 * s.C),
    }


def _attention_backward(s, draw):
    from llmnb.cpu.attention import attention_forward as fast
    from llmnb.reference.attention import attention_forward as small

    a = SimpleNamespace(**_attention_forward(s, draw))
    (fast if s.T > 256 else small)(a.out, a.lse, a.inp)
    return {
        "dinp": draw.floats(s.B, s.T, 3 * s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": a.inp,
        "out": a.out,
        "lse": a.lse,
    }


def _attend(torch, inp, NH):
    """PyTorch's attention on one array of queries, keys and values."""
    from torch.nn import functional as F

    B, T, C = inp.shape[0], inp.shape[1], inp.shape[2] // 3
    q, k, v = inp.view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _torch_attention(torch, a):
    return lambda: (_attend(torch, a.inp, a.lse.shape[1]),)


def _torch_attention_back(torch, a):
    inp = a.inp.detach().requires_grad_()
    out, grad = _attend(torch, inp, a.lse.shape[1]), torch.autograd.grad
    return lambda: grad(out, inp, a.dout, retain_graph=True)


# %% GELU's row and the residual's tags=["exporti"] module="bench.ladders"
def _gelu_forward(s, draw):
    shape = s.B, s.T, 4 * s.C
    return {"out": draw.nothing(*shape), "inp": draw.floats(*shape)}


def _gelu_backward(s, draw):
    shape = s.B, s.T, 4 * s.C
    return {name: draw.floats(*shape) for name in ("dinp", "dout", "inp")}


def _torch_gelu(torch, a):
    from torch.nn import functional as F

    return lambda: (F.gelu(a.inp, approximate="tanh"),)


def _torch_gelu_back(torch, a):
    back, how = torch.ops.aten.gelu_backward, {"approximate": "tanh"}
    return lambda: (back(a.dout, a.inp, **how),)


def _residual_forward(s, draw):
    shape = s.B, s.T, s.C
    first = {"out": draw.nothing(*shape)}
    return first | {x: draw.floats(*shape) for x in ("inp1", "inp2")}


def _residual_backward(s, draw):
    names = "dinp1", "dinp2", "dout"
    return {x: draw.floats(s.B, s.T, s.C) for x in names}


def _fused_residual(s, draw):
    arrays = _layernorm_forward(s, draw)
    arrays["inp1"] = arrays.pop("inp")
    arrays |= {"inp2": draw.floats(s.B, s.T, s.C)}
    arrays |= {"residual": draw.nothing(s.B, s.T, s.C)}
    first = "residual", "out", "mean", "rstd", "inp1", "inp2"
    return {x: arrays[x] for x in (*first, "weight", "bias")}


def _add_and_normalise(residual, out, mean, rstd, inp1, inp2, weight, bias):
    """The reference of the fused residual: the two functions, in turn."""
    from llmnb.reference.layernorm import layernorm_forward
    from llmnb.reference.residual import residual_forward

    residual_forward(residual, inp1, inp2)
    layernorm_forward(out, mean, rstd, residual, weight, bias)


def _torch_fused_residual(torch, a):
    layer, C = torch.native_layer_norm, a.weight.shape

    def run():
        x = torch.add(a.inp1, a.inp2)
        return x, *layer(x, C, a.weight, a.bias, 1e-5)

    return run


def _torch_residual(torch, a):
    return lambda: (torch.add(a.inp1, a.inp2),)


def _torch_residual_back(torch, a):
    return lambda: (a.dinp1.add_(a.dout), a.dinp2.add_(a.dout))


# %% logits tags=["exporti"] module="bench.ladders"
def _logits(s, draw):
    """Logits; the padding is NaN, for nobody may read it."""
    x = draw.floats(s.B, s.T, s.Vp)
    x[..., s.V :] = np.nan
    return x


def _loss_forward(s, draw):
    return {
        "losses": draw.nothing(s.B, s.T),
        "lse": draw.nothing(s.B, s.T),
        "logits": _logits(s, draw),
        "targets": draw.tokens(s.V, s.B, s.T),
        "V": s.V,
    }


def _loss_backward(s, draw):
    logits = _logits(s, draw)
    x = logits[..., : s.V]
    top = x.max(-1)
    lse = top + np.log(np.exp(x - top[..., None]).sum(-1))
    return {
        "dlogits": draw.nothing(s.B, s.T, s.Vp),
        "dlosses": draw.floats(s.B, s.T, scale=1 / (s.B * s.T)),
        "logits": logits,
        "lse": lse,
        "targets": draw.tokens(s.V, s.B, s.T),
        "V": s.V,
    }


# %% losses in PyTorch tags=["exporti"] module="bench.ladders"
def _torch_losses(torch, a, logits):
    from torch.nn import functional as F

    rows, targets = logits.flatten(0, 1), a.targets.long().flatten()
    losses = F.cross_entropy(rows, targets, reduction="none")
    return losses.view(a.targets.shape)


def _torch_loss(torch, a):
    return lambda: (_torch_losses(torch, a, a.logits),)


def _torch_loss_back(torch, a):
    logits, grad = a.logits.detach().requires_grad_(), torch.autograd.grad
    losses = _torch_losses(torch, a, logits)
    return lambda: grad(losses, logits, a.dlosses, retain_graph=True)


# %% AdamW's row tags=["exporti"] module="bench.ladders"
_SETTINGS = AdamW(1e-4, step=3)


def _adamw(s, draw):
    """As many parameters as L blocks and the tables have, nearly."""
    from llmnb.cuda.adamw import adamw_settings

    size = (s.Vp + s.T + 12 * s.L * s.C) * s.C
    arrays = {x: draw.floats(size) for x in ("params", "grads", "m", "v")}
    arrays["v"] **= 2
    return arrays | {"settings": adamw_settings(_SETTINGS)}


def _adamw_as_written(params, grads, m, v, settings):
    """The reference of adamw_apply, which reads its settings from memory."""
    from llmnb.reference.adamw import adamw_update

    adamw_update(params, grads, m, v, _SETTINGS)


def _torch_adamw(torch, a):
    weights = torch.nn.Parameter(a.params)
    weights.grad = a.grads
    lr, *betas, eps, decay, _ = _SETTINGS
    rules = {"betas": betas, "eps": eps, "weight_decay": decay}
    optimizer = torch.optim.AdamW([weights], lr, fused=True, **rules)

    def run():
        optimizer.step()
        return ()

    return run


# %% all ladders tags=["export"] module="bench.ladders"
LADDERS = (
    Ladder("encoder", "encoder_forward", _encoder_forward, ("out",),
           torch=_torch_encoder,
           moved=lambda a: a.out.nbytes + a.wpe.nbytes + a.inp.nbytes
           + _rows(a)),
    Ladder("encoder", "encoder_backward", _encoder_backward,
           changes=("dwte", "dwpe"), torch=_torch_encoder_back,
           moved=lambda a: a.dout.nbytes + 2 * a.dwpe.nbytes + a.inp.nbytes
           + 2 * _rows(a)),
    Ladder("layernorm", "layernorm_forward", _layernorm_forward,
           ("out", "mean", "rstd"), torch=_torch_layernorm),
    Ladder("layernorm", "layernorm_backward", _layernorm_backward,
           changes=("dinp", "dweight", "dbias"), torch=_torch_layernorm_back,
           work=lambda m, s, v: m.layernorm_scratch(s.B * s.T, s.C)),
    Ladder("matmul", "matmul_forward", _matmul_forward, ("out",),
           torch=_torch_matmul, flops=lambda s: 8 * s.B * s.T * s.C**2,
           library=lambda: _library("cublas_forward")),
    Ladder("matmul", "matmul_backward", _matmul_backward,
           changes=("dinp", "dweight", "dbias"), torch=_torch_matmul_back,
           flops=lambda s: 16 * s.B * s.T * s.C**2,
           work=lambda m, s, v: m.matmul_scratch(s.B * s.T, 4 * s.C),
           library=lambda: _library("cublas_backward")),
    Ladder("attention", "attention_forward", _attention_forward,
           ("out", "lse"), torch=_torch_attention, checked=2,
           flops=lambda s: 2 * s.B * s.T * (s.T + 1) * s.C,
           work=lambda m, s, v: m.attention_scratch(s.B, s.T, s.NH, v, 0)),
    Ladder("attention", "attention_backward", _attention_backward,
           changes=("dinp",), torch=_torch_attention_back, checked=2,
           flops=lambda s: 5 * s.B * s.T * (s.T + 1) * s.C,
           work=lambda m, s, v: m.attention_scratch(s.B, s.T, s.NH, 0, v)),
    Ladder("gelu", "gelu_forward", _gelu_forward, ("out",),
           torch=_torch_gelu),
    Ladder("gelu", "gelu_backward", _gelu_backward, changes=("dinp",),
           torch=_torch_gelu_back),
    Ladder("residual", "residual_forward", _residual_forward, ("out",),
           torch=_torch_residual),
    Ladder("residual", "residual_backward", _residual_backward,
           changes=("dinp1", "dinp2"), torch=_torch_residual_back),
    Ladder("residual", "fused_residual_forward", _fused_residual,
           ("residual", "out", "mean", "rstd"), torch=_torch_fused_residual,
           reference=_add_and_normalise),
    Ladder("crossentropy", "crossentropy_softmax_forward", _loss_forward,
           ("losses", "lse"), torch=_torch_loss, checked=1, counted=LONG_ROWS),
    Ladder("crossentropy", "crossentropy_softmax_backward", _loss_backward,
           ("dlogits",), torch=_torch_loss_back, checked=1, counted=LONG_ROWS),
    Ladder("adamw", "adamw_apply", _adamw, changes=("params", "m", "v"),
           torch=_torch_adamw, reference=_adamw_as_written),
)  # fmt: skip


def ladder_named(name):
    """The Ladder of a layer; raises ValueError where there is none."""
    found = [x for x in LADDERS if x.layer == name]
    if not found:
        known = ", ".join(x.layer for x in LADDERS)
        raise ValueError(f"no layer {name!r}: choose from {known}")
    return found[0]


# %% [markdown]
# ### The contest
#
# A version must be right before it is timed: it gets fresh random
# arguments, its outputs hold NaN, and what it leaves is compared with the
# reference in float64. Where the reference would take minutes, it is given
# fewer rows of the batch. Then all versions of a layer take turns, and with
# them PyTorch's operation, on the same arrays on the same GPU.
#
# Without a GPU the contest goes as far as it can. The simulator runs every
# version at a small size, compares it, and counts its requests and the
# sectors they move. The compiler says what each kernel would be on an A100
# and on an H100. The time is left out, and the row says why: no number
# stands in for it.

# %% imports of the contest tags=["export"] module="bench.contest"
import functools
from datetime import date
from statistics import median

import numpy as np

from llmnb.bench.clock import Clock, gpu_facts, in_turns, limits, no_times
from llmnb.cuda.cublas import no_cublas
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch
from llmnb.bench.ladders import (
    GPT2_124M,
    LADDERS,
    is_float,
    ladder_named,
    version_name,
)
from llmnb.timing import machine


# %% run a version tags=["exporti"] module="bench.contest"
def _prepared(ladder, version, arguments, sizes, place):
    """A version ready to run, and its arguments on a device, by name."""
    there = {
        k: place(v) if isinstance(v, np.ndarray) else v
        for k, v in arguments.items()
    }
    run = ladder.function(version)
    floats = ladder.scratch(sizes, version)
    if floats:
        like = there[(ladder.writes + ladder.changes)[0]]
        run = functools.partial(run, work=empty(floats, like=like))
    return functools.partial(run, *there.values()), there


# %% is it right tags=["exporti"] module="bench.contest"
def _judged(ladder, there, arguments, want):
    """Compare what a version left: {"error": number} or {"wrong": text}."""
    worst = 0.0
    for name, array in there.items():
        if not hasattr(array, "copy_to_host"):
            continue
        got = to_host(array)
        if name not in want:
            if not np.array_equal(got, arguments[name], is_float(got)):
                return {"wrong": f"{name} was changed"}
            continue
        if not np.isfinite(got).all():
            return {"wrong": f"{name} is not finite everywhere"}
        scale = max(1.0, np.abs(want[name]).max())
        error = float(np.abs(got - want[name]).max() / scale)
        if error > ladder.tolerance:
            return {"wrong": f"{name} is {error:.0e} from the reference"}
        worst = max(worst, error)
    return {"error": worst}


def judge(ladder, version, sizes, place=to_device, seed=1):
    """Run a version on fresh arguments and compare with the reference.

    ladder: a Ladder. sizes: of the arguments; of B at most ladder.checked
    are used. place: to_device or simulated. Returns a dict: error, the
    worst relative to the largest element of a result; or wrong, a text.
    """
    sizes = sizes._replace(B=min(sizes.B, ladder.checked))
    arguments = ladder.draw(sizes, seed)
    run, there = _prepared(ladder, version, arguments, sizes, place)
    run()
    return _judged(ladder, there, arguments, ladder.expected(arguments))


# %% what the simulator sees tags=["export"] module="bench.contest"
SEEN = (
    *("threads", "requests", "sectors", "shared_requests", "shared_passes"),
    *("barriers", "atomics"),
)


def count(ladder, version, sizes=None):
    """Simulate a version under watch, and compare what it leaves.

    sizes: None for the ladder's own. Returns two things: a dict with the
    sizes, the least bytes, the number of launches, the counts of `SEEN` and,
    where the result is not that of the reference, wrong; and the launches,
    as `Seen` holds them. An error of the watch is raised.
    """
    sizes = sizes or ladder.counted
    arguments = ladder.draw(sizes)
    run, there = _prepared(ladder, version, arguments, sizes, simulated)
    with watch() as seen:
        run()
    found = {"sizes": sizes._asdict(), "launches": len(seen.launches)}
    found |= {"least_bytes": ladder.least_bytes(arguments)}
    found |= {name: int(getattr(seen, name)) for name in SEEN}
    verdict = _judged(ladder, there, arguments, ladder.expected(arguments))
    if "wrong" in verdict:
        found |= verdict
    return found, seen.launches


# %% what the compiler says tags=["export"] module="bench.contest"
GENERATIONS = {"sm_80": (8, 0), "sm_90": (9, 0)}
FACTS = (
    *("registers", "spilled", "stack", "shared", "float64"),
    *("vector_loads", "vector_stores"),
)


@functools.cache
def _compiled(kernel, kinds, cc):
    made = compile_kernel(kernel, kinds, cc)
    return {name: getattr(made, name) for name in FACTS}


def compiled(launches):
    """What the kernels of some launches are for each of `GENERATIONS`.

    Returns a list with a dict a kernel: name, and of each generation the
    `FACTS` of a Compiled. Needs numba-cuda and no GPU.
    """
    kinds = dict.fromkeys((kernel, kinds) for kernel, _, _, kinds in launches)
    return [
        {"name": kernel.__name__.lstrip("_")}
        | {k: _compiled(kernel, types, cc) for k, cc in GENERATIONS.items()}
        for kernel, types in kinds
    ]


# %% what is timed tags=["exporti"] module="bench.contest"
def _no_torch():
    """PyTorch's module, and why there is none; one of them is None."""
    try:
        import torch
    except ImportError:
        return None, "this Python has no torch"
    if not torch.cuda.is_available():
        return None, "torch finds no GPU"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch, None


def _torch_run(ladder, torch, there):
    """PyTorch's operation on the memory of a device's arrays."""
    from types import SimpleNamespace

    tensors = {
        k: torch.as_tensor(v, device="cuda") if hasattr(v, "nbytes") else v
        for k, v in there.items()
    }
    return ladder.torch(torch, SimpleNamespace(**tensors))


def timed(ladder, versions, sizes, clock, peer=None):
    """Let versions of a layer take turns on a GPU, and PyTorch with them.

    versions: numbers from 1. clock: a `Clock`. peer: the module torch, or
    None. NVIDIA's library joins in where the layer has one that starts.
    Returns the least bytes and a dict from number, the library's names and
    "torch" to lists of seconds.
    """
    arguments = ladder.draw(sizes)
    least = ladder.least_bytes(arguments)
    _, there = _prepared(ladder, 1, arguments, sizes, to_device)
    runs = {}
    for version in versions:
        run = ladder.function(version)
        floats = ladder.scratch(sizes, version)
        if floats:
            run = functools.partial(run, work=empty(floats))
        runs[version] = functools.partial(run, *there.values())
    if ladder.library and not no_cublas():
        for name, run in ladder.library().items():
            runs[name] = functools.partial(run, *there.values())
    if peer and ladder.torch:
        runs["torch"] = _torch_run(ladder, peer, there)
    return least, in_turns(clock, runs)


# %% one layer tags=["exporti"] module="bench.contest"
def _says(function):
    """What a version is, in words: its name."""
    return version_name(function).replace("_", " ")


def _without_gpu(ladder, number, function, counted, why):
    """The row of a version: what can be known with no GPU."""
    row = {"version": number, "name": version_name(function)}
    row |= {"says": _says(function)}
    row["counted"], launches = count(ladder, number, counted)
    if no_compiler():
        row["compiled"] = {"unmeasured": no_compiler()}
    else:
        row["compiled"] = compiled(launches)
    row["time"] = {"unmeasured": why}
    return row


def _time_layer(ladder, rows, sizes, clock):
    """Judge the versions on the GPU, time those that are right.

    Fills in rows; returns the entries of the layer.
    """
    good = []
    for row in rows:
        row["judged"] = judge(ladder, row["version"], sizes)
        wrong = row["judged"].get("wrong")
        if wrong:
            row["time"] = {"unmeasured": f"wrong: {wrong}"}
        else:
            good.append(row["version"])
    torch, why = _no_torch()
    least, seconds = timed(ladder, good, sizes, clock, torch)
    for row in rows:
        if row["version"] in seconds:
            row["time"] = {"seconds": seconds[row["version"]]}
    found = {"sizes": sizes._asdict(), "least_bytes": least}
    if ladder.flops:
        found["flops"] = ladder.flops(sizes)
    found["peers"] = {
        name: {"seconds": spent}
        for name, spent in seconds.items()
        if isinstance(name, str)
    }
    if "torch" not in seconds:
        why = why or "PyTorch has no such operation by itself"
        found["peers"]["torch"] = {"unmeasured": why}
    if ladder.library and no_cublas():
        found["peers"]["cuBLASLt"] = {"unmeasured": no_cublas()}
    return found


# %% the contest tags=["export"] module="bench.contest"
def contest(layers=(), sizes=GPT2_124M, counted=None, bar=iter):
    """Compare the versions of layers; a dict ready for JSON.

    layers: names in `LADDERS`, or none for all. sizes: of what is timed,
    where there is a GPU. counted: of what is simulated; None for the
    ladders' own. bar: takes the
    ladders and gives them back, such as tqdm. Raises ValueError for a name
    that is not there.
    """
    ladders = [ladder_named(x) for x in layers] or [*LADDERS]
    why = no_times()
    clock = None if why else Clock()
    result = {"gpu": {"unmeasured": why}, "limits": {"unmeasured": why}}
    if clock:
        result = {"gpu": gpu_facts(), "limits": limits(clock)}
    result["ladders"] = []
    for ladder in bar(ladders):
        rows = [
            _without_gpu(ladder, 1 + i, function, counted, why)
            for i, function in enumerate(ladder.versions)
        ]
        found = {"layer": ladder.layer, "versions": rows}
        if clock:
            found |= _time_layer(ladder, rows, sizes, clock)
        else:
            found["peers"] = {"torch": {"unmeasured": why}}
            if ladder.library:
                found["peers"]["cuBLASLt"] = {"unmeasured": why}
        result["ladders"].append(found)
    return result


# %% medians and shares tags=["export"] module="bench.contest"
def speeds(result):
    """What follows from the times of a contest, for tables and figures.

    Yields dicts: layer, version (a number, or a peer's name), seconds (the
    median), low, high, and rate and share: bytes a second of what a copy
    reaches, or FLOP/s of the peak, whichever the layer counts. Rows
    without a time are left out.
    """
    for found in result["ladders"]:
        rows = [(x["version"], x["time"]) for x in found["versions"]]
        work = found.get("flops", found.get("least_bytes"))
        kind = "fma_peak" if "flops" in found else "copy_bytes"
        for version, each in [*rows, *found["peers"].items()]:
            if "unmeasured" in each:
                continue
            middle = median(each["seconds"])
            low, high = min(each["seconds"]), max(each["seconds"])
            rate = work / middle
            yield {
                "layer": found["layer"], "version": version, "rate": rate,
                "share": rate / result["limits"][kind], "kind": kind,
                "seconds": middle, "low": low, "high": high,
            }  # fmt: skip


# %% the contest in words tags=["export"] module="bench.contest"
def contest_report(result):
    """The result of `contest` as a text of lines to print."""
    gpu, most = result["gpu"], result["limits"]
    nothing = gpu.get("unmeasured")  # the one reason of all rows
    lines = [f"GPU      {gpu.get('name') or 'none: ' + gpu['unmeasured']}"]
    if "fma_peak" in most:
        lines.append(
            f"limits   {most['fma_peak'] / 1e12:.1f} TFLOP/s, "
            f"{most['copy_bytes'] / 1e9:,.0f} GB/s of copying"
        )
    fast = {(x["layer"], x["version"]): x for x in speeds(result)}
    for found in result["ladders"]:
        titles = "sectors", "of least", "requests", "registers", "vectors"
        lines += ["", found["layer"], ""]
        lines.append(f"{'':<34}" + "".join(f"{x:>11}" for x in titles))
        for row in found["versions"]:
            speed = fast.get((found["layer"], row["version"]))
            lines += _version_lines(row, speed, nothing)
        for name, row in found["peers"].items():
            speed = fast.get((found["layer"], name))
            said = _speed(speed) if speed else row["unmeasured"]
            lines += [] if said == nothing else [f"{name}: {said}"]
        if nothing:
            lines.append(f"  all of these and PyTorch's: {nothing}")
    return "\n".join(lines)


def _version_lines(row, speed, nothing):
    """A line of counts, and one of the time, or why this row has none."""
    seen, made = row["counted"], row["compiled"]
    least = seen["sectors"] * 32 / seen["least_bytes"]
    cells = [f"{seen['sectors']:,}", f"{least:.2f}", f"{seen['requests']:,}"]
    if isinstance(made, list):
        for fact in ("registers", "vector_loads"):
            cells.append("+".join(f"{x['sm_90'][fact]}" for x in made))
    title = f"{row['version']} {row['says']}"
    yield f"{title[:33]:<34}" + "".join(f" {x:>10}" for x in cells)
    said = _speed(speed) if speed else row["time"]["unmeasured"]
    if said != nothing:
        yield f"  {said}"
    if "wrong" in seen:
        yield f"  WRONG on the simulator: {seen['wrong']}"


def _speed(x):
    units = {"fma_peak": (1e12, "TFLOP/s"), "copy_bytes": (1e9, "GB/s")}
    scale, unit = units[x["kind"]]
    return (
        f"{x['seconds'] * 1e6:,.1f} us ({x['low'] * 1e6:,.1f} to "
        f"{x['high'] * 1e6:,.1f}), {x['rate'] / scale:,.1f} {unit}, "
        f"{x['share']:.0%} of the limit"
    )


# %% the ladders drawn tags=["export"] module="bench.contest"
def ladders_figure(result):
    """The share of its limit that each version reaches, a panel a layer.

    A matplotlib figure. result: of `contest`, measured on a GPU. Raises
    ValueError when nothing in it was timed.
    """
    from matplotlib.figure import Figure

    from llmnb.book.diagram import PALETTE

    panels = {}
    for x in speeds(result):
        panels.setdefault(x["layer"], []).append(x)
    if not panels:
        raise ValueError("there is nothing to draw: no kernel was timed")
    counts = [len(rows) for rows in panels.values()]
    size = 8, sum(0.9 + 0.3 * n for n in counts)
    fig = Figure(figsize=size, dpi=100)
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=counts)
    for ax, (layer, rows) in zip(axes[:, 0], panels.items(), strict=True):
        ours = [isinstance(x["version"], int) for x in rows]
        names = [
            f"version {x['version']}" if mine else x["version"]
            for x, mine in zip(rows, ours, strict=True)
        ]
        colours = [PALETTE["blue" if x else "grey"] for x in ours]
        ax.barh(names, [100 * x["share"] for x in rows], color=colours)
        ax.invert_yaxis()
        ax.set_title(layer, loc="left", size=11, parse_math=False)
        limit = {"fma_peak": "peak of multiply-adds", "copy_bytes": "copy"}
        ax.set_xlabel(f"per cent of the GPU's {limit[rows[0]['kind']]}")
    fig.tight_layout()
    return fig


# %% [markdown]
# Here is one ladder, as far as it goes without a clock. On a machine with a
# GPU `llmnb bench --backend cuda --kernels` adds the times of all of them,
# with PyTorch beside; the [results page](../../book/results.md) shows what has
# been measured, and says what has not.

# %% one ladder, counted
from llmnb.bench.contest import count
from llmnb.bench.ladders import TINY, ladder_named

ladder = ladder_named("layernorm_forward")
for number in range(1, 1 + len(ladder.versions)):
    seen, _ = count(ladder, number, TINY)
    moved = 32 * seen["sectors"] / seen["least_bytes"]
    print(f"{number}: {moved:.2f} times the least bytes moved")
    verdict(f"version {number}", "wrong" not in seen, "is right")

# %% [markdown]
# ## Take away
#
# - A step's time is the sum of its layers' times, and the products take most
#   of it.
# - Compare speeds in turns, each program in its own process, by the median
#   of the rounds' ratios.
# - Say with every number on which machine it was measured, and how busy that
#   machine was.
# - A GPU's time is read from events in its own queue, after something that
#   keeps it busy and empties its cache; a version that is wrong gets no time.
# - What was not measured is said to be unmeasured, with the reason.

# %% [markdown]
# ## Design note
#
# A profiler would find the slow layer without a line of our own code. But a
# profiler that watches Python's calls charges each of them a microsecond or
# so, and one that samples the processor does not know where a layer begins.
# Our layers are a few dozen calls a step, each of a millisecond: a clock
# read before and after costs nothing that could be seen, and needs no tool.
#
# The race could have used threads in one process, which is simpler. Then
# PyTorch and NumPy would share one heap and compete for one pool of cores,
# and the peak memory of each could not be told apart. A process apiece keeps
# the answers apart, at the price of a small protocol on standard input.

# %% [markdown]
# ## Exercises
#
# **1** (★). Ten rounds gave these ratios of our time to a peer's: nine near
# 0.8, and one of 3. What do the mean and the median say? How many of the
# ten rounds could be spoilt before the median is?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The mean says 1.02, a defeat; the median says 0.8. Up to four spoilt rounds
# leave both middle values good; the fifth moves one of them.
# :::

# %% exercise 1, checked tags=["hide-cell"]
clean, spoilt = [0.8] * 9, [3.0]
verdict("mean", np.mean(clean + spoilt) > 1, "misled by one round")
for bad in range(6):
    middle = np.median([0.8] * (10 - bad) + [3.0] * bad)
    print(f"{bad} spoilt rounds: median {middle:.1f}")

# %% [markdown]
# **2** (★★). Each layer's time is measured with a clock that is read twice.
# Measure what reading it costs, and say for how short a layer that would
# spoil the result by one per cent.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# A reading takes well below a microsecond, so two of them and the addition
# spoil a layer of some fifty microseconds by a per cent. The layers of the
# model above take longer, except the residual sum of one short row.
# :::

# %% exercise 2, checked
import timeit

reading = timeit.timeit(time.perf_counter, number=10_000) / 10_000
verdict("a reading", reading < 5e-6, "takes less than 5 microseconds")

# %% [markdown]
# ## Further reading
#
# - Hoefler and Belli (2015),
#   [Scientific Benchmarking of Parallel Computing Systems](https://doi.org/10.1145/2807591.2807644):
#   twelve rules; rules 3 to 6 on which mean to take of what.
# - Mytkowicz et al. (2009),
#   [Producing Wrong Data Without Doing Anything Obviously Wrong](https://doi.org/10.1145/1508244.1508275):
#   how the length of an environment variable can change a program's speed.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.8")
