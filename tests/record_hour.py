"""Record the run of an hour that chapters 1.18 and 1.20 show.

    llmnb train --out runs/hour --num-layers 6 --num-heads 6 --channels 192 \
        --seq-len 256 --batch-size 8 --steps 12000 --learning-rate 0.002 \
        --warmup-fraction 0.05 --final-fraction 0.05 --eval-every 250 \
        --save-every 500 --keep 30
    python tests/record_hour.py runs/hour

writes book/hour/: the weights in bfloat16 with tokenizer and settings, which
`llmnb generate book/hour` reads; the log, thinned; a sample and the scores
of the heads at checkpoints along the way; and what counting pays on the same
validation text.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from recorded import BOOK, write_json

from llmnb.formats.checkpoint import write_model
from llmnb.model.decode import Decoder
from llmnb.model.generate import generate
from llmnb.model.gpt2 import GPT2
from llmnb.model.inside import (
    attention_maps,
    induction_score,
    previous_token_score,
    repeated_tokens,
    surprises,
)
from llmnb.train.feed import prepare
from llmnb.train.folder import read_run, states, step_of
from llmnb.train.landmarks import ngram_entropy
from llmnb.train.log import read_steps

HOUR = BOOK / "hour"
SAMPLED = (0, 500, 1000, 2000, 4000, 8000, 12000)
EVERY, REPEAT, PROMPT = 50, 60, "class "


def of(model):
    """The parameters of a model as a plain dict of arrays."""
    return {name: np.array(x) for name, x in model.params.items()}


def checkpoints(folder, config, vocab_size):
    """Pairs of a step and the parameters after so many updates."""
    cfg = config.model(vocab_size)
    yield 0, of(GPT2(cfg, 1, 256, "reference", seed=config.seed))
    for path in states(folder):
        model = GPT2.from_checkpoint(
            path, batch_size=1, seq_len=256, backend="reference"
        )
        yield step_of(path), of(model)


def heads(step, params, num_heads, vocab_size):
    """The scores of chapter 1.20 for one checkpoint."""
    twice = repeated_tokens(vocab_size, REPEAT)
    maps = attention_maps(params, twice, num_heads, vocab_size)
    cost = surprises(params, twice, num_heads, vocab_size)
    found = {
        "previous": previous_token_score(maps).max(),
        "induction": induction_score(maps, REPEAT).max(),
        "first": cost[:, : REPEAT - 1].mean(),
        "again": cost[:, REPEAT:].mean(),
    }
    return {"step": step} | {k: round(float(x), 4) for k, x in found.items()}


def sample(params, cfg, encoding, temperature):
    """What a checkpoint writes after the beginning of a class."""
    writer = Decoder(cfg, 1, 256).adopt(params)
    ids = generate(
        writer, encoding.encode_ordinary(PROMPT), 120, temperature, seed=1,
        stop=encoding.eot_token,
    )  # fmt: skip
    return PROMPT + encoding.decode(list(ids))


def thinned(steps):
    """Rows of the log: the mean loss of every EVERY steps, validations."""
    rows = ["step,loss,val_loss"]
    losses = [x.loss for x in steps if x.loss is not None]
    for at in range(0, len(steps), EVERY):
        some = losses[at : at + EVERY]
        loss = f"{np.mean(some):.4f}" if some else ""
        val = steps[at].val_loss
        rows.append(f"{at},{loss},{'' if val is None else f'{val:.4f}'}")
    return "\n".join(rows) + "\n"


def landmarks(data, vocab_size):
    """What tables of n-grams pay on the run's own validation text."""
    marks = {"uniform": float(np.log(vocab_size))}
    for n, name in enumerate(("unigrams", "bigrams", "trigrams"), 1):
        marks[name] = ngram_entropy(
            data.train_tokens, data.val_tokens, vocab_size, n
        )
    return {name: round(x, 4) for name, x in marks.items()}


def main(folder):
    HOUR.mkdir(exist_ok=True)
    config, data = read_run(folder), prepare(read_run(folder))
    encoding, V = data.encoding, data.encoding.n_vocab
    cfg = config.model(V)
    scores, texts = [], {}
    for step, params in checkpoints(folder, config, V):
        scores.append(heads(step, params, cfg.num_heads, V))
        print(scores[-1], flush=True)
        if step in SAMPLED:
            texts[step] = sample(params, cfg, encoding, 0.8)
    greedy = sample(params, cfg, encoding, 0)
    write_json(HOUR / "heads.json", scores)
    samples = {"after": texts, "greedy": greedy}
    write_json(HOUR / "samples.json", samples)
    write_json(HOUR / "landmarks.json", landmarks(data, V))
    write_model(HOUR / "model.bin", cfg, params, precision="bf16")
    log = thinned(read_steps(folder / "log.csv"))
    (HOUR / "log.csv").write_text(log, encoding="utf-8")
    for name in ("tokenizer.tiktoken", "config.json"):
        shutil.copyfile(folder / name, HOUR / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
