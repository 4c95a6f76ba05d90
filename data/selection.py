"""Choose fewer, more various instructions: near duplicates out, then embed, reduce, cluster and sample (v2 §3.1).

An instruction becomes a hashed TF-IDF vector of its words and character 3-grams, reduced by PCA (a randomised SVD) to D
dimensions: the slot where the report has BGE-M3. DBSCAN finds the dense regions, the same template with other names again
and again; every cluster gives the square root of its share, each of its members with a probability that grows with how little
question and answer say the same (1 - cosine); what lies in no cluster is rare and stays. Deterministic in the seed.

    python -m data.tasks --out tasks && python -m data.selection --data tasks/train.jsonl --out selected.jsonl --keep 0.3
"""

import re
import zlib

import numpy as np

import cli
from cli import InputError
from data import dedup
from data.reader import read_tasks

BUCKETS, D = 1 << 14, 32
RADIUS, LEAST = 0.1, 8  # DBSCAN: cosine distance of neighbours, and how many make a dense point


def text_of(task):
    return "\n".join(message["content"] for message in task["messages"])


def vectors(texts):
    """Hashed TF-IDF, rows of length 1: (N, BUCKETS) float32, sparse as (rows, columns, values)."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        grams = [text[i : i + 3] for i in range(len(text) - 2)]
        buckets, counts = np.unique([zlib.crc32(token.encode()) % BUCKETS for token in (*words, *grams)] or [0], return_counts=True)
        rows.append(np.full(len(buckets), row))
        columns.append(buckets)
        values.append(np.log1p(counts))
    rows, columns, values = np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
    values = values * np.log(len(texts) / np.bincount(columns, minlength=BUCKETS).clip(1))[columns]
    norms = np.sqrt(np.bincount(rows, values**2, minlength=len(texts))).clip(1e-9)
    return rows, columns, (values / norms[rows]).astype(np.float32)


def embed(texts, seed=0):
    """PCA of the TF-IDF vectors by a randomised SVD with two power iterations: (N, D) float32, rows of length 1."""
    import torch

    rows, columns, values = vectors(texts)
    x_NB = torch.sparse_coo_tensor(np.stack((rows, columns)), values, (len(texts), BUCKETS), check_invariants=True).coalesce()
    torch.manual_seed(seed)
    mean_B = torch.sparse.sum(x_NB, 0).to_dense() / len(texts)

    def times(y_BK):  # the centred matrix, never written out
        return torch.sparse.mm(x_NB, y_BK) - mean_B @ y_BK

    def transposed_times(y_NK):
        return torch.sparse.mm(x_NB.t(), y_NK) - torch.outer(mean_B, y_NK.sum(0))

    q_NK = times(torch.randn(BUCKETS, min(D + 8, len(texts))))
    for _ in range(2):
        q_NK = times(transposed_times(torch.linalg.qr(q_NK)[0]))
    q_NK = torch.linalg.qr(q_NK)[0]
    u_KK, s_K, _ = torch.linalg.svd(transposed_times(q_NK).T, full_matrices=False)
    z_ND = (q_NK @ u_KK)[:, :D] * s_K[:D]
    return torch.nn.functional.normalize(z_ND, dim=-1).numpy()


def dbscan(z_ND, radius=RADIUS, least=LEAST):
    """Cluster of each row, -1 for noise (Ester et al. 1996), by cosine distance. Border points join the first cluster that reaches them.

    A row's neighbours are found when they are needed: O(N^2 D) time, O(N) memory.
    """

    def near(i):
        return np.flatnonzero(z_ND @ z_ND[i] >= 1 - radius)

    labels, cluster = np.full(len(z_ND), -1), 0
    for i in range(len(z_ND)):
        if labels[i] >= 0 or len(near(i)) < least:
            continue
        labels[i], frontier = cluster, [i]
        while frontier:
            around = near(frontier.pop())
            if len(around) >= least:
                new = around[labels[around] < 0]
                labels[new] = cluster
                frontier += new.tolist()
        cluster += 1
    return labels


def without_near_duplicates(tasks):
    """The first of each group of tasks whose texts and answers agree in dedup.THRESHOLD of their 5-grams."""
    signatures_NP = np.array([dedup.signature(f"{text_of(task)}\n{task['answer']}") for task in tasks])
    clusters = dedup.near_duplicates(signatures_NP)
    return [task for i, task in enumerate(tasks) if clusters.find(i) == i]


def select(tasks, keep, seed=0):
    """About `keep` (0..1) of the tasks, in their order, and a dict that says how it came about. What lies in no cluster is rare and stays,
    as long as it is not more than that."""
    unique = without_near_duplicates(tasks)
    z_ND, answers_ND = np.split(embed([text_of(t) for t in unique] + [t["answer"] for t in unique], seed), 2)
    labels, odd = dbscan(z_ND), 1 - (z_ND * answers_ND).sum(1) + 1e-3  # inverse similarity of question and answer
    rng, chosen = np.random.default_rng(seed), np.flatnonzero(labels < 0)
    if len(chosen) > (most := round(keep * len(tasks))):
        chosen = rng.choice(chosen, most, replace=False, p=odd[chosen] / odd[chosen].sum())
    chosen = chosen.tolist()
    clusters = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
    wanted, roots = keep * len(tasks) - len(chosen), sum(len(members) ** 0.5 for members in clusters)
    for members in sorted(clusters, key=len):  # what the small ones do not have, the larger give
        root = len(members) ** 0.5
        k = min(len(members), max(1, round(wanted * root / roots)))
        wanted, roots = wanted - k, roots - root
        chosen += rng.choice(members, k, replace=False, p=odd[members] / odd[members].sum()).tolist()
    sizes = {"given": len(tasks), "unique": len(unique), "clusters": len(clusters), "in no cluster": int((labels < 0).sum())}
    return [unique[i] for i in sorted(chosen)], {**sizes, "chosen": len(chosen)}


def main():
    args = cli.parse(
        __doc__, "seed",
        data=dict(required=True, help="task file .jsonl"),
        out=dict(required=True, help="task file to write"),
        keep=dict(type=float, default=0.3, help="share of the tasks to keep, 0..1"),
    )  # fmt: skip
    if not 0 < args.keep <= 1:
        raise InputError(f"--keep is {args.keep}, must be over 0 and at most 1")
    tasks = read_tasks(args.data)
    selected, report = select(tasks, args.keep, args.seed)
    cli.write_jsonl(args.out, selected)
    print(", ".join(f"{value:,} {key}" for key, value in report.items()))


if __name__ == "__main__":
    cli.run(main)
