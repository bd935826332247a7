# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: bench
# ---

# %% [markdown]
# # Measure a training step and race it
#
# > Where a step's time goes, layer by layer, and how to say that one program
# > is faster than another on a machine that never keeps still.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 20.1. Every box takes its share of a training step. Which one takes
# most, and is the whole faster than another program's?*
#
# A speed that you cannot measure is a speed that you cannot improve. This
# chapter builds `llmnb bench`: a stopwatch around the layers, and a race
# against PyTorch and llm.c. At its end you can
#
# - say which layer takes the time of a step, on your machine;
# - compare two programs so that the machine's moods cancel;
# - tell a cold start from a warm one, and say what each costs;
# - read the [results page](../book/results.md).
#
# You need the training step of [chapter 14](14_training.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.config import GPT2Config
from llmnb.gpt2 import GPT2
from llmnb.verify import verdict

V, B, T = 1024, 8, 64
cfg = GPT2Config(T, V, num_layers=4, num_heads=4, channels=128)
model = GPT2(cfg, batch_size=B, seq_len=T)

# %% [markdown]
# ## Where the time goes
#
# Chapters 3 to 11 timed their layers alone. In a training step they run
# together, and we want to know which one to make faster next. The model
# calls its layers through one object, its backend. `Stopwatch` stands in
# for that object: it hands out the same functions, each wrapped so that
# its time is added up.

# %% imports of the benchmark tags=["export"] module="bench"
import time


# %% a stopwatch around a backend tags=["export"] module="bench"
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. seconds, calls: dicts
    from function name to what has been added up since `reset`.

    Derived in chapter 20.
    """

    def __init__(self, backend):
        self._backend = backend
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
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


# %% [markdown]
# The step that we measure is forward, backward and update. It does not clip
# gradients: llm.c's program on a CPU does not, and further down all programs
# must do the same work.


# %% one measured step tags=["export"] module="bench"
PARTS = ("forward", "backward", "update")


def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.

    Derived in chapter 20.
    """
    model.ops.reset()
    times = [time.perf_counter()]
    loss = model.forward(tokens, targets)
    times.append(time.perf_counter())
    model.backward()
    times.append(time.perf_counter())
    model.update(step=step)
    times.append(time.perf_counter())
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {
        "loss": loss,
        "parts": dict(zip(PARTS, spent, strict=True)),
        "layers": model.ops.seconds,
        "calls": model.ops.calls,
    }


# %% the model above, measured tags=["nbval-ignore-output"]
from llmnb.bench import Stopwatch, timed_step

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
# [chapter 6](06_matmul.ipynb) foretold, and the backward pass takes more
# than the forward pass: it forms two products for each one of the forward
# pass. `llmnb bench` prints such a table for any configuration, and
# `llmnb bench --plot layers.png` draws it.
#
# The arena keeps a promise of [chapter 2](02_memory.ipynb). It is laid out
# before the first step and holds weights, gradients, optimiser state and
# activations. What the process holds beyond it is Python, the libraries,
# the compiled kernels and the text.

# %% where the memory goes
for group, size in model.memory.sizes().items():
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

# %% imports of the peers tags=["export"] module="peers"
import json
import os
import sys
import time
from statistics import median


# %% peak memory tags=["export"] module="peers"
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.

    Derived in chapter 20.
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


# %% take orders tags=["export"] module="peers"
def serve(step, facts, commands, reply):
    """Train one step for each line "step" of a file, until another line.

    step: a function that returns a dict, which is answered with the
    seconds it took. facts: a function that returns what to answer at the
    end. commands: a text file. reply: takes each answer, a dict.

    Derived in chapter 20.
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


# %% the batch tags=["export"] module="peers"
def random_batch(spec):
    """Tokens and targets for a spec: the same for every contestant.

    spec: a dict with model, batch_size and seq_len. Returns an int64 array
    (2, B, T).

    Derived in chapter 20.
    """
    import numpy as np

    shape = 2, spec["batch_size"], spec["seq_len"]
    draw = np.random.RandomState(0)
    return draw.randint(0, spec["model"]["vocab_size"], shape, np.int64)


# %% [markdown]
# Our own contestant is a `GPT2` behind a `Stopwatch`. A precision that this
# processor lacks is refused, not replaced by another: timing float32 twice
# would tell you that bfloat16 gains nothing.


# %% why a precision is missing tags=["export"] module="peers"
def missing(precision, backend="cpu"):
    """Why a backend cannot train with a precision here; None if it can.

    Derived in chapter 20.
    """
    if precision != "bf16":
        return None
    if backend != "cpu":
        return f"not available in the {backend} backend"
    from llmnb.cpu.tile import has_bf16

    return None if has_bf16() else "not available on this CPU"


# %% our contestant tags=["export"] module="peers"
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend and precision.
    Raises NotImplementedError, saying why, when the precision is missing.

    Derived in chapter 20.
    """
    from itertools import count

    from llmnb.bench import Stopwatch, timed_step
    from llmnb.config import GPT2Config
    from llmnb.gpt2 import GPT2

    backend, precision = spec["backend"], spec["precision"]
    if missing(precision, backend):
        raise NotImplementedError(missing(precision, backend))
    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    model = GPT2(cfg, *sizes, backend=backend, precision=precision)
    model.ops = Stopwatch(model.ops)
    batch, numbers = random_batch(spec), count(1)
    return (
        lambda: timed_step(model, *batch, next(numbers)),
        lambda: {"arena_bytes": model.memory.nbytes, **_our_facts(backend)},
    )


# %% our facts tags=["exporti"] module="peers"
def _our_facts(backend):
    """Threads, versions, and for the cpu backend the peak of FMAs."""
    from importlib.metadata import version

    import numba

    names = "llmnb", "numpy", "numba"
    facts = {"threads": numba.get_num_threads()}
    facts["versions"] = {name: version(name) for name in names}
    if backend == "cpu":
        from llmnb.cpu.peak import fma_peak

        facts["fma_peak"] = float(fma_peak())
    return facts


# %% [markdown]
# PyTorch's contestant is the GPT-2 that a user of PyTorch would write:
# fused attention, fused AdamW, the head tied to the embedding. The
# vocabulary is padded as ours is, so that both form products of the same
# shapes.


# %% a block in PyTorch tags=["exporti"] module="peers"
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


# %% GPT-2 in PyTorch tags=["exporti"] module="peers"
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


# %% PyTorch's contestant tags=["export"] module="peers"
def torch_contestant(spec):
    """A step of PyTorch's GPT-2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, compile and bf16. Raises
    ImportError where there is no torch.

    Derived in chapter 20.
    """
    import torch

    torch.manual_seed(0)
    model = _torch_gpt2(**spec["model"])
    run = torch.compile(model) if spec["compile"] else model
    rules = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=True, **rules
    )
    batch = torch.from_numpy(random_batch(spec))
    half = {"dtype": torch.bfloat16, "enabled": spec["bf16"]}

    def step():
        with torch.autocast("cpu", **half):
            loss = run(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    versions = {"torch": torch.__version__}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    return step, lambda: facts


# %% [markdown]
# Two more write text instead of training: the `Decoder` of
# [chapter 16](16_cache.ipynb), and the `generate` of Hugging Face's
# transformers. A step continues a prompt of random tokens, new in each round
# and the same for both, always by the likeliest token. A clock is read at
# each token. The first one costs the whole prompt; the median of the others
# is what a token costs.


# %% one text with a clock tags=["exporti"] module="peers"
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


# %% our writer tags=["export"] module="peers"
def decoder_contestant(spec):
    """A text from a Decoder and its facts: two functions for `serve`.

    spec: a dict with folder (of a model), vocab_size, prompt and count:
    tokens to read and to write, at least 2.

    Derived in chapter 20.
    """
    from llmnb.decode import Decoder
    from llmnb.generate import generate

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


# %% their writer tags=["export"] module="peers"
def transformers_contestant(spec):
    """A text from transformers' generate, and its facts, for `serve`.

    spec: as for decoder_contestant; the folder must be one that
    transformers reads. Raises ImportError where it is not installed.

    Derived in chapter 20.
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


# %% the contestant's program tags=["export"] module="peers"
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

    Derived in chapter 20.
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
# `kernel` of [chapter 3](03_encoder.ipynb) says so. Between two turns we
# pause until the threads of the last contestant are asleep. The processor
# time of a wait is written down with the results, so you can see that the
# pause is long enough.

# %% imports of the race tags=["export"] module="race"
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

from llmnb import peers
from llmnb.arena import Arena
from llmnb.checkpoint import write_checkpoint, write_folder
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.data import write_shard
from llmnb.init import init_params


# %% what a race is told tags=["export"] module="race"
WARM_UP = 2  # rounds that are not measured: they compile and touch memory
WRITERS = {"llmnb": "llmnb-decoder", "transformers": "transformers"}
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
PEERS = {
    "torch": {"kind": "torch", "compile": False, "bf16": False},
    "torch-compile": {"kind": "torch", "compile": True, "bf16": False},
    "torch-bf16": {"kind": "torch", "compile": False, "bf16": True},
}


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many are measured, one a
    round. threads: of each contestant, or None for all cores. backend: of
    `GPT2`. torch_python: the interpreter that has torch.

    Derived in chapter 20.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable


# %% the cores tags=["export"] module="race"
def cores():
    """How many cores this process may use.

    Derived in chapter 20.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# %% the contestant's environment tags=["exporti"] module="race"
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


# %% a contestant tags=["export"] module="race"
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. python: the interpreter. cache: a
    folder for compiled code, or None for the usual ones. unmeasured: None,
    or why there is nothing to measure. Raises ChildProcessError, in one
    sentence, when the process cannot do what it was asked.

    Derived in chapter 20.
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


# %% what llm.c reads tags=["exporti"] module="race"
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


# %% llm.c as a contestant tags=["export"] module="race"
class LlmC:
    """llm.c's train_gpt2, asleep between its steps; see `Contestant`.

    binary: the path of the program. shape: a dict with model, batch_size and
    seq_len.

    Derived in chapter 20.
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


# %% who races tags=["export"] module="race"
def lineup(settings):
    """The names of all contestants of some `Settings`, each with its spec.

    Returns a dict; llm.c's spec holds the path of its program. Raises
    ValueError for a name that nobody has and a number below 1, OSError for
    a program that is not there.

    Derived in chapter 20.
    """
    for name in ("steps", "threads"):
        number = getattr(settings, name)
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    specs = {}
    for precision in settings.precisions:
        ours = {"backend": settings.backend, "precision": precision}
        specs[f"llmnb {precision}"] = {"kind": "llmnb", **ours}
    for name in settings.against:
        kind, _, path = name.partition("=")
        if kind == "llmc" and path:
            if not os.access(path, os.X_OK):
                raise FileNotFoundError(f"{path} is not a program")
            specs["llm.c"] = {"kind": "llmc", "path": path}
        elif name in PEERS:
            specs[name] = PEERS[name]
        else:
            known = ", ".join([*PEERS, "llmc=PATH"])
            raise ValueError(f"no contestant {name!r}: choose from {known}")
    return specs


# %% start a contestant tags=["exporti"] module="race"
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


# %% in turns tags=["export"] module="race"
def take_turns(contestants, rounds):
    """One step of each contestant a round; who begins changes each round.

    contestants: a dict from name to an object with `step`. rounds: an
    iterable of round numbers. Returns a dict from name to a list of what
    `step` returned.

    Derived in chapter 20.
    """
    names = [*contestants]
    replies = {name: [] for name in names}
    for number in rounds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            replies[name].append(contestants[name].step())
    return replies


# %% the race tags=["export"] module="race"
def race(shape, settings, bar=iter):
    """Race all contestants of some `Settings` on one shape.

    shape: a dict with model (what GPT2Config takes), batch_size, seq_len.
    bar: takes the rounds and gives them back, such as tqdm. Returns two
    dicts by name: of each contestant its steps (one dict a round, the
    `WARM_UP` rounds first) and its facts, or else why it is unmeasured.

    Derived in chapter 20.
    """
    found, why = {}, {}
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


# %% a race of writers tags=["export"] module="race"
def race_writers(cfg, prompt, count, rounds, threads=None, python=None):
    """Race a Decoder and transformers' generate on one random model.

    cfg: a GPT2Config. prompt, count: tokens to read and to write. rounds:
    texts of each to measure, after one that is not. threads: of each, or
    None for all cores. python: the interpreter that has transformers.
    Returns a dict from name to the steps (dicts, as `peers` answers) and
    the facts. Raises ValueError for numbers that do not fit the model and
    ChildProcessError in one sentence.

    Derived in chapter 20.
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


# %% ratios tags=["export"] module="race"
def ratios(seconds):
    """Compare every llmnb with every peer, round by round.

    seconds: a dict from name to a list, one number a round; ours begin with
    "llmnb". Returns a list of dicts: ours, peer, and of the rounds' ratios
    of our time to the peer's the median, the lowest and the highest.

    Derived in chapter 20.
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

from llmnb.race import ratios, take_turns


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


# %% time to the first step tags=["export"] module="race"
STARTS = 3  # how often each contestant is started, cold and warm


def start_times(shape, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    shape, bar: see `race`. In each of `STARTS` rounds each contestant starts
    cold and then warm. Returns a list of dicts: name, cold and warm (lists
    of seconds), or name and unmeasured. llm.c is left out: it has no
    compiled code to keep.

    Derived in chapter 20.
    """
    specs = lineup(settings)
    specs.pop("llm.c", None)
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


# %% one start tags=["exporti"] module="race"
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
# What is left is to gather numbers, print them and draw them. Three
# configurations have names: a small model, and GPT-2 with 124 million
# parameters on a short and on a long text.
#
# Taking turns does not make a busy machine a quiet one. When a third program
# wants a core, the contestants suffer differently: threads that spin until
# all of them have finished lose the most. So the report states the machine's
# **load** before the race. A load far below 1 is a quiet machine.

# %% imports of the report tags=["export"] module="bench"
import os
import re
import subprocess
from datetime import date
from pathlib import Path
from statistics import median

from llmnb import peers
from llmnb.config import GPT2Config, flops_per_token, parameter_count
from llmnb.race import (
    WARM_UP,
    Settings,
    cores,
    lineup,
    race,
    race_writers,
    ratios,
    start_times,
)
from llmnb.timing import machine

# %% named configurations tags=["export"] module="bench"
SMALL = GPT2Config(64, 256, 4, 4, 128)
CONFIGS = {
    "small": (SMALL, 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
}


# %% a shape tags=["exporti"] module="bench"
def _shape(cfg, batch_size, seq_len):
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    return {"model": dict(vars(cfg)), **sizes}


# %% the benchmark tags=["export"] module="bench"
def bench(configs, settings=None, start=False, bar=iter):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure
    `start_times` of the small model too. bar: see `race`. Seconds are those
    of the rounds, in order; memory is in bytes. Raises ValueError or
    ChildProcessError in one sentence.

    Derived in chapter 20.
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
    return shares(result)


# %% the benchmark of writing tags=["export"] module="bench"
def bench_writers(cfg, prompt=64, count=64, rounds=10, threads=None, **how):
    """Measure tokens written against transformers; a dict ready for JSON.

    The arguments are those of `race_writers`, and so is what it raises.
    Seconds are those of the rounds, in order: of the first token, which
    reads the prompt, and of a later one, the median of a text.

    Derived in chapter 20.
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
    """The result of `bench_writers` as a text of lines to print.

    Derived in chapter 20.
    """
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


# %% is the machine busy tags=["export"] module="bench"
def load():
    """How many threads have wanted to run in the last minute, on average.

    None where the system does not say.

    Derived in chapter 20.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# %% which llmnb tags=["exporti"] module="bench"
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


# %% one configuration tags=["exporti"] module="bench"
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
    return {"name": name, **shape, **facts}


# %% shares of the peak tags=["export"] module="bench"
def shares(result):
    """Give each row of a result its share of the machine's FMA peak.

    The peak is the highest that any row has measured: other programs can
    only lower it. Changes result in place and returns it.

    Derived in chapter 20.
    """
    rows = [row for c in result["configs"] for row in c["contestants"]]
    peak = max((row.get("fma_peak", 0) for row in rows), default=0)
    for row in rows:
        if peak and "flops_per_second" in row:
            row["share_of_peak"] = row["flops_per_second"] / peak
    return result


# %% one contestant tags=["exporti"] module="bench"
def _row(name, flops, shape, steps, facts):
    measured = steps[WARM_UP:]
    seconds = [x["seconds"] for x in measured]
    middle = median(seconds)
    row = {"name": name, "seconds": seconds, "step_seconds": middle}
    tokens = shape["batch_size"] * shape["seq_len"]
    row["tokens_per_second"] = tokens / middle
    row["flops_per_second"] = flops / middle
    row |= {"first_loss": steps[0]["loss"], **facts}
    if "layers" in steps[0]:
        row |= {"parts": _parts(measured), "layers": _layers(measured)}
    return row


# %% medians tags=["exporti"] module="bench"
def _parts(steps):
    return {x: median(s["parts"][x] for s in steps) for x in PARTS}


def _layers(steps):
    """One dict a backend function, in the order of first use."""
    table = []
    for name, calls in steps[0]["calls"].items():
        seconds = median(x["layers"][name] for x in steps)
        table.append({"name": name, "calls": calls, "seconds": seconds})
    rest = [x["seconds"] - sum(x["layers"].values()) for x in steps]
    table.append({"name": "(the rest)", "calls": 1, "seconds": median(rest)})
    return table


# %% a report in words tags=["export"] module="bench"
def report(result):
    """The result of `bench` as a text of lines to print.

    Derived in chapter 20.
    """
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    for config in result["configs"]:
        lines += ["", *_config_lines(config)]
    if result["start"]:
        lines += ["", "seconds to the first step of the small model", ""]
        lines += [f"{'':<16} {'cold':>9} {'warm':>9}"]
        for row in result["start"]:
            times = row.get("unmeasured") or " ".join(
                f"{median(row[kind]):9.2f}" for kind in ("cold", "warm")
            )
            lines.append(f"{row['name']:<16} {times}")
    return "\n".join(lines)


# %% one configuration in words tags=["exporti"] module="bench"
def _config_lines(config):
    shape = "L {num_layers}  NH {num_heads}  C {channels}  V {vocab_size}"
    yield (
        f"{config['name']}  {shape.format(**config['model'])}  "
        f"B {config['batch_size']}  T {config['seq_len']}: "
        f"{config['parameters']:,} parameters"
    )
    titles = "ms a step", "tokens/s", "GFLOP/s", "of peak", "peak MB"
    yield ""
    yield f"{'':<16}" + "".join(f"{x:>11}" for x in titles)
    for row in config["contestants"]:
        yield f"{row['name']:<16}" + _numbers(row)
    yield ""
    for x in config["ratios"]:
        yield (
            f"{x['ours']} / {x['peer']}: {x['ratio']:.2f} of its time, median "
            f"of the rounds ({x['low']:.2f} to {x['high']:.2f})"
        )
    for row in config["contestants"]:
        if "layers" in row:
            yield from ("", f"{row['name']}, where the time goes", "")
            yield from _table(row)


# %% the numbers of a row tags=["exporti"] module="bench"
def _numbers(row):
    if "unmeasured" in row:
        return "  " + row["unmeasured"]
    share, peak = row.get("share_of_peak"), row["peak_bytes"]
    cells = [
        f"{row['step_seconds'] * 1e3:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:.1f}",
        f"{share:.0%}" if share else "-",
        f"{peak / 1e6:,.0f}" if peak else "-",
    ]
    return "".join(f"{x:>11}" for x in cells)


# %% the table tags=["exporti"] module="bench"
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


# %% the bars tags=["export"] module="bench"
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.

    Derived in chapter 20.
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
        ax.set_title(title, loc="left", size=11)
    fig.tight_layout()
    return fig


# %% one panel tags=["exporti"] module="bench"
def _draw_bars(ax, row):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    from llmnb.diagram import PALETTE

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
from llmnb.bench import bench, report
from llmnb.race import Settings

print(report(bench({"this chapter": (cfg, B, T)}, Settings(steps=3))))

# %% [markdown]
# With PyTorch or llm.c on your machine, `llmnb bench --config 124m-64
# --against torch llmc=PATH` races against them. The
# [results page](../book/results.md) shows such races.

# %% [markdown]
# ## Take away
#
# - A step's time is the sum of its layers' times, and the products take most
#   of it.
# - Compare speeds in turns, each program in its own process, by the median
#   of the rounds' ratios.
# - Say with every number on which machine it was measured, and how busy that
#   machine was.

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
from llmnb.index import gained

gained("20_benchmark")
