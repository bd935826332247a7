# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.race: "A race in turns, on the same machine at the same time."
#       bench.peers: "What a contestant's process runs: llmnb, PyTorch, transformers."
# ---

# %% [markdown]
# # Racing: say who is faster
#
# > How to say that one program is faster than another on a machine that never
# > keeps still.
#
# *Reading time: 40 minutes. You need: [chapter 2.8](../2_cpu/08_time.ipynb).*

# %% [markdown]
# ## Where we are
#
# PyTorch takes some time for the same step, and llm.c takes some. This chapter
# builds the race between them. At its end you can
#
# - compare two programs so that the machine's moods cancel;
# - give a program its turns from outside, even one that takes no orders;
# - tell a cold start from a warm one, and say what each costs.

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.book.verify import verdict

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
# ## What runs in the process
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
    from llmnb.cpu.bfloat16 import has_bf16

    return None if has_bf16() else "not available on this CPU"


# %% our contestant tags=["export"] module="bench.peers"
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend and precision.
    Raises NotImplementedError, saying why, when the precision is missing.
    """
    from itertools import count

    from llmnb.bench.stopwatch import Stopwatch, timed_step
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
# ([chapter 3.11](../3_gpu/11_step.ipynb)); the other launches its kernels one by one
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

    from llmnb.bench.stopwatch import Stopwatch, timed_step
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
# [chapter 4.20](../4_practice/20_decoder.ipynb), and the `generate` of Hugging Face's
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
# ## The race
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
from llmnb.formats.llmc import write_checkpoint
from llmnb.formats.published import write_folder
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.formats.shard import write_shard
from llmnb.model.init import init_params
from llmnb.timing import cores
from llmnb.arena import footprint
from llmnb.model.layout import gpt2_layout
from llmnb.checks import SMALLER, check_room


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
            package = str(Path(peers.__file__).parents[2])
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
    write_checkpoint(path / "gpt2_124M.bin", cfg, arena["params"])
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
# ## How long until the first step
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
# ## Take away
#
# - Compare speeds in turns, each program in its own process, by the median
#   of the rounds' ratios.
# - A program that takes no orders can be put to sleep with a signal.
# - What was not measured is said to be unmeasured, with the reason.
#
# ## Design note
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
