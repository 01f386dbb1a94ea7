"""Make docs/research/benchmarks.md and its plot from the JSON files of benchmarks/results.

usage: python benchmarks/report.py [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from make_model import SHAPES
from report_cuda import gpu_section

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GOAL_BATCH = 1.3
GOAL_ENCODE = 0.5
# Beyond this share of the machine in other hands, a figure is marked.
DISTURBED = 0.1
_PLOTTED = "1.1B"


def main() -> None:
    """Write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "research")
    arguments = parser.parse_args()
    # quality.py makes its own page.
    paths = [path for path in sorted(arguments.results.glob("*.json")) if not path.stem.startswith("quality")]
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    if not results:
        raise SystemExit(f"{arguments.results} has no results; run benchmarks/all.py first")
    sections = [_conditions(results)]
    makers = {"gemv": _gemv, "batch": _batch, "decode": _decode, "load": _load}
    for shape in reversed(SHAPES):
        if f"generate-{shape}" in results:
            sections.append(_generate(results[f"generate-{shape}"]))
    sections += [maker(results[name]) for name, maker in makers.items() if name in results]
    sections += [_bounds(results), gpu_section()]
    page, plot = arguments.out / "benchmarks.md", arguments.out / "benchmarks.png"
    page.write_text("\n\n".join(sections) + "\n")
    _plot(results, plot)
    print(f"wrote {page} and {plot}")


def _conditions(results: dict[str, Any]) -> str:
    environments = [result["environment"] for result in results.values()]
    first = environments[0]
    commits = ", ".join(sorted({environment["commit"] for environment in environments}))
    dates = ", ".join(sorted({environment["date"] for environment in environments}))
    return f"""# Benchmarks

`pip install -r benchmarks/requirements.txt && python benchmarks/all.py` makes the files in `benchmarks/results`, and
from them this page and its plot.

- Hardware: {first["processor"]}, {first["cores"]} vCPUs of a shared server, {first["memory_bytes"] / 2**30:.0f} GiB of
  memory, kernels for {first["isa"]}; Python {first["python"]} on {first["system"]}.
- Commit {commits}, {dates}.
- Other work shared the vCPUs at a lower priority, and other guests share the server. Absolute figures vary by tens of
  percent from hour to hour; ratios vary too, but less. Both sides of a comparison take turns in the same run, unless a
  note says otherwise. **Best** is the fastest run, the closest to an undisturbed machine; **median** is over all runs.
  A star marks figures during which other processes took more than {100 * DISTURBED:.0f} % of the cores beyond those
  that the benchmark left to them.
- Weights are random, of a stated entropy H (bits per weight of a uniform grid over Gaussian weights). "Bits" are stored
  bits per weight with everything included. Codes are those of `--prefer speed` unless stated otherwise.
- The weights in the GGUF files are random too: blocks of a few quantized rows, repeated. llama.cpp itself chooses which
  tensor has which type. Where rows do not fill its superblocks of 256, as in the 135M shape, it falls back to larger
  types, and "equal quality" does not hold.
- llama.cpp's CPU library was built with GCC 12 twice: once with AMX, and once with AVX-512 (VNNI, VBMI, BF16) alone. In
  the first build, `_tile_loadconfig` was replaced, because that compiler drops stores to its operand (GCC bug 114098)
  and the stock build crashes on this processor.{_missing(results)}
- Every timed result is checked first: products against float64, decoded symbols against the source, and generated text
  against that of the other runs.

![Tokens per second and weights per second over stored bits](benchmarks.png)"""


def _missing(results: dict[str, Any]) -> str:
    absent = [shape for shape in SHAPES if f"generate-{shape}" not in results]
    return f"\n- Not measured yet: generation with the {' and '.join(absent)} shape." if absent else ""


def _generate(result: dict[str, Any]) -> str:
    rows = []
    for row in _best_builds(result["rows"]):
        rows.append(
            (
                f"**EntroLLM**, H = {row['entropy_bits']}"
                if row["ours"]
                else f"llama.cpp {row['name']} ({row['build']})",
                f"{row['file_bytes'] / 1e6:.0f}",
                f"{row['file_bits']:.2f}",
                f"{row['best_rate']:.1f}{_star(statistics.median(row['others']))}",
                f"{row['median_rate']:.1f}",
                f"{row['worst_rate']:.1f}",
                f"{row['best_rate'] * row['weights'] / 1e9:.1f}",
                _number(row["prompt_rate"], 0),
            )
        )
    ratios = [
        (
            f"{row['ours_bits']:.2f}",
            f"{row['peer']} ({row['peer_bits']:.2f})",
            f"{row['ratio_best']:.2f}",
            f"{row['ratio_median']:.2f}",
            f"{row['goal']:.1f}",
            _ratio_verdict(result, row),
        )
        for row in result["ratios"]
    ]
    runs = len(result["rows"][0]["rates"])
    builds = " and ".join(sorted({row["build"] for row in result["rows"] if not row["ours"]}))
    table = _table(("model", "MB", "bits", "tok/s, best", "median", "worst", "Gw/s", "prompt tok/s"), rows)
    compared = _table(("ours, bits", "over (bits)", "best", "median", "goal", ""), ratios)
    int8 = next((row for row in _best_builds(result["rows"]) if row["name"] == "Q8_0"), None)
    ours = [row["prompt_rate"] for row in result["rows"] if row["ours"]]
    prompts = (
        f"\nA prompt of 512 tokens runs at {min(ours) / int8['prompt_rate']:.2f} to "
        f"{max(ours) / int8['prompt_rate']:.2f} times the speed of llama.cpp Q8_0 (goal 1.0)."
        if int8 and ours
        else ""
    )
    return f"""## Generation, {result["shape"]} shape

{result["threads"]} threads, {result["tokens"]} tokens after a prompt of 8, batch 1, {runs} runs of each. Prompts have
512 tokens. llama.cpp is from llama-cpp-python {result["llama_cpp_python"]}, in the builds {builds}; for each type, the
faster build counts.{_note(result)}

{table}

The next table compares our tokens per second with those of a llama.cpp type. The pairs are those of the goals and are
assumed to be of equal quality; their KL divergences have not been compared. llama.cpp ran on a shared, busy machine,
{runs} times per type, so an undisturbed machine may be much faster than its best. A goal that is reached is therefore
"provisional", or "not settled" unless every build of llama.cpp was timed at least three times.

{compared}
{prompts}""".rstrip()


def _best_builds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our rows, and for each llama.cpp type that of its fastest build, with the fastest prompt of any."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["best_rate"]):
        before = best.get(row["name"], row)["prompt_rate"] or 0.0
        best[row["name"]] = {**row, "prompt_rate": max(row["prompt_rate"] or 0.0, before)}
    return [best[name] for name in dict.fromkeys(row["name"] for row in rows)]


def _gemv(result: dict[str, Any]) -> str:
    parts = []
    cores = result["environment"]["cores"]
    for threads in sorted({row["threads"] for row in result["rows"]}):
        baselines = {row["name"]: row for row in result["baselines"] if row["threads"] == threads}
        rates = ", ".join(
            f"{name} {row['rate']:.1f}{_star(row['others'], threads, cores)}"
            for name, row in baselines.items()
            if name != "read"
        )
        rows = [
            (
                f"{row['entropy_bits']:.2f}",
                row["code"],
                f"{row['stored_bits']:.3f}",
                f"{row['goal_bits']:.2f}",
                f"{row['rate']:.1f}{_star(row['others'], threads, cores)}",
                f"{row['weights'] / row['median_s'] / 1e9:.1f}",
                f"{row['weights'] / row['q3_s'] / 1e9:.1f}-{row['weights'] / row['q1_s'] / 1e9:.1f}",
                f"{100 * row['of_read']:.0f} %",
                f"{row['x_int8']:.2f}",
                "" if row["goal"] is None else f"{row['goal']:.1f}",
                "" if row["goal"] is None else _verdict(row["x_int8"] >= row["goal"]),
            )
            for row in result["rows"]
            if row["threads"] == threads
        ]
        columns = ("H", "code", "bits", "at most", "Gw/s, best", "median", "quartiles", "of read", "x int8", "goal", "")
        parts.append(
            f"{threads} thread{'s' if threads > 1 else ''}: a plain read runs at {baselines['read']['rate']:.1f} GB/s; "
            f"full-width products at best, in Gweights/s: {rates}.\n\n{_table(columns, rows)}"
        )
    return f"""## Fused decoding and product, batch 1

{result["int8_bytes"] / 2**30:.0f} GiB of int8 weights and the same number of coded weights, in rows of
{result["columns"]}. Activations have 16 bits, as two int8 digits (one digit in the int8 and int4 baselines). "Of read"
is the share of the bandwidth of a plain read.

""" + "\n\n".join(parts)


def _batch(result: dict[str, Any]) -> str:
    batches = list(result["model_s"])
    rows = [
        (
            row["matrix"],
            row["code"],
            *(f"{1e3 * row[f'batch_{n}']['best_s']:.2f}{_star(row[f'batch_{n}']['others'])}" for n in batches),
            *(f"{row[f'batch_{n}']['best_s'] / row['batch_1']['best_s']:.2f}" for n in batches[1:]),
        )
        for row in result["rows"]
    ]
    model = result["model_s"]
    rows.append(
        (
            "**all of a model**",
            "",
            *(f"{1e3 * model[n]:.1f}" for n in batches),
            *(f"**{model[n] / model['1']:.2f}**" for n in batches[1:]),
        )
    )
    columns = ("matrix", "code", *(f"batch {n}, ms" for n in batches), *(f"{n} over 1" for n in batches[1:]))
    return f"""## Batches

Products with the matrices of the 1.1B shape, {result["threads"]} threads, H = {result["entropy_bits"]}; best times in
milliseconds. Goal: batches of up to 8 cost at most {GOAL_BATCH} times batch 1.

{_table(columns, rows)}"""


def _decode(result: dict[str, Any]) -> str:
    rows = []
    cores = result["environment"]["cores"]
    slowest = min(
        row["weights"] / row["encode"]["best_s"] / 1e9 for row in result["rows"] if row["coder"].startswith("entrollm")
    )
    for row in result["rows"]:
        rate = row["weights"] / row["decode"]["best_s"] / 1e9
        rows.append(
            (
                f"{row['entropy_bits']:.2f}",
                row["coder"],
                row["code"],
                f"{row['stored_bits']:.3f}",
                f"{rate:.2f}{_star(row['decode']['others'], result['threads'], cores)}",
                f"{row['weights'] / row['decode']['median_s'] / 1e9:.2f}",
                f"{rate * row['stored_bits'] / 8:.2f}",
                f"{row['weights'] / row['encode']['best_s'] / 1e9:.2f}",
                f"{1e3 * row['choose_code_s']:.0f}" if row["choose_code_s"] else "",
            )
        )
    columns = ("H", "coder", "code", "bits", "decode Gw/s", "median", "GB/s read", "encode Gw/s", "choice, ms")
    return f"""## Decoding to bytes, and encoding

{result["threads"]} thread, {result["rows"][0]["weights"] / 2**20:.0f} Mi symbols. "zstd literals" is zstd without its
search for matches, so that all its time goes to its Huffman coder (huff0). Encoding is from symbols to streams; the
code is chosen once per tensor. The slowest code encodes {slowest:.2f} Gweights/s (goal {GOAL_ENCODE}).

{_table(columns, rows)}"""


def _load(result: dict[str, Any]) -> str:
    rows = [
        (name, f"{1e3 * times['best_s']:.0f}", f"{1e3 * times['median_s']:.0f}", f"{1e3 * times['q3_s']:.0f}")
        for name, times in result["parts"].items()
    ]
    total = result["parts"]["total"]
    memory = result["memory_bytes"]
    return f"""## From the start of Python to the first token

{result["shape"]} shape, {result["file_bytes"] / 1e6:.0f} MB file in the page cache, {result["threads"]} threads,
{result["runs"]} runs; torch is not imported. The goal is {1e3 * result["goal_s"]:.0f} ms in total; measured were
{1e3 * total["best_s"]:.0f} ms at best and {1e3 * total["median_s"]:.0f} ms in the median.

{_table(("part", "best, ms", "median", "third quartile"), rows)}

Resident memory after opening, before the first token: {memory["RssAnon"] / 1e6:.0f} MB of its own and
{memory["RssFile"] / 1e6:.0f} MB of mapped files (libraries, and pages of the model that were touched)."""


def _bounds(results: dict[str, Any]) -> str:
    """Which goals are missed, and what the measurements say about the reason."""
    lines = []
    if "gemv" in results:
        rows = [row for row in results["gemv"]["rows"] if row["goal"] is not None]
        missed = [row for row in rows if row["x_int8"] < row["goal"]]
        most = max(row["of_read"] for row in rows)
        worst = min(rows, key=lambda row: row["x_int8"] / row["goal"])
        lines.append(
            f"**Products**: {len(rows) - len(missed)} of {len(rows)} goals are met. The coded products read at most "
            f"{100 * most:.0f} % of the bandwidth of a plain read. Instructions (unpacking, look-ups, expansions, two "
            f"digit products) bound them more than memory does. `{worst['code']}` is furthest from its goal."
        )
    for shape in reversed(SHAPES):
        if f"generate-{shape}" in results:
            lines.append(_generation_bounds(results[f"generate-{shape}"]))
    if "batch" in results:
        model = results["batch"]["model_s"]
        small = {n: model[n] / model["1"] for n in model if 1 < int(n) <= 8}
        over = ", ".join(f"{ratio:.2f} at {n}" for n, ratio in small.items())
        lines.append(
            f"**Batches** cost {over} times a single vector (goal {GOAL_BATCH}). For one, two and four vectors there "
            "are kernels that never store what they decode; every vector costs two digit products. With AMX, the "
            "matrix unit multiplies three vectors or more while the next rows are decoded."
        )
    if "load" in results:
        parts = {name: times["median_s"] for name, times in results["load"]["parts"].items()}
        total = parts.pop("total")
        shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in parts.items())
        lines.append(f"**Load**: of the median time, {shares}.")
    return "## Goals, and what bounds speed\n\n" + "\n".join(f"- {line}" for line in lines)


def _generation_bounds(result: dict[str, Any]) -> str:
    verdicts: dict[str, list[str]] = {}
    for row in result["ratios"]:
        verdicts.setdefault(_ratio_verdict(result, row), []).append(row["peer"])
    text = f"**Generation, {result['shape']}**: " + "; ".join(
        f"{verdict} against {', '.join(names)}" for verdict, names in verdicts.items()
    )
    return f"{text}."


def _plot(results: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    generated = results.get(f"generate-{_PLOTTED}")
    if generated is not None:
        for ours in (True, False):
            rows = [row for row in _best_builds(generated["rows"]) if row["ours"] == ours]
            label = "EntroLLM" if ours else "llama.cpp"
            style = "o-" if ours else "s"
            points = sorted((row["file_bits"], row["best_rate"]) for row in rows)
            left.plot(*zip(*points, strict=True), style, label=label)
            for row in rows:
                if not ours:
                    place = (row["file_bits"], row["best_rate"])
                    left.annotate(row["name"], place, textcoords="offset points", xytext=(4, 4), fontsize=7)
        left.set_title(f"{_PLOTTED} shape, {generated['threads']} threads")
    _axes(left, "file bits per weight", "tokens per second, best")
    gemv = results.get("gemv")
    if gemv is not None:
        threads = max(row["threads"] for row in gemv["rows"])
        points = sorted((row["stored_bits"], row["rate"]) for row in gemv["rows"] if row["threads"] == threads)
        right.plot(*zip(*points, strict=True), "o-", label="EntroLLM")
        widths = {"int4": 4, "int8": 8, "bf16": 16}
        rates = {row["name"]: row["rate"] for row in gemv["baselines"] if row["threads"] == threads}
        right.plot(widths.values(), [rates[name] for name in widths], "s", label="full width")
        for name, bits in widths.items():
            right.annotate(name, (bits, rates[name]), textcoords="offset points", xytext=(4, 4), fontsize=7)
        right.set_title(f"fused product, {threads} threads")
    _axes(right, "stored bits per weight", "Gweights per second, best")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _star(others: float, threads: int = 0, cores: int = 0) -> str:
    """A mark where others took more than the cores left to them, and then some."""
    return "*" if others > DISTURBED + (1 - threads / cores if cores else 0.0) else ""


def _note(result: dict[str, Any]) -> str:
    """What a result says of itself that sets it apart, as a paragraph."""
    return f"\n\n{result['note']}" if "note" in result else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _ratio_verdict(result: dict[str, Any], ratio: dict[str, Any]) -> str:
    """A ratio over a peer proves no goal unless every build of the peer was given a fair chance."""
    if ratio["ratio_best"] < ratio["goal"]:
        return "missed"
    builds = {row["build"] for row in result["rows"] if not row["ours"]}
    timed = {row["build"] for row in result["rows"] if row["name"] == ratio["peer"] and len(row["rates"]) >= 3}
    return "provisional" if timed == builds else "not settled"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
