"""The corpus chain measured: what it finds of planted noise, languages of real sentences, speed and memory by size of input.

Planted: a corpus of data/noise.py goes through extract, langid, filter, quality and dedup; a document counts as caught when it is gone,
relabelled (wrong language) or cleaned (boilerplate lines). Precision is the share of caught documents that were planted.
Languages: sentences of the held-out documents of a real corpus under the shipped table. Speed: the same corpus at 1x, 4x and 16x of
--size, each step in a process of its own, peak memory of it and of its workers.

    python -m benchmarks.chain --data corpus        # about 6 minutes on two cores
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict

import cli
from benchmarks import keep
from data import langid, market, noise
from data.reader import held_out, read_folder
from report import table

ORDER = ("extract", "langid", "filter", "quality", "dedup", "resample")


def write(folder, documents):
    """One .jsonl for each language, documents in their order."""
    os.makedirs(folder)
    by_language = defaultdict(list)
    for document in documents:
        by_language[document["lang"]].append(json.dumps(document, ensure_ascii=False) + "\n")
    for lang, lines in by_language.items():
        with open(os.path.join(folder, f"{lang}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(lines)


def read(folder):
    for name in sorted(os.listdir(folder)):
        if name.endswith(".jsonl"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                yield from map(json.loads, file)


def run_step(step, source, out):
    """Run one step as its command; returns its report with wall seconds and the peak memory (MB) of the largest process."""
    code = (
        "import resource, subprocess, sys, time; t = time.perf_counter(); r = subprocess.run(sys.argv[1:]);"
        "print(r.returncode, time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "data.chain", "--step", step, "--data", source, "--out", out]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    status, seconds, peak = done.stdout.strip().split("\n")[-1].split()
    if status != "0":
        raise RuntimeError(f"{step} failed on {source}:\n{done.stderr}")
    with open(os.path.join(out, "report.json")) as file:
        return {**json.load(file), "wall": float(seconds), "peak_MB": float(peak) / 1e3}


def planted(folder, seed):
    """{fault: {"planted", "caught", "recall"}} and the precision over everything caught."""
    made = {d["id"]: d for d in noise.documents(seed)}
    boilerplate = {line for lang in market.LANGUAGES for line in market.lexicon(lang)["boilerplate"]}
    write(os.path.join(folder, "0"), made.values())
    caught, removed_by = set(), Counter()
    for i, step in enumerate(ORDER[:-1]):
        before = {d["id"] for d in read(os.path.join(folder, str(i)))}
        run_step(step, os.path.join(folder, str(i)), os.path.join(folder, str(i + 1)))
        after = {d["id"]: d for d in read(os.path.join(folder, str(i + 1)))}
        removed_by.update((step, made[name]["fault"] or "clean") for name in before - set(after))
        caught |= before - set(after)
        caught |= {name for name, d in after.items() if step == "langid" and d["lang"] != made[name]["lang"]}
        if step == "filter":
            caught |= {n for n, d in after.items() if made[n]["fault"] == "boilerplate" and not boilerplate & set(d["text"].split("\n"))}
    faults = {}
    for fault in noise.FAULTS:
        names = {name for name, d in made.items() if d["fault"] == fault}
        faults[fault] = {"planted": len(names), "caught": len(names & caught), "recall": len(names & caught) / len(names)}
    clean = {name for name, d in made.items() if d["fault"] is None}
    precision = 1 - len(clean & caught) / len(caught)
    return {
        "faults": faults, "precision": precision, "clean": len(clean), "clean lost": len(clean & caught),
        "removed by": {f"{step}: {fault}": n for (step, fault), n in sorted(removed_by.items())},
    }  # fmt: skip


def languages(folder, per_language=1500):
    """F1 of each language on held-out sentences of at least 10 characters, and where Malay and Indonesian go."""
    pool = defaultdict(list)
    for document in read_folder(folder):
        if held_out(document["text"]):
            pool[document["lang"]] += [s for s in langid.sentences(document["text"]) if len(s) >= 10]
    confusion = Counter()
    for lang, sentences in sorted(pool.items()):
        for sentence in random.Random(0).sample(sentences, min(per_language, len(sentences))):
            confusion[lang, langid.identify(sentence)[0]] += 1
    f1 = {}
    for lang in pool:
        true = sum(n for (real, _), n in confusion.items() if real == lang)
        said = sum(n for (_, guess), n in confusion.items() if guess == lang)
        f1[lang] = 2 * confusion[lang, lang] / (true + said)
    apart = {f"{real} as {guess}": confusion[real, guess] for real in ("ms", "id") for guess in ("ms", "id")}
    return {"f1": f1, "macro": sum(f1.values()) / len(f1), "ms_id": apart}


def speed(folder, corpus, megabytes):
    """{step: {size: [MB/s of wall time, peak MB]}} for 1, 4 and 16 times `megabytes` of input."""
    documents, result = list(read_folder(corpus)), defaultdict(dict)
    random.Random(0).shuffle(documents)
    for times in (1, 4, 16):
        left, chosen = times * megabytes * 1e6, []
        for document in documents:
            left -= len(document["text"].encode())
            if left < 0:
                break
            chosen.append(document)
        source = os.path.join(folder, f"{times}x-0")
        write(source, chosen)
        for i, step in enumerate(ORDER, 1):
            out = os.path.join(folder, f"{times}x-{i}")
            report = run_step(step, source, out)
            result[step][f"{times * megabytes} MB"] = [round(report["bytes in"] / 1e6 / report["wall"], 2), round(report["peak_MB"])]
            source = out
        print({step: sizes[f"{times * megabytes} MB"] for step, sizes in result.items()}, flush=True)
    return result


def tables(results):
    found, f1, sizes = results["planted"], results["languages"]["f1"], results["speed"]["extract"]
    planted = sum(fault["planted"] for fault in found["faults"].values())
    counts = [f"{planted:,}", f"{found['clean']:,}", found["clean lost"], f"{100 * found['precision']:.1f}"]
    faults = [[name, fault["planted"], f"{100 * fault['recall']:.1f}"] for name, fault in found["faults"].items()]
    others = [value for lang, value in f1.items() if lang not in ("ms", "id")]
    macro = f"{results['languages']['macro']:.3f}"
    languages = [macro, f"{f1['ms']:.2f}", f"{f1['id']:.2f}", f"{min(others):.2f} to {max(others):.2f}"]
    apart = results["languages"]["ms_id"]
    speeds = [[step, *(f"{rate:.1f}, {peak}" for rate, peak in figures.values())] for step, figures in results["speed"].items()]
    return {
        "found": table([counts], ["planted faults", "clean documents", "clean ones lost", "of what was caught had been planted, %"]),
        "faults": table(faults, ["planted fault", "documents", "caught, %"]),
        "languages": table([[*languages, *apart.values()]], ["macro F1", "Malay", "Indonesian", f"the other {len(others)}", *apart]),
        "speed": table(speeds, ["MB/s, peak MB of one process", *sizes]),
    }


def main():
    args = cli.parse(
        __doc__, "seed",
        data=dict(required=True, help="folder of <lang>.jsonl files"),
        size=dict(type=int, default=2, help="megabytes of the smallest input"),
    )  # fmt: skip
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        results["planted"] = planted(os.path.join(folder, "planted"), args.seed)
        print(json.dumps(results["planted"], indent=1))
        results["languages"] = languages(args.data)
        print(json.dumps(results["languages"]))
        results["speed"] = speed(os.path.join(folder, "speed"), args.data, args.size)
    keep("chain", results)


if __name__ == "__main__":
    cli.run(main)
