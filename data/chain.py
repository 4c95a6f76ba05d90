"""The corpus chain: steps that turn any folder of text, web pages or crawls into clean documents (v2 §2.1).

    extract   HTML, WARC, WET, .txt, .jsonl(.gz) to documents    data/extract.py
    langid    language of every sentence, wrong labels mended    data/langid.py
    dedup     exact and near duplicates, good repeats kept       data/dedup.py
    filter    boilerplate, spam, broken text; code and maths apart   data/filters.py
    quality   a score between 0 and 1 for every document         data/quality.py
    resample  documents kept quality × occurrences times         data/quality.py
    report    table and picture of what each step removed        (reads the folders' report.json)

A step reads a folder and writes one .jsonl for each input file: documents one by one (memory flat but for dedup's index), files
over all cores, each written aside and renamed when complete. Killed, it goes on with the files it had not finished,
and the output is the same. report.json in the output folder counts what was removed and why.

Steps are independent and may run in any order. Good repeats can only be kept (dedup --keep) where quality ran before dedup,
which is why bash data/chain.sh scores first.

    python -m data.chain --step extract --data crawl --out corpus/1-extract
    python -m data.chain --step langid --data corpus/1-extract --out corpus/2-langid
    bash data/chain.sh crawl corpus          # all steps, corpus/1-extract … corpus/6-resample
    python -m data.chain --step report --data corpus --out corpus
"""

import functools
import json
import os
import time
from collections import Counter

from tqdm import tqdm

import cli
from cli import InputError
from data import dedup, filters, langid, quality
from data.extract import documents_of, files_of, processes, write_json
from data.reader import say_unread


def output_name(name):
    """th.jsonl and th.jsonl.gz stay th.jsonl; page.html becomes page.html.jsonl, so that no two inputs meet."""
    return name if name.endswith(".jsonl") else name.removesuffix(".jsonl.gz") + ".jsonl"


def _process(step, job):
    """Run one file through the step; its counts are renamed into place before its documents, which mark it done."""
    source, target = job
    counts, began = Counter({f"{what} {side}": 0 for what in ("documents", "bytes") for side in ("in", "out")}), time.perf_counter()

    def read():
        for document in documents_of(source):
            counts["documents in"] += 1
            counts["bytes in"] += len(document["text"].encode())
            yield document

    def written():
        for document in step(read(), counts, source):
            counts["documents out"] += 1
            counts["bytes out"] += len(document["text"].encode())
            yield json.dumps(document, ensure_ascii=False) + "\n"

    with open(target + ".part", "w", encoding="utf-8") as file:
        file.writelines(written())
    counts["seconds"] += time.perf_counter() - began
    write_json(target + ".counts", counts)
    os.replace(target + ".part", target)


def read_object(path, *needed):
    """A JSON object that the chain wrote. Raises InputError where it is none, or lacks a field that is needed."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(needed):
        raise InputError(f"{path}: damaged, or not written by the corpus chain")
    return value


def claim(out, paths, **settings):
    """Make the output folder of a step; one that holds finished files of another step, settings or input is an error.

    A file that is not finished may have been mended since, but not where all files are judged together (dedup).
    """
    os.makedirs(out, exist_ok=True)
    path, stats = os.path.join(out, "settings.json"), {os.path.realpath(p): os.stat(p) for p in paths}
    settings["input"] = now = {p: [stat.st_size, stat.st_mtime_ns] for p, stat in stats.items()}
    finished, before = {name for name in os.listdir(out) if name.endswith((".jsonl", ".ends"))}, {}
    if os.path.exists(path):
        before = read_object(path, "input")
    if finished and settings["step"] != "dedup" and before.get("input", {}).keys() == now.keys():
        for p in now:
            if finished.isdisjoint((output_name(os.path.basename(p)), os.path.basename(p) + ".ends")):
                before["input"][p] = now[p]
    if finished and before != settings:
        raise InputError(f"{out}: holds the output of another step, other settings or other input; choose another folder")
    write_json(path, settings)


def run(name, step, source, out, workers=None):
    """Apply `step(documents, counts, path) -> documents` to every file of `source`; return the report, also in out/report.json.

    step must be picklable, is a generator over one file's documents, and counts each removal as "removed: <reason>".
    """
    sources = {}
    for file, path in files_of(source).items():
        target = os.path.join(out, output_name(file))
        if target in sources:
            both = f"{os.path.basename(sources[target])} and {file}"
            raise InputError(f"{source}: {both} would both become {output_name(file)}: rename one")
        sources[target] = path
    pending = [(path, target) for target, path in sources.items() if not os.path.exists(target)]
    with processes(workers) as pool:
        list(tqdm(pool.map(functools.partial(_process, step), pending), total=len(pending), desc=name, unit="file"))
    totals = Counter()
    for target in sources:
        totals.update(read_object(target + ".counts"))
    report = {"step": name, **dict(sorted(totals.items()))}
    write_json(os.path.join(out, "report.json"), report)
    return report


def keep_nonempty(documents, counts, source):
    """The extract step: what is left after reading, without empty documents."""
    for document in documents:
        if document["text"].strip():
            yield document
        else:
            counts["removed: empty"] += 1


def report_of(folder):
    """The report.json of every step below `folder`, in folder order. Raises InputError when there is none."""
    paths = [os.path.join(folder, name, "report.json") for name in sorted(os.listdir(folder))]
    reports = []
    for path in filter(os.path.exists, paths):
        report = read_object(path)
        if "step" in report:  # a run's report has none
            reports.append(report)
    if not reports:
        raise InputError(f"{folder}: no folder in it holds a finished step (report.json)")
    return reports


def write_report(folder, out):
    """out/chain.md and out/chain.png: documents and bytes left after each step, what went and why, MB/s of one core."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reports = report_of(folder)
    lines = ["| step | documents in | out | MB in | out | MB/s a core | what and why |", "|---" * 7 + "|"]
    for report in reports:
        said = ("removed: ", "relabelled", "boilerplate lines cut", "copies added")
        why = [f"{key}: {value:,}" for key, value in report.items() if key.startswith(said) and value]
        size = [report[f"bytes {side}"] / 1e6 for side in ("in", "out")]
        lines.append(
            f"| {report['step']} | {report['documents in']:,} | {report['documents out']:,} | {size[0]:.2f} | {size[1]:.2f} "
            f"| {size[0] / report['seconds']:.1f} | {'; '.join(why) or 'nothing'} |"
        )
    cli.write_atomically(os.path.join(out, "chain.md"), "".join(f"{line}\n" for line in lines).encode())
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.55 * len(reports)))
    for row, report in enumerate(reports):
        kept, left = report["documents out"] - report.get("copies added", 0), 0
        removed = {key.removeprefix("removed: "): value for key, value in report.items() if key.startswith("removed: ")}
        for label, width in (("kept", kept), *sorted(removed.items(), key=lambda item: -item[1])):
            share = width / max(1, report["documents in"])
            axis.barh(row, share, left=left, color="0.85" if label == "kept" else None, edgecolor="w")
            if share > 0.02:
                axis.text(left + share / 2, row, f"{label}\n{width:,}", ha="center", va="center", fontsize=6)
            left += share
    axis.set_yticks(range(len(reports)), [report["step"] for report in reports])
    axis.invert_yaxis()
    axis.set_xlabel("share of the documents that came in")
    figure.tight_layout()
    figure.savefig(os.path.join(out, "chain.png"), dpi=120)
    return "\n".join(lines)


STEPS = {
    "extract": keep_nonempty, "langid": langid.step, "filter": filters.step, "quality": quality.step, "resample": quality.resample,
}  # fmt: skip


def main():
    args = cli.parse(
        __doc__, "data",
        data=dict(required=True, help="folder to read"),
        out=dict(required=True, help="folder to write"),
        step=dict(required=True, choices=(*STEPS, "dedup", "report")),
        keep=dict(type=int, default=1, help="dedup: copies to keep of a repeated document whose quality is good"),
    )  # fmt: skip
    if args.step == "report":
        print(write_report(args.data, args.out))
        return
    if os.path.realpath(args.data) == os.path.realpath(args.out):
        raise InputError(f"{args.out}: a step cannot write into the folder that it reads")
    files = files_of(args.data)
    say_unread(args.data, files)
    paths = list(files.values())
    claim(args.out, paths, step=args.step, **({"keep": args.keep} if args.step == "dedup" else {}))
    step = STEPS[args.step] if args.step in STEPS else dedup.plan(paths, args.out, args.keep)
    report = run(args.step, step, args.data, args.out)
    for key, value in report.items():
        print(f"{key:>24}: {value:,.1f}" if isinstance(value, float) else f"{key:>24}: {value}")


if __name__ == "__main__":
    cli.run(main)
