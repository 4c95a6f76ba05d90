"""Public corpora to a folder the chain can read, through the Hugging Face hub library (pip install ".[hub]").

    python -m data.download --dataset HuggingFaceFW/fineweb-2 --match "data/ind_Latn/train/000*.parquet" --out crawl
    python -m data.download --dataset wikimedia/wikipedia --match "20231101.ms/*.parquet" --out crawl

--dataset may also be a local folder. The files are taken as they are, one at a time; a finished one is not fetched again. Their
folders become part of the name, so that no two meet. The chain reads .parquet with pyarrow, from the column "text".
"""

import fnmatch
import functools
import os
import shutil

from tqdm import tqdm

import cli
from cli import InputError


def files_matching(dataset, pattern):
    """(names of the matching files in order, function from a name to a local path)."""
    if os.path.isdir(dataset):
        names = sorted(
            os.path.relpath(os.path.join(folder, name), dataset) for folder, _, files in os.walk(dataset) for name in files
        )
        fetch = functools.partial(os.path.join, dataset)
    else:
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError:
            raise InputError('python -m data.download needs the hub library: pip install ".[hub]"') from None
        names = sorted(HfApi().list_repo_files(dataset, repo_type="dataset"))
        fetch = functools.partial(hf_hub_download, dataset, repo_type="dataset")
    chosen = [name for name in names if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise InputError(f"{dataset}: none of {len(names)} files matches {pattern!r}")
    return chosen, fetch


def download(dataset, pattern, out):
    """Copy the matching files into `out`; return their paths there."""
    os.makedirs(out, exist_ok=True)
    paths = []
    names, fetch = files_matching(dataset, pattern)
    for name in tqdm(names, unit="file"):
        target = os.path.join(out, name.replace("/", "_"))
        paths.append(target)
        if not os.path.exists(target):
            shutil.copyfile(fetch(name), target + ".part")
            os.replace(target + ".part", target)
    return paths


def main():
    args = cli.parse(
        __doc__,
        dataset=dict(required=True, help="name of a dataset on the hub, or a local folder"),
        match=dict(default="*", help="file name pattern within the dataset, such as 'data/ind_Latn/*.parquet'"),
        out=dict(required=True, help="folder to write to"),
    )
    print(*download(args.dataset, args.match, args.out), sep="\n")


if __name__ == "__main__":
    cli.run(main)
