"""Writes the tables of README.md, rpe_ops/README.md and docs/ from benchmarks/results/*.json.

    python benchmarks/tables.py            # between the lines <!-- table: NAME --> and <!-- end -->; `make tables`
    python benchmarks/tables.py --check    # says which file is not what the results give

Each table says its machine, instruction set, threads and date. What has no results yet is left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cifar10 import report

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "rpe_ops/README.md", *(f"docs/{name}.md" for name in ("axes", "digits", "results", "speed")))
RESULTS = ROOT / "benchmarks" / "results"
ISAS = ("", "_avx2")  # the machine's own, and what `--isa avx2` holds both sides down to
WORDS = {"k": "k", "q": "q", "v": "v", "qk": "q and k", "qkv": "q, k and v"}
PASSES = {"forward": "forward", "forward+backward": "forward and backward"}


def read(name: str, isa: str, results: Path) -> dict[str, Any] | None:
    file = results / f"{name}_cpu{isa}.json"
    return json.loads(file.read_text()) if file.exists() else None


def machine(found: dict[str, Any], what: str) -> str:
    """The line under a table."""
    facts = found["machine"]
    held = "both sides held down to " if "RPE_OPS_ISA" in facts else ""
    return (
        f"{what}{held}{facts['isa'].lower()}, {facts['threads']} threads of {facts['device']}, "
        f"torch {facts['torch'].split('+')[0]}, {facts['date']}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(line) + " |" if set(line) != {"---"} else "|---" * len(line) + "|" for line in lines
    )


def attention(found: dict[str, Any], dtype: str, cell: Any, only: tuple[str, ...] = (), base: bool = True) -> str:
    """A row for each pass and place of encodings, a column for each map; `cell` makes the text of a line's ratios."""
    lines = [line for line in found["rows"] if line["dtype"] == dtype and (not only or line["on"] in only)]
    sides = sorted({line["map"] for line in lines})
    rows = []
    for key, words in PASSES.items():
        of = {(line["on"], line["map"]): line for line in lines if line["pass_"] == key}
        bases = {side: [line for (_, at), line in of.items() if at == side] for side in sides}
        if base:
            cells = [f"{one[-1]['base_ms']:.3g} ms, {one[-1]['base_gflops']:.0f} GFLOP/s" for one in bases.values()]
            rows.append([f"without, {words}", *cells])
        for on in dict.fromkeys(on for on, _ in of):
            rows.append(
                [f"{words}, {WORDS[on]}", *(cell(of[on, side]["ratio"]) if (on, side) in of else "" for side in sides)]
            )
    batch = {line["map"]: f", B={line['B']}" for line in lines if "B" in line}
    return table(["", *(f"{side}x{side}+1{batch.get(side, '')}" for side in sides)], rows)


def with_formula(ratio: dict[str, float]) -> str:
    return f"{ratio['ours']:.2f} ({ratio['eager']:.2f})"


def with_sdpa(ratio: dict[str, float]) -> str:
    return f"{ratio['ours']:.2f} ({ratio['ours'] / ratio['sdpa']:.2f}; {ratio['eager']:.2f})"


def over_tiles(ratio: dict[str, float]) -> str:
    return f"{ratio['tiles']:.2f} + {ratio['ours'] - ratio['tiles']:.2f}"


def attentions(dtype: str, cell: Any, results: Path, *, only: tuple[str, ...] = (), base: bool = True) -> str:
    parts = []
    for isa in ISAS:
        found = read("bench_attention", isa, results)
        if found is not None and any(line["dtype"] == dtype for line in found["rows"]):
            parts += [attention(found, dtype, cell, only, base), machine(found, f"{dtype}, ")]
    return "\n\n".join(parts)


def terms(results: Path) -> str:
    parts = []
    for isa in ISAS:
        found = read("bench_attention", isa, results)
        if found is not None and all("tiles" in line["ratio"] for line in found["rows"]):
            parts += [attention(found, "float32", over_tiles, base=False), machine(found, "float32, ")]
    return "\n\n".join(parts)


def memory(results: Path) -> str:
    parts = []
    for isa in ISAS:
        found = read("bench_attention", isa, results)
        lines = [line for line in found["rows"] if "mib" in line] if found is not None else []
        if found is None or not lines:
            continue
        rows = []
        for line in lines:
            what = f"{line['map']}x{line['map']}+1, {line['dtype']}, {PASSES[line['pass_']]}, {WORDS[line['on']]}"
            rows.append([what, *(f"{line['mib'][name]:.0f}" for name in ("sdpa", "ours", "eager"))])
        parts += [table(["MiB over inputs, first call", "without", "ours", "formula"], rows), machine(found, "")]
    return "\n\n".join(parts)


def axes(results: Path) -> str:
    parts = []
    for isa in ISAS:
        found = read("bench_axes", isa, results)
        if found is None:
            continue
        rows = []
        for line in found["rows"]:
            cells = [f"{line['base_ms']:.3g} ms", *(f"{line['ratio'][name]:.2f}" for name in ("ours", "eager"))]
            cells += [f"{line['mib'][name]:.0f}" if "mib" in line else "" for name in ("sdpa", "ours", "eager")]
            rows.append([f"{PASSES[line['pass_']]}, {WORDS[line['on']]}", *cells])
        first = found["rows"][0]
        size = f"{'x'.join(map(str, first['size']))}, B={first['B']}, H={first['H']}"
        head = [size, "without", "ours", "formula", "MiB without", "ours", "formula"]
        parts += [table(head, rows), machine(found, f"{first['dtype']}, ")]
    return "\n\n".join(parts)


def index(results: Path) -> str:
    columns = {"clone": "copy with allocation", "forward": "`rpe_index`", "backward": "`rpe_bucket_sum`"}
    columns |= {
        "gather": "gather",
        "scatter_add": "scatter_add",
        "indexing": "flat indexing",
        "its backward": "its gradient",
    }
    parts = []
    for isa in ISAS:
        found = read("bench_rpe_index", isa, results)
        if found is None:
            continue
        here = {key: words for key, words in columns.items() if key in found["rows"][0]}
        rows = []
        for row in found["rows"]:
            cells = [f"{row[key]:.2f}" if row[key] < 10 else f"{row[key]:.0f}" for key in here]
            rows.append([f"{row['shape']}, B={row['B']}", row["dtype"], f"{row['copy ms']:.2f} ms", *cells])
        parts += [table(["shape", "dtype", "copy", *here.values()], rows), machine(found, "")]
    return "\n\n".join(parts)


NAMES = {"deit_small_patch16_224": "DeiT-S", "vit_base_patch14_dinov2": "ViT-B/14 (DINOv2)"}


def models(results: Path) -> str:
    parts = []
    for isa in ISAS:
        found = read("bench_model", isa, results)
        if found is None:
            continue
        rows = []
        for row in found["rows"]:
            cells = [f"{row['images/s']:.3g}", f"{row['time over plain']:.2f}"]
            if "peak MiB" in row:
                cells.append(f"{row['peak MiB']:.0f}")
            name = NAMES[row.get("name", "deit_small_patch16_224")]
            rows.append([f"{name} at {row['size']}, B={row['batch']}, {row['pass']}", row["model"], *cells])
        head = ["", "encodings", "images/s", "time over plain", "peak MiB"][: len(rows[0])]
        parts += [table(head, rows), machine(found, "float32, ")]
    return "\n\n".join(parts)


def read_gpu(name: str, results: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a GPU's results, and the line under their table."""
    found = json.loads((results / f"{name}_cuda.json").read_text())
    facts = found["machine"]
    under = f"bfloat16, {facts['device']}, torch {facts['torch'].split('+')[0]}, {facts['date']}"
    return found["rows"], f"{under}; {found['note']}" if "note" in found else under


def gpu_ratios(line: dict[str, Any]) -> dict[str, float]:
    """Times over those of flash attention, in a replayed CUDA graph; those of another run over that run's."""
    runs = (line["graph us, another run"], line["graph us"])
    return {key: us / run["flash"] for run in runs for key, us in run.items()}


def gpu_place(line: dict[str, Any]) -> str:
    return f"{line['map'].removesuffix('+0')}, B={line['B']}, H={line['H']}"


def digits(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}"


def gpu_attention(results: Path, in_short: bool = False) -> str:
    columns = {"cuDNN": "cuDNN", "k": "k", "qkv": "q, k, v", "triton k": "Triton, k", "triton qkv": "Triton, q, k, v"}
    columns |= {"eager k": "formula, k", "eager qkv": "formula, q, k, v"}
    if in_short:
        columns = {
            key: words for key, words in columns.items() if key.split()[-1] in ("k", "qkv") and "triton" not in key
        }
    lines, under = read_gpu("bench_attention", results)
    rows = []
    for line in lines:
        if line["pass"] not in PASSES or (in_short and line["pass"] == "forward"):
            continue
        ratios = gpu_ratios(line)
        cells = [digits(ratios[key]) for key in columns]
        where = f"{gpu_place(line)}, {PASSES[line['pass']]}"
        rows.append([where, f"{line['graph us']['flash']:,.0f} us", *cells])
    return f"{table(['', 'flash', *columns.values()], rows)}\n\n{under}"


def everywhere(results: Path) -> str:
    """A step of attention on every machine: a small and a larger map, forward and backward."""
    rows, machines = [], []
    for isa in ISAS:
        if (found := read("bench_attention", isa, results)) is not None:
            machines.append(machine(found, "float32, "))
            of = {
                (line["map"], line["on"]): line
                for line in found["rows"]
                if (line["dtype"], line["pass_"]) == ("float32", "forward+backward")
            }
            for side in (14, 32):
                line, both = of[side, "k"], of[side, "qkv"]
                cells = [one["ratio"][whose] for whose in ("ours", "eager") for one in (line, both)]
                rows.append([f"CPU, {found['machine']['isa']}", f"{side}x{side}+1, B={line['B']}", *map(digits, cells)])
    lines, under = read_gpu("bench_attention", results)
    machines.append(under.split("; ")[0])
    for line in lines:
        if line["pass"] == "forward+backward" and line["map"].split("+")[0] in ("14x14", "32x32"):
            ratios = gpu_ratios(line)
            cells = [ratios[key] for key in ("k", "qkv", "eager k", "eager qkv")]
            rows.append([under.split(", ")[1], gpu_place(line), *map(digits, cells)])
    head = ["", "map", "k", "q, k, v", "formula, k", "formula, q, k, v"]
    return f"{table(head, rows)}\n\n{'; '.join(machines)}"


def gpu_models(results: Path) -> str:
    lines, under = read_gpu("bench_model", results)
    rows = [
        [
            f"{line['mode']}, {WORDS.get(line['model'], 'without')}", f"{line['images/s']:,.0f}",
            f"{line['time over plain']:.2f}", f"{line['MiB']:,.0f}", f"{line['memory over plain']:.2f}",
        ]
        for line in lines
    ]  # fmt: skip
    head = ["DeiT-S at 224, B=256, a training step", "images/s", "time over plain", "peak MiB", "memory over plain"]
    return f"{table(head, rows)}\n\n{under}"


def trained_on(found: dict[str, Any]) -> str:
    """The line under a table of trainings: seeds, processor and times."""
    facts, seeds = found["machine"], found["summary"][0]["seeds"]
    operators = f"operators in {facts['isa'].lower()}" if facts["isa"] else "plain torch"
    told = f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {operators}, {facts['device']}"
    took = f"{len(found['runs'])} runs took {found['cpu_seconds']:,.0f} s of CPU time"
    return f"{told}, torch {facts['torch'].split('+')[0]}, {facts['date']}; {took}"


def best(rows: list[dict[str, Any]], test: str) -> str | None:
    """The side that is ahead by more than the deviations of both, of every other side."""
    of = {row["side"]: row["accuracy"][test] for row in rows}
    first = max(of, key=lambda side: of[side]["mean"])
    low = of[first]["mean"] - of[first]["std"]
    return first if all(low > one["mean"] + one["std"] for side, one in of.items() if side != first) else None


def trained(name: str, results: Path, *, in_short: bool = False) -> str:
    """Right answers of each side, mean ± deviation over the seeds, and the differences of pairs of the same seed."""
    if (found := read(name, "", results)) is None:
        return ""
    tests = found["tests"]
    ahead = {test: best(found["summary"], test) for test in tests}
    rows = []
    for row in found["summary"]:
        cells = []
        for test in tests:
            figure = f"{row['accuracy'][test]['mean']:.1f} ± {row['accuracy'][test]['std']:.1f}"
            cells.append(f"**{figure}**" if ahead[test] == row["side"] else figure)
        rows.append([row["title"], *cells, *([] if in_short else [f"{row['parameters']:,}", f"{row['lr']:g}"])])
    titles = {row["side"]: row["title"] for row in found["summary"]}
    gains = [
        [
            f"{titles[gain['side']]}, to {titles[gain['other']]}",
            *(f"{one['mean']:+.1f} ± {one['error']:.1f}" for one in (gain["difference"][test] for test in tests)),
        ]
        for gain in found["differences"]
    ]
    head = ["positions", *tests.values(), *([] if in_short else ["weights", "peak lr"])]
    parts = [table(head, rows), table(["points ahead", *tests.values()], gains), trained_on(found)]
    return "\n\n".join(parts)


def rates(name: str, results: Path) -> str:
    """Right answers on validation images at each rate: those of the first test, of the others in brackets."""
    if (found := read(name, "", results)) is None:
        return ""
    lines = {(row["side"], row["lr"]): row for row in found["summary"]}
    titles = {row["side"]: row["title"] for row in found["summary"]}
    rows = []
    for lr in sorted({lr for _, lr in lines}):
        cells = []
        for side in titles:
            first, *others = (f"{lines[side, lr]['accuracy'][test]['mean']:.1f}" for test in found["tests"])
            cells.append((f"**{first}**" if found["chosen"][side] == lr else first) + f" ({', '.join(others)})")
        rows.append([f"{lr:g}", *cells])
    return f"{table(['peak lr', *titles.values()], rows)}\n\n{trained_on(found)}"


TABLES = {
    "attention in short": lambda results: attentions("float32", with_formula, results, only=("k", "qkv"), base=False),
    "attention": lambda results: attentions("float32", with_formula, results),
    "attention in bfloat16": lambda results: attentions("bfloat16", with_sdpa, results, base=False),
    "terms": terms,
    "memory": memory,
    "axes": axes,
    "index": index,
    "models": models,
    "gpu attention": gpu_attention,
    "gpu attention in short": lambda results: gpu_attention(results, in_short=True),
    "gpu models": gpu_models,
    "digits": lambda results: trained("digits", results),
    "digits in short": lambda results: trained("digits", results, in_short=True),
    "digits of other seeds": lambda results: trained("digits_seeds", results, in_short=True),
    "digits rates": lambda results: rates("digits_tune", results),
    "moving": lambda results: trained("moving", results),
    "moving rates": lambda results: rates("moving_tune", results),
    "attention everywhere": everywhere,
    **report.TABLES,
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """`text` with every table as the results give it."""

    def write(found: re.Match[str]) -> str:
        if (name := found.group(1)) not in TABLES:
            raise ValueError(f"there is no table {name!r}; expected one of {', '.join(TABLES)}")
        made = TABLES[name](results)
        return f"<!-- table: {name} -->\n\n{made}\n\n<!-- end -->" if made else f"<!-- table: {name} -->\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z0-9 ]+) -->\n.*?<!-- end -->", write, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table is another one")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        text = (ROOT / name).read_text()
        if (made := rendered(text)) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(made)
    if check and stale:
        sys.exit(f"not what benchmarks/results gives: {', '.join(stale)}; `make tables` writes them")
    print("as they were" if not stale else f"written: {', '.join(stale)}")


if __name__ == "__main__":
    main()
