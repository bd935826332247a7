# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.race: "A race in turns, on the same machine at the same time."
#       bench.peers: "What a contestant's process runs: llmnb, PyTorch, llm.c, transformers."
# ---

# %% [markdown]
# # Racing: say who is faster
#
# > How to say that one program is faster than another on a machine that never
# > keeps still.
#
# *Reading time: 42 minutes. You need: [chapter 2.8](../2_cpu/08_time.ipynb).*

# %% [markdown]
# ## Where we are
#
# Chapter 2.8 says what a training step takes. This chapter lets it race against
# those of PyTorch and of llm.c. At its end you can
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
# turns: a **round** is one turn of each, and a disturbance that lasts longer
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
# on its standard input. The caches are shared all the same: the first step of
# a turn finds the other's numbers in them. Who trains takes thousands of
# steps in a row, so a turn of training is at least a second of steps, and
# its time is their mean.
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
# runs. It must also run in a Python that has PyTorch and not llmnb, so it
# imports nothing but the standard library at its top.


# %% imports of the peers tags=["export"] module="bench.peers"
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from statistics import fmean, median


# %% peak memory tags=["export"] module="bench.peers"
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    except (OSError, TypeError):  # no such file, or no such line
        if sys.platform != "darwin" or pid != "self":
            return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# %% [markdown]
# On Linux a process inherits the peak that `getrusage` reports from the
# process that started it. The line `VmHWM` of `/proc/self/status` begins
# anew with each program, so we read that where it exists.
#
# `serve` is the contestant's side of the conversation. It answers each line
# `step SECONDS` with a line of JSON, and any other line with the facts it has
# gathered. It also watches itself sleep: a library whose threads spin while
# they wait takes time from the program whose turn it is. So it reports the
# processor time that a wait cost, all threads together.


# %% take orders tags=["exporti"] module="bench.peers"
def serve(step, facts, commands, reply):
    """Train for each line "step SECONDS" of a file, until another line.

    step: a function that returns a dict, which may say the seconds that it
    took. It is called once, and again until SECONDS are spent; the answer
    is the last dict, with the mean of the seconds. facts: a function that
    returns what to answer at the end. commands: a text file. reply: takes
    each answer, a dict.
    """
    waits = []
    while True:
        start = time.process_time()
        command, *turn = commands.readline().split() or [""]
        waits.append(time.process_time() - start)
        if command != "step":
            break
        spent = []
        while not spent or sum(spent) < float(*turn):
            start = time.perf_counter()
            found = step()
            spent.append(found.get("seconds", time.perf_counter() - start))
        reply(found | {"seconds": fmean(spent)})
    waited = {"cpu_seconds_a_wait": median(waits)}
    reply({"peak_bytes": peak_memory(), **waited, **facts()})


# %% the batch tags=["exporti"] module="bench.peers"
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
# Our own contestant is a `GPT2`. A precision that the backend or the processor
# lacks is refused, not replaced by another: timing float32 twice would tell you
# that bfloat16 gains nothing. A step that is replayed
# ([chapter A.13](13_backend.ipynb)) does not call its layers, so these are timed
# after the race, in three steps of their own. A model that learns in its backward
# pass ([chapter 5.11](../5_modern/11_inbackward.ipynb)) has no such parts.


# %% our model tags=["exporti"] module="bench.peers"
def _our_model(spec):
    """The model of a spec, with its kernels compiled where they are known."""
    from llmnb.model.architectures import architecture_from
    from llmnb.model.gpt2 import GPT2
    from llmnb.model.inbackward import InBackward

    made = InBackward if spec.get("in_backward") else GPT2
    cfg, precision = architecture_from(spec["model"]), spec["precision"]
    sizes = spec["batch_size"], spec["seq_len"]
    try:
        model = made(cfg, *sizes, spec["backend"], precision)
    except ValueError as why:
        raise NotImplementedError(why) from None
    if model.precision != precision:
        raise NotImplementedError("not available on this CPU")
    if spec["backend"] == "cpu":
        from llmnb.model.ahead import compile_ahead

        compile_ahead(cfg, precision)
    return model


# %% [markdown]
# On a GPU the contestant is the same model. It waits until the work is done
# before the clock is read. It comes in two kinds: one calls the model's
# `step`, which launches the CUDA graph that it captured
# ([chapter 3.11](../3_gpu/11_step.ipynb)); the other launches its kernels one by one
# and waits for the loss and for the norm, and the difference is what
# capturing saves. `step` computes the norm of the gradients, so on a GPU all
# contestants do, PyTorch too; nobody scales them. Layers cannot be told
# apart without waiting after each of them, so the steps of their own do that.


# %% our contestant tags=["exporti"] module="bench.peers"
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend, precision, on a
    GPU graph, and perhaps in_backward. Raises NotImplementedError, saying
    why, when the backend or the processor lacks the precision.
    """
    model, batch, numbers = _our_model(spec), random_batch(spec), count(1)
    on_gpu, wait = spec["backend"] == "cuda", lambda: None
    whole = spec.get("in_backward") or on_gpu and spec["graph"]
    if on_gpu:
        from llmnb.gpu.toolkit import numba_cuda

        wait = numba_cuda().synchronize

    def step():
        if whole:
            loss = model.step(*batch, step=next(numbers))[0]
        else:
            loss = model.forward(*batch)
            model.backward()
            if on_gpu:
                model.clip_gradients(float("inf"))
            model.update(step=next(numbers))
        wait()
        return {"loss": loss}

    def facts():
        size = model.memory.nbytes
        found = {"arena_bytes": size} | _our_facts(spec["backend"])
        found |= {"device_bytes": size} if on_gpu else {}
        return found if whole else found | _apart(model, batch, numbers, wait)

    return step, facts


def _apart(model, batch, numbers, wait):
    """What each layer takes, in steps of their own."""
    from llmnb.bench.stopwatch import Stopwatch, timed_step

    model.ops = Stopwatch(model.ops, wait)
    steps = [timed_step(model, *batch, next(numbers)) for _ in range(3)]
    return {"apart": steps}


# %% our facts tags=["exporti"] module="bench.peers"
def version_of(name):
    """An installed package's version; None for one that is only on the path.

    A checkout that was copied onto a machine is such a one.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _our_facts(backend):
    """Threads, versions, and what a CPU's cores or a GPU can do at most."""
    import numba

    names = ["llmnb", "numpy", "numba"] + ["numba-cuda"] * (backend == "cuda")
    facts = {"threads": numba.get_num_threads()}
    facts["versions"] = {name: version_of(name) for name in names}
    if backend == "cpu":
        from llmnb.bench.peak import fma_peak

        facts["fma_peak"] = float(fma_peak())
    if backend == "cuda":
        from llmnb.bench.clock import Clock, limits

        facts |= limits(Clock())
    return facts


# %% [markdown]
# PyTorch's contestant is the GPT-2, or the Llama, that a user of PyTorch
# would write: fused attention, fused AdamW, the head tied to the embedding
# where the model ties it. The vocabulary is padded as ours is, so that both form products of the same
# shapes. On a GPU, PyTorch may use the tensor cores in TF32 or not; both
# are asked for by name, so that each of ours meets its like.


# %% GPT-2 in PyTorch tags=["exporti"] module="bench.peers"
def _torch_gpt2(max_seq_len, vocab_size, num_layers, num_heads, channels):
    from torch import nn
    from torch.nn import functional as F

    C, NH = channels, num_heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(self.ln1(x)).view(B, T, 3, NH, C // NH)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
            h = F.gelu(self.fc(self.ln2(x)), approximate="tanh")
            return x + self.fcproj(h)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(-(-vocab_size // 128) * 128, C)
            self.wpe = nn.Embedding(max_seq_len, C)
            self.blocks = nn.Sequential(*[Block() for _ in range(num_layers)])
            self.lnf = nn.LayerNorm(C)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
            logits = F.linear(self.lnf(self.blocks(x)), self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Model()


# %% Llama in PyTorch tags=["exporti"] module="bench.peers"
def _rotate(x, cos, sin):
    """Turn the pairs (i, i + hs/2) of every head by their angles."""
    import torch

    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _llama_block(shape):
    """The class of a block, as a module."""
    from torch import nn
    from torch.nn import functional as F

    C, NH, NKV = (shape[x] for x in ("channels", "num_heads", "num_kv_heads"))
    hs, hidden, eps = (shape[x] for x in ("head_size", "hidden", "norm_eps"))
    parts = [NH * hs, NKV * hs, NKV * hs]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.RMSNorm(C, eps), nn.RMSNorm(C, eps)
            self.qkv = nn.Linear(C, sum(parts), bias=False)
            self.attproj = nn.Linear(NH * hs, C, bias=False)
            self.fc = nn.Linear(C, 2 * hidden, bias=False)
            self.fcproj = nn.Linear(hidden, C, bias=False)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            qkv = self.qkv(self.ln1(x)).split(parts, -1)
            q, k, v = (y.view(B, T, -1, hs).transpose(1, 2) for y in qkv)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            how = {"is_causal": True, "enable_gqa": NKV < NH}
            y = F.scaled_dot_product_attention(q, k, v, **how)
            x = x + self.attproj(y.transpose(1, 2).reshape(B, T, NH * hs))
            gate, up = self.fc(self.ln2(x)).chunk(2, -1)
            return x + self.fcproj(F.silu(gate) * up)

    return Block


def _torch_llama(shape):
    """A Llama of a LlamaConfig's numbers, a dict; as `_torch_gpt2` else."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    Block, C, hs = _llama_block(shape), shape["channels"], shape["head_size"]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            rows = -(-shape["vocab_size"] // 128) * 128
            self.wte = nn.Embedding(rows, C)
            blocks = [Block() for _ in range(shape["num_layers"])]
            self.blocks = nn.ModuleList(blocks)
            self.lnf = nn.RMSNorm(C, shape["norm_eps"])
            self.head = nn.Linear(C, rows, bias=False)
            if shape["tied"]:
                self.head.weight = self.wte.weight
            powers = torch.arange(0, hs, 2) / hs
            angles = torch.arange(shape["max_seq_len"])[:, None]
            angles = (angles / shape["rope_theta"] ** powers).repeat(1, 2)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, tokens, targets):
            x, T = self.wte(tokens), tokens.shape[1]
            for block in self.blocks:
                x = block(x, self.cos[:T], self.sin[:T])
            logits = self.head(self.lnf(x))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Model()


# %% a model in PyTorch tags=["exporti"] module="bench.peers"
# what makes another computation of a Llama, and is not written here
_BEYOND = "window", "rope_scaling", "attention_scale", "final_softcap"


def _torch_model(shape):
    """The peer of a model, with random weights; shape: its record."""
    import torch

    family, beyond = shape.get("family", "gpt2"), [*map(shape.get, _BEYOND)]
    if family not in ("gpt2", "llama", "mistral") or any(beyond):
        why = f"is written for a plain GPT-2 or Llama, not for this {family}"
        raise NotImplementedError(why)
    plain = family == "gpt2"
    model = _torch_gpt2(**shape) if plain else _torch_llama(shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
    return model


# %% PyTorch's contestant tags=["exporti"] module="bench.peers"
def torch_contestant(spec):
    """A step of PyTorch's model and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, compile, bf16, device and
    tf32. Raises ImportError where there is no torch, NotImplementedError
    where it finds no GPU, and for an architecture that has no peer.
    """
    device = spec["device"]
    torch = torch_on(device, spec["tf32"])
    torch.manual_seed(0)
    model = _torch_model(spec["model"]).to(device)
    run = torch.compile(model) if spec["compile"] else model
    rules = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    rules |= {"lr": 1e-4, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **rules)
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


# %% PyTorch on a GPU tags=["export"] module="bench.peers"
def torch_on(device, tf32=False):
    """The module torch, told whether a GPU's products may use TF32.

    Raises ImportError where there is none, NotImplementedError where the
    device is "cuda" and torch finds no GPU.
    """
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise NotImplementedError("torch finds no GPU")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    return torch


def _torch_facts(torch, device, **others):
    """Threads and versions; on a GPU the most memory that torch held."""
    versions = {"torch": torch.__version__, **others}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    if device == "cuda":
        facts["device_bytes"] = torch.cuda.max_memory_reserved()
        facts["used_bytes"] = torch.cuda.max_memory_allocated()
    return facts


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


# %% what llm.c reads tags=["exporti"] module="bench.peers"
def _random_weights(cfg):
    import numpy as np

    from llmnb.arena import Arena
    from llmnb.model.init import init_params
    from llmnb.model.tensors import parameter_shapes

    arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
    init_params(arena["params"], cfg, 42)
    return arena["params"]


def _llmc_folder(folder, model):
    """Write a random model and random tokens where train_gpt2 looks."""
    import numpy as np

    from llmnb.config import GPT2Config
    from llmnb.formats.llmc import write_checkpoint
    from llmnb.formats.shard import write_shard

    path, cfg = Path(folder), GPT2Config(**model)
    write_checkpoint(path / "gpt2_124M.bin", cfg, _random_weights(cfg))
    data = path / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(0, cfg.vocab_size, 1 << 16)
    for part in ("train", "val"):
        name = f"tiny_shakespeare_{part}.bin"
        write_shard(data / name, tokens.astype(np.uint16))


# %% llm.c's contestant tags=["exporti"] module="bench.peers"
def llmc_contestant(spec):
    """A step of llm.c's train_gpt2, asleep between its steps, for `serve`.

    spec: a dict with path (of the program), folder (an empty one), model,
    batch_size and seq_len. Raises NotImplementedError, saying why, for
    sizes that are not those of the program.
    """
    if (spec["batch_size"], spec["seq_len"]) != (4, 64):
        raise NotImplementedError("has B=4 T=64 compiled in")
    if "family" in spec["model"]:
        raise NotImplementedError("trains GPT-2 only")
    if os.name != "posix":
        raise NotImplementedError("can be put to sleep on Linux and macOS")
    import pty  # its end of a terminal makes C print line by line

    _llmc_folder(spec["folder"], spec["model"])
    screen, keyboard = pty.openpty()
    lines = os.fdopen(screen, errors="replace")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": keyboard}
    pipes |= {"stderr": keyboard, "cwd": spec["folder"]}
    program = subprocess.Popen([spec["path"]], **pipes)
    os.close(keyboard)

    def sleep():
        program.send_signal(signal.SIGSTOP)
        os.waitpid(program.pid, os.WUNTRACED)

    def step():
        program.send_signal(signal.SIGCONT)
        start = time.perf_counter()
        while True:
            line = _line(lines)
            now = time.perf_counter()
            found = re.match(r"step \d+: train loss (\S+)", line)
            if found:
                sleep()
                return {"seconds": now - start, "loss": float(found[1])}
            start = now

    sleep()
    return step, lambda: {"peak_bytes": peak_memory(program.pid)}


def _line(lines):
    """The next line of a terminal; raises when its program has ended."""
    try:
        line = lines.readline()
    except OSError:  # how a terminal says it
        line = ""
    if not line:
        raise ChildProcessError("the program has ended")
    return line


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


# %% what writers read tags=["export"] module="bench.peers"
def write_random(folder, cfg):
    """Write a random model of a GPT2Config, as transformers reads it."""
    from llmnb.formats.checkpoint import write_folder

    write_folder(folder, cfg, _random_weights(cfg))


# %% our writer tags=["exporti"] module="bench.peers"
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


# %% their writer tags=["exporti"] module="bench.peers"
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
        more = {"attention_mask": mask, "streamer": Clock()}
        out = model.generate(prompt, **more, **how)
        return _pace(times, out[0, prompt.shape[1] :].tolist())

    version = transformers.__version__
    return step, lambda: _torch_facts(torch, "cpu", transformers=version)


# %% the contestant's program tags=["export"] module="bench.peers"
CONTESTANTS = {
    "llmnb": llmnb_contestant,
    "torch": torch_contestant,
    "llmc": llmc_contestant,
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
            reply({"ready": True})
            serve(*contestant, sys.stdin, reply)
        except NotImplementedError as why:
            reply({"unmeasured": str(why)})
        except ImportError as error:
            other = f"{sys.executable}: name another with --torch-python"
            reply({"error": f"{error} in {other}"})
        except Exception as error:
            reply({"error": str(error) or type(error).__name__})


# %% [markdown]
# ## The race
#
# The other side starts the processes and gives the turns. All contestants
# get the same number of threads. How their idle threads wait is left as each
# library sets it, because a setting that puts threads to sleep at once slows
# the program it is meant for: GNU's OpenMP, which PyTorch uses, lets a thread
# spin for some milliseconds before it sleeps; numba's sleep sooner, because
# `inner` of [chapter A.4](04_kernels.ipynb) says so. Between two turns we
# pause until the threads of the last contestant are asleep. The processor
# time of a wait is written down with the results, so you can see that the
# pause is long enough.


# %% imports of the race tags=["export"] module="bench.race"
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from llmnb.backend import PRECISIONS, choose
from llmnb.bench import clock, peers
from llmnb.timing import cores, machine

# %% what a race is told tags=["export"] module="bench.race"
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
PEERS = (
    "torch", "torch-compile", "torch-bf16", "torch-tf32",
    "torch-compile-tf32", "torch-compile-bf16",
)  # fmt: skip


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many rounds are
    measured. threads: of each contestant, or None for all cores. backend:
    of `GPT2`. torch_python: the interpreter that has torch. turn: seconds of
    training in a turn, at least. in_backward: whether a model that learns in
    its backward pass takes part too. patience: seconds after which one that
    has not answered is ended.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable
    turn: float = 1.0
    in_backward: bool = False
    patience: float = 86400.0


# %% the contestant's environment tags=["exporti"] module="bench.race"
def _environment(threads, cache=None):
    """Threads for every library; a folder for every compiler's cache."""
    count = str(threads or cores())
    env = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
    if cache:
        env |= {"LLMNB_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    # a file's own folder is no place to look for modules
    env = os.environ | env | {"PYTHONSAFEPATH": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # ours would slow PyTorch: see `inner`
    return env


# %% a contestant tags=["exporti"] module="bench.race"
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. settings: a `Settings`, of which
    threads, torch_python and patience count. cache: a folder for compiled
    code, or None for the usual ones. Raises NotImplementedError, saying why,
    when there is nothing to measure, and ChildProcessError, in one sentence,
    when the process cannot do what it was asked, or not in time.
    """

    def __init__(self, name, spec, settings, cache=None):
        if "cuda" in spec.values() and clock.no_times():
            raise NotImplementedError(clock.no_times())
        self.name, python = name, settings.torch_python
        self._patience, self._late = settings.patience, False
        env = _environment(settings.threads, cache)
        if spec["kind"].startswith("llm"):  # which needs llmnb and no torch
            python = sys.executable
            paths = Path(peers.__file__).parents[2], env.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, paths)))
        self._folder = tempfile.TemporaryDirectory()
        spec = {"folder": self._folder.name, **spec}
        self._said = Path(self._folder.name, "stderr")
        with self._said.open("w") as errors:
            self._process = subprocess.Popen(
                [python, peers.__file__, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                start_new_session=True,  # so that it ends with what it starts
            )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self):
        watch = threading.Timer(self._patience, self._kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
            words = "" if line else self._last_words()
        finally:
            watch.cancel()
        answer = json.loads(line) if line else {"error": words}
        if "unmeasured" in answer:
            raise NotImplementedError(answer["unmeasured"])
        if "error" in answer:
            raise ChildProcessError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self):
        code = self._process.wait()
        if self._late:
            return f"gave no answer in {self._patience:.0f} s"
        if code < 0:
            name = signal.Signals(-code).name
            return f"was ended by {name}: is there enough memory?"
        said = self._said.read_text(errors="replace").strip()
        return said.split("\n")[-1] or f"ended with code {code}"

    def _ask(self, command):
        with suppress(OSError):  # the answer will say why
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self, turn=0):
        """Train once, and again until `turn` seconds are over.

        Returns the last step's dict, with the mean of the seconds.
        """
        return self._ask(f"step {turn}")

    def finish(self):
        """Stop; a dict of what the process knows about itself."""
        return self._ask("finish")

    def _kill(self, late=True):
        self._late = late
        # macOS says of a process that has ended that one may not end it
        with suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self):
        """End the process, whatever it is doing, and what it started."""
        self._kill(late=False)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # it has not read what it was asked
                pipe.close()
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
    if not 0 <= settings.turn <= 3600:
        raise ValueError(f"turn must be 0 to 3600 s, got {settings.turn}")
    specs, on_gpu = {}, settings.backend == "cuda"
    for precision in settings.precisions:
        choose("precision", precision, PRECISIONS)
        ours = {"backend": settings.backend, "precision": precision}
        ours |= {"kind": "llmnb", "graph": True}
        specs[f"llmnb {precision}"] = ours
        if settings.in_backward:
            lean = ours | {"in_backward": True}
            specs[f"llmnb {precision}, in backward"] = lean
        if on_gpu:
            specs[f"llmnb {precision}, no graph"] = ours | {"graph": False}
    for name in settings.against:
        specs |= _peer(name, on_gpu)
    return specs


def _peer(name, on_gpu):
    """A peer's name and its spec; raises where the device cannot run it."""
    kind, _, path = name.partition("=")
    if name in PEERS:
        spec = {x: x in name for x in ("compile", "bf16", "tf32")}
        if spec["tf32"] and not on_gpu:
            raise ValueError(f"{name} needs a GPU: --backend cuda")
        spec |= {"kind": "torch", "device": "cuda" if on_gpu else "cpu"}
        return {name: spec}
    if kind != "llmc" or not path:
        known = ", ".join([*PEERS, "llmc=PATH"])
        raise ValueError(f"no contestant {name!r}: choose from {known}")
    if on_gpu:
        raise ValueError("llmc: train_gpt2 runs on the CPU, not on a GPU")
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"{path} is not a program")
    return {"llm.c": {"kind": "llmc", "path": str(Path(path).resolve())}}


# %% [markdown]
# Taking turns does not make a busy machine a quiet one. When a third program
# wants a core, the contestants suffer differently: threads that spin until
# all of them have finished lose the most. So every result states the
# machine's **load** before the race. A load far below 1 is a quiet machine.


# %% what every result says tags=["export"] module="bench.race"
def facts_of(settings):
    """When and where `Settings` are raced: a dict ready for JSON.

    date, commit (of this checkout, or None), machine, threads, backend, and
    load: how many threads have wanted to run in the last minute, on average,
    or None where the system does not say; with a GPU what `gpu_facts` says.
    """
    folder, commit = Path(__file__).parents[2], None
    if (folder / ".git").exists():
        command = ["git", "describe", "--always", "--dirty"]
        how = {"cwd": folder, "text": True, "timeout": 20}
        # no git, or one that refuses, as in a folder of another user
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.check_output(command, **how).strip()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {"date": date.today().isoformat(), "commit": commit}
    facts |= {"machine": machine(), "threads": settings.threads or cores()}
    facts |= {"load": load, "backend": settings.backend}
    if settings.backend == "cuda" and not clock.no_times():
        facts["gpu"] = clock.gpu_facts()
    return facts


# %% [markdown]
# All that this book compares is compared by `take_turns`: steps of programs,
# the texts that they write, cold and warm starts, and the kernels of a GPU.


# %% in turns tags=["export"] module="bench.race"
def take_turns(turns, rounds, pause=0.0):
    """One turn of each contestant a round; who begins changes each round.

    turns: a dict from name to a function. rounds: an iterable of round
    numbers. pause: seconds before each turn. Returns a dict from name to a
    list of what the function returned.
    """
    names = [*turns]
    replies = {name: [] for name in names}
    for number in rounds if names else ():
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            replies[name].append(turns[name]())
    return replies


# %% the race tags=["export"] module="bench.race"
def _or_why(function, *args):
    """What a function returns; a dict that says why, where it cannot."""
    try:
        return function(*args)
    except (NotImplementedError, ChildProcessError) as why:
        return {"unmeasured": str(why)}


def race(specs, rounds, settings, bar=iter):
    """Let contestants, each in a process of its own, take turns.

    On a GPU, whose memory does not hold them all, each runs alone, one after
    the other. specs: a dict from name to a spec, see `peers`. rounds: how
    many. bar: takes the rounds and gives them back, such as tqdm. Returns a
    list of rows, dicts: name; for each key of a step's answer the list of its
    values, one a round, and what the process knows about itself; or why it is
    unmeasured, which stops nobody else.
    """
    if settings.backend == "cuda" and len(specs) > 1:
        alone = [race({k: x}, rounds, settings, bar) for k, x in specs.items()]
        return [row for rows in alone for row in rows]
    found, runners = {}, {}
    with ExitStack() as stack:
        for name, spec in specs.items():
            runner = _or_why(Contestant, name, spec, settings)
            if isinstance(runner, dict):
                found[name] = runner
            else:
                runners[name] = runner
                stack.callback(runner.close)
        steps = {
            k: partial(_or_why, x.step, settings.turn)
            for k, x in runners.items()
        }
        turns = take_turns(steps, bar(range(rounds)), PAUSE)
        for name, each in turns.items():
            each = [*each, _or_why(runners[name].finish)]
            why = next((x for x in each if "unmeasured" in x), None)
            found[name] = why or by_key(each[:-1]) | each[-1]
    return [{"name": name, **found[name]} for name in specs]


def by_key(turns):
    """A list of dicts that are alike as one dict of lists."""
    return {key: [x[key] for x in turns] for key in turns[0]}


# %% ratios tags=["export"] module="bench.race"
def ratios(rows, key="seconds"):
    """Compare every llmnb with every peer, round by round.

    rows: dicts with a name and, where they were measured, by that key a
    list with one number a round. Ours begin with "llmnb"; one that launches
    without a graph is a peer of those that do not. Returns a list of dicts:
    ours, peer, and of the rounds' ratios of our time to the peer's the
    median, ratio, the lowest, low, and the highest, high.
    """
    seconds = {x["name"]: x[key] for x in rows if key in x}
    llmnbs = [x for x in seconds if x.startswith("llmnb")]
    ours = [x for x in llmnbs if not x.endswith("no graph")]
    table = []
    for a in ours:
        for b in [x for x in seconds if x not in ours]:
            each = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
            found = {"ours": a, "peer": b, "ratio": median(each)}
            table.append(found | {"low": min(each), "high": max(each)})
    return table


# %% [markdown]
# Two contestants that do nothing but wait show that the turns are given as
# promised: who begins changes, and the ratios are taken within a round.


# %% a race of two clocks
from itertools import cycle

from llmnb.bench.race import ratios, take_turns

ours, other = cycle([1.0, 3.0]), cycle([2.0, 6.0])
clocks = {"llmnb fp32": lambda: next(ours), "other": lambda: next(other)}
turns = take_turns(clocks, range(4))
print(ratios([{"name": k, "seconds": v} for k, v in turns.items()]))


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


def race_starts(specs, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    specs, bar, settings: see `race`. In each of `STARTS` rounds each
    contestant starts cold and then warm. Returns a list of rows, dicts:
    name; cold and warm, lists of seconds, or unmeasured.
    """
    starts = {
        k: partial(_or_why, _start, k, x, settings) for k, x in specs.items()
    }
    rows = []
    for name, each in take_turns(starts, bar(range(STARTS))).items():
        why = next((x for x in each if "unmeasured" in x), None)
        rows.append({"name": name} | (why or by_key(each)))
    return rows


def _start(name, spec, settings):
    """Seconds of a cold start and of a warm one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", "warm"):
            begin = time.perf_counter()
            with closing(Contestant(name, spec, settings, cache)) as runner:
                runner.step()
                seconds[kind] = time.perf_counter() - begin
    return seconds


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
# The race could have used threads in one process, which is simpler. Then PyTorch
# and NumPy would share one heap and one pool of cores, and nobody could tell
# their peak memories apart. A process apiece costs no more than a small protocol.

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
