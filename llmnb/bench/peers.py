# Written by `make export` from notebooks/appendix/08_racing.py: edit that file.

"""What a contestant's process runs: llmnb, PyTorch, llm.c, transformers."""

__all__ = ["CONTESTANTS", "main", "peak_memory", "torch_on", "write_random"]


# imports of the peers
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


# peak memory
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.

    Derived in chapter A.8.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    except (OSError, TypeError):  # no such file, or no such line
        if sys.platform != "darwin" or pid != "self":
            return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# take orders
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


# the batch
def random_batch(spec):
    """Tokens and targets for a spec: the same for every contestant.

    spec: a dict with model, batch_size and seq_len. Returns an int64 array
    (2, B, T).
    """
    import numpy as np

    shape = 2, spec["batch_size"], spec["seq_len"]
    draw = np.random.RandomState(0)
    return draw.randint(0, spec["model"]["vocab_size"], shape, np.int64)


# our model
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


# our contestant
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


# our facts
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


# GPT-2 in PyTorch
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


# Llama in PyTorch
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


# a model in PyTorch
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


# PyTorch's contestant
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


# PyTorch on a GPU
def torch_on(device, tf32=False):
    """The module torch, told whether a GPU's products may use TF32.

    Raises ImportError where there is none, NotImplementedError where the
    device is "cuda" and torch finds no GPU.

    Derived in chapter A.8.
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


# what llm.c reads
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


# llm.c's contestant
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


# one text with a clock
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


# what writers read
def write_random(folder, cfg):
    """Write a random model of a GPT2Config, as transformers reads it.

    Derived in chapter A.8.
    """
    from llmnb.formats.checkpoint import write_folder

    write_folder(folder, cfg, _random_weights(cfg))


# our writer
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


# their writer
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


# the contestant's program
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

    Derived in chapter A.8.
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


if __name__ == "__main__":
    main()
