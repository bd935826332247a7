"""Write book/results.md and its figures from book/results/*.json.

    .venv/bin/python book/_ext/results_page.py

Each JSON file is what `llmnb bench --json FILE` wrote on some machine. The
page holds no number that does not stand in one of them, and a test compares
the page with the files.
"""

import hashlib
import json
import sys
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from llmnb.bench.bench import layers_figure, shares
from llmnb.bench.contest import ladders_figure, speeds
from llmnb.book.diagram import PALETTE
from llmnb.files import replacing

BOOK = Path(__file__).parents[1]
NAMES = {
    "llmnb fp32": "llmnb, float32",
    "llmnb bf16": "llmnb, bfloat16",
    "torch": "PyTorch",
    "torch-compile": "PyTorch, compiled",
    "torch-bf16": "PyTorch, bfloat16",
    "torch-tf32": "PyTorch, TF32",
    "torch-compile-tf32": "PyTorch, compiled, TF32",
    "llmnb tf32": "llmnb, TF32",
    "llmnb fp32, no graph": "llmnb, float32, no graph",
    "llmnb tf32, no graph": "llmnb, TF32, no graph",
    "llm.c": "llm.c",
    "transformers": "transformers",
}
HEAD = """\
# Results

> How long a training step takes in llmnb, in PyTorch and in llm.c, and a
> token in llmnb and in transformers, measured in turns on the same machine.

Every number on this page comes from a file in `book/results/`, which
`llmnb bench` wrote; each section gives its command. All programs train the
same model on random tokens with AdamW, in the same number of threads, each
in a process of its own. They take turns, one step each, and do not clip
gradients. Times are medians over the rounds. A ratio is the median of the
ratios within the rounds, with the lowest and the highest beside it: below 1,
llmnb takes less time. The load is the number of threads that other programs
wanted to run just before; when it is not far below 1, distrust the numbers.
[Chapter A.8](../notebooks/appendix/08_racing.ipynb) says why we measure so.

*Of peak* compares the operations of a step, done in the time it took, with
the multiply-adds that this machine reached in a loop of nothing else
([chapter A.2](../notebooks/appendix/02_tile.ipynb)), in float32. *Memory*
is the most that the process held: the model, the libraries, and the compiler
where it ran.
"""

FIGURES = (
    (
        "Bars: milliseconds a step of each program, by configuration",
        "",
        "Milliseconds of a step, median; the thin lines reach from the "
        "fastest round to the slowest.",
    ),
    (
        "Bars: milliseconds of a step that each layer of llmnb takes",
        "-layers",
        "Where the time of llmnb goes, layer by layer.",
    ),
)


def name(row):
    return NAMES.get(row["name"], row["name"])


def table(head, rows):
    """A Markdown table; its first column holds words, the others numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def numbers(row):
    """The cells of a contestant that are there for all."""
    share = row.get("share_of_peak")
    peak = row.get("device_bytes", row["peak_bytes"])
    return [
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{share:.0%}" if share else "",
        f"{peak / 1e6:,.0f}" if peak else "",
    ]


def config_rows(config, ours):
    for row in config["contestants"]:
        if "unmeasured" in row:
            continue
        found = {
            x["ours"]: f"{x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f})"
            for x in config["ratios"]
            if x["peer"] == row["name"]
        }
        yield [name(row), *numbers(row), *(found.get(x, "") for x in ours)]


def unmeasured(rows):
    """A sentence for each row that was not measured."""
    for row in rows:
        if "unmeasured" in row:
            yield f"Not measured: {name(row)} ({row['unmeasured']})."


def config_section(config):
    ours = list(dict.fromkeys(x["ours"] for x in config["ratios"]))
    sizes = "{num_layers} layers, {channels} channels, {num_heads} heads"
    rounds = max(len(x.get("seconds", [])) for x in config["contestants"])
    yield (
        f"**{config['name']}**: {sizes.format(**config['model'])}, "
        f"{config['model']['vocab_size']:,} tokens in the vocabulary, "
        f"{config['parameters']:,} parameters; batches of "
        f"{config['batch_size']} times {config['seq_len']} tokens; "
        f"{rounds} rounds."
    )
    yield ""
    head = ["", "ms a step", "tokens/s", "of peak", "memory, MB"]
    head += [f"{NAMES.get(x, x)}: ratio" for x in ours]
    yield from table(head, config_rows(config, ours))
    yield ""
    for line in unmeasured(config["contestants"]):
        yield from (line, "")


def start_section(start):
    starts = max(len(x.get("cold", [])) for x in start)
    yield (
        "**To the first step** of the small model, in seconds from the start "
        "of a process: cold, with nothing compiled before, and warm, with "
        f"what the cold start compiled. Medians of {starts} starts."
    )
    yield ""
    rows = [
        [name(x), *(f"{median(x[k]):.1f}" for k in ("cold", "warm"))]
        for x in start
        if "cold" in x
    ]
    yield from table(["", "cold", "warm"], rows)
    yield ""
    for line in unmeasured(start):
        yield from (line, "")


def versions(result):
    """The versions of the libraries, each named once."""
    found = {}
    for config in result["configs"]:
        for row in config["contestants"]:
            found |= row.get("versions", {})
    return ", ".join(f"{k} {v}" for k, v in found.items()) or "llmnb"


def section(stem, result):
    """The lines about one file."""
    yield f"## {result['machine']}, {result['threads']} threads"
    yield ""
    yield (
        f"Measured on {result['date']} at commit {result['commit']} with "
        f"{versions(result)}, the machine's load being "
        f"{result['load']:.2f} before, by"
    )
    yield from ("", f"    {result['command']}", "")
    for config in result["configs"]:
        yield from config_section(config)
    if result["configs"]:
        for alt, end, caption in FIGURES:
            yield from (f"![{alt}](_static/results-{stem}{end}.png)", "")
            yield from (f"*{caption}*", "")
    if result["start"]:
        yield from start_section(result["start"])


def writers_section(result):
    """The lines about one race of writers."""
    cfg = result["model"]
    facts = [x.get("versions", {}) for x in result["writers"].values()]
    libraries = {k: v for found in facts for k, v in found.items()}
    named = ", ".join(f"{k} {v}" for k, v in libraries.items())
    rounds = max(len(x["token_seconds"]) for x in result["writers"].values())
    same = "the same tokens" if result["same_tokens"] else "other tokens"
    yield from (f"## Writing: {result['machine']}", "")
    yield (
        f"Measured on {result['date']} at commit {result['commit']} with "
        f"{named}, {result['threads']} threads, the machine's load being "
        f"{result['load']:.2f} before, by"
    )
    yield from ("", f"    {result['command']}", "")
    yield (
        f"{cfg['num_layers']} layers, {cfg['channels']} channels, "
        f"{cfg['vocab_size']:,} tokens in the vocabulary, random weights: a "
        f"prompt of {result['prompt']} tokens and {result['count']} more, "
        f"always the likeliest one, with keys and values kept. Medians of "
        f"{rounds} texts; both programs wrote {same}. "
        "[Chapter 4.19](../notebooks/4_practice/19_cache.ipynb) says what is "
        "kept."
    )
    yield ""
    kinds = "first_seconds", "token_seconds"
    rows = [
        [name({"name": who})]
        + [f"{median(row[k]) * 1e3:,.1f}" for k in kinds]
        + [f"{1 / median(row['token_seconds']):,.1f}"]
        + [ratio_to(result[f"{k}_ratios"], who) for k in kinds]
        for who, row in result["writers"].items()
    ]
    head = ["", "first token, ms", "later token, ms", "later tokens/s"]
    head += ["llmnb's first: ratio", "llmnb's later: ratio"]
    yield from table(head, rows)
    yield ""


def ratio_to(ratios, peer):
    """The cell of a ratio to a peer; empty for llmnb itself."""
    for x in ratios:
        if x["peer"] == peer:
            return f"{x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f})"
    return ""


# On a GPU


def timed(result):
    """Whether any step or kernel of a result from a GPU has a time."""
    rows = [x for c in result["configs"] for x in c["contestants"]]
    return any("seconds" in x for x in rows) or any(speeds(result))


def again(result):
    """The command of a result, to be given where there is a GPU."""
    return result["command"].replace("LLMNB_CUDA=simulator ", "")


def gpu_section(stem, result):
    """The lines about one file from a GPU, or from a machine without."""
    gpu = result["gpu"]
    yield from (f"## On a GPU: {gpu.get('name', 'not measured yet')}", "")
    if timed(result):
        yield (
            f"Measured on {result['date']} at commit {result['commit']} with "
            f"{versions(result)} on {gpu['name']}, by"
        )
    else:
        yield (
            "**No time has been measured on a GPU yet.** The kernels have "
            "run in the simulator of "
            "[chapter A.5](../notebooks/appendix/05_simulator.ipynb) and have "
            "been compiled; no hardware has run them. This command, on a "
            "machine with a GPU, "
            "measures a training step and every version of every layer, "
            "against PyTorch on the same GPU:"
        )
    yield from ("", f"    {again(result)}", "")
    yield from limits_lines(result)
    for config in result["configs"]:
        yield from gpu_config(config)
    if any(
        "seconds" in x for c in result["configs"] for x in c["contestants"]
    ):
        for alt, end, caption in FIGURES:
            yield from (f"![{alt}](_static/results-{stem}{end}.png)", "")
            yield from (f"*{caption}*", "")
    if result["ladders"]:
        yield from ladders_section(stem, result)


def limits_lines(result):
    most = result["limits"]
    if "unmeasured" not in most:
        yield (
            f"The GPU's limits, as two kernels of "
            "[chapter A.8](../notebooks/appendix/08_racing.ipynb) found them: "
            f"{most['fma_peak'] / 1e12:.1f} TFLOP/s of multiply-adds in "
            f"float32, and {most['copy_bytes'] / 1e9:,.0f} GB/s of copying."
        )
        yield ""
    losses = result.get("losses", {})
    for run, worst in losses.get("worst", {}).items():
        yield (
            f"Twenty losses of the small model, {run}: at most {worst:.0e} "
            "from those of the CPU."
        )
        yield ""


def gpu_config(config):
    """A configuration; one sentence where nothing of it was measured."""
    rows = config["contestants"]
    if any("seconds" in row for row in rows):
        yield from config_section(config)
        for x in config["captures"]:
            yield (
                f"{name(x)}: launching the step as a graph saves "
                f"{x['saved'] * 1e3:.2f} ms of it."
            )
            yield ""
        return
    yield (
        f"**{config['name']}**, batches of {config['batch_size']} times "
        f"{config['seq_len']} tokens, not measured: "
        + "; ".join(map(name, rows))
        + f" ({rows[0]['unmeasured']})."
    )
    yield ""


def per_kernel(row, fact):
    """A fact of each kernel of a version, on an A100 and an H100."""
    if not isinstance(row["compiled"], list):
        return ""
    found = {
        cc: [f"{x[cc][fact]:,}" for x in row["compiled"]]
        for cc in ("sm_80", "sm_90")
    }
    old, new = (" + ".join(x) for x in found.values())
    return old if old == new else f"{old}; {new}"


def ladder_row(row, speed):
    seen, made = row["counted"], row["compiled"]
    moved = 32 * seen["sectors"] / seen["least_bytes"]
    cells = [f"{row['version']}: {row['says'].rstrip('.')}"]
    cells += [f"{seen['launches']}", f"{moved:.2f}", f"{seen['requests']:,}"]
    cells += [per_kernel(row, x) for x in ("registers", "shared")]
    wide = isinstance(made, list) and sum(
        x["sm_90"]["vector_loads"] + x["sm_90"]["vector_stores"] for x in made
    )
    spilled = isinstance(made, list) and max(
        x[cc]["spilled"] for x in made for cc in ("sm_80", "sm_90")
    )
    cells += [f"{wide:d}", f"{spilled:d}"]
    if speed:
        cells += [f"{speed['seconds'] * 1e6:,.1f}", f"{speed['share']:.0%}"]
    else:
        cells += ["not measured", ""]
    return cells


LADDERS = """\
**Every version of every layer.** What is known of each kernel without a GPU
stands here, counted and compiled on {date} at commit {commit}. The simulator
counts at a small size, {sizes}, or what stands above a table. *Moved* is the
bytes of all sectors over the least bytes that the layer must move: more than
1 where elements are read again, and caches may help then; atomic additions
are not counted, so a version that uses them may seem to move less. *Requests*
are the warps' accesses. The compiler says how many *registers* a thread takes
and how many bytes of *shared* memory a block, for compute capability 8.0 (an
A100), and after a semicolon for 9.0 (an H100, where the system takes 1,024
of them) where that differs; a plus stands between the kernels of a version
that launches several. *Vectors* counts the instructions that move 16 bytes,
*spilled* the bytes of registers that did not fit. Each version was compared
with the reference in the simulator. *Time* is the median on the GPU, at the
sizes of GPT-2 124M in batches of 16 times 1024, with a cold L2; *share*
compares it with the GPU's own limit.
"""


def sizes_of(ladder):
    sizes = ladder["versions"][0]["counted"]["sizes"]
    return ", ".join(f"{k} = {v}" for k, v in sizes.items())


def ladders_section(stem, result):
    sizes = sizes_of(result["ladders"][0])
    facts = {k: result[k] for k in ("date", "commit")}
    yield LADDERS.format(sizes=sizes, **facts)
    fast = {(x["layer"], x["version"]): x for x in speeds(result)}
    head = ["moved", "requests", "registers", "shared", "vectors", "spilled"]
    for found in result["ladders"]:
        layer, own = found["layer"], sizes_of(found)
        if own != sizes:
            yield from (f"Counted at {own}:", "")
        rows = [
            ladder_row(row, fast.get((layer, row["version"])))
            for row in found["versions"]
        ]
        for who in found["peers"]:
            peer = fast.get((layer, who))
            if peer:
                time = f"{peer['seconds'] * 1e6:,.1f}", f"{peer['share']:.0%}"
                title = name({"name": who})
                rows.append([title, *[""] * (len(head) + 1), *time])
        title = [f"`{layer}`", "launches", *head, "time, µs", "share"]
        yield from (*table(title, rows), "")
    if any(speeds(result)):
        alt = "Bars: the share of its limit that each version reaches"
        yield from (f"![{alt}](_static/results-{stem}-ladders.png)", "")
        yield from ("*How near each version comes to the GPU's limit.*", "")


def steps_figure(result):
    """Bars of milliseconds a step, one panel for each configuration."""
    configs = result["configs"]
    counts = [len(x["contestants"]) for x in configs]
    fig = Figure(figsize=(8, sum(0.9 + 0.4 * n for n in counts)), dpi=100)
    panels = fig.subplots(len(configs), squeeze=False, height_ratios=counts)
    for ax, config in zip(panels[:, 0], configs, strict=True):
        rows = [x for x in config["contestants"] if "seconds" in x]
        times = [x["step_seconds"] * 1e3 for x in rows]
        reach = [
            [1e3 * (x["step_seconds"] - min(x["seconds"])) for x in rows],
            [1e3 * (max(x["seconds"]) - x["step_seconds"]) for x in rows],
        ]
        ours = [x["name"].startswith("llmnb") for x in rows]
        colours = [PALETTE["blue" if x else "grey"] for x in ours]
        ink = {"ecolor": PALETTE["ink"], "error_kw": {"lw": 1}}
        ax.barh([*map(name, rows)], times, xerr=reach, color=colours, **ink)
        ax.invert_yaxis()
        ax.set_title(config["name"], loc="left", size=11)
        ax.set_xlabel("milliseconds a step")
    fig.tight_layout()
    return fig


def results(book=BOOK):
    """The results by the stem of their file, in the order of the files."""
    paths = sorted((book / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in paths}
    return {
        stem: result if "writers" in result else shares(result)
        for stem, result in found.items()
    }


def page(found):
    """The text of results.md."""
    lines = [HEAD]
    for stem, result in found.items():
        if "writers" in result:
            lines += writers_section(result)
        elif "ladders" in result:
            lines += gpu_section(stem, result)
        else:
            lines += section(stem, result)
    return "\n".join(lines).strip() + "\n"


def digest(result):
    """What a figure carries to say which numbers it was drawn from."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def figures(found):
    """Pairs of a figure's file name and the function that draws it."""
    for stem, result in found.items():
        rows = [x for c in result.get("configs", []) for x in c["contestants"]]
        if any("seconds" in x for x in rows):
            yield f"results-{stem}.png", steps_figure, result
            yield f"results-{stem}-layers.png", layers_figure, result
        if "ladders" in result and any(speeds(result)):
            yield f"results-{stem}-ladders.png", ladders_figure, result


def main(book=BOOK):
    found = results(book)
    if not found:
        sys.exit(f"there are no results in {book / 'results'}")
    for file_name, draw, result in figures(found):
        with replacing(book / "_static" / file_name) as file:
            meta = {"Description": digest(result)}
            draw(result).savefig(file, format="png", metadata=meta)
    with replacing(book / "results.md") as file:
        file.write(page(found).encode())


if __name__ == "__main__":
    main()
