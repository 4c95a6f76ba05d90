"""Public corpora to a folder the chain can read, through the Hugging Face hub library (pip install ".[hub]").

    python -m data.download --dataset HuggingFaceFW/fineweb-2 --match "data/ind_Latn/train/000*.parquet" --out crawl
    python -m data.download --dataset wikimedia/wikipedia --match "20231101.ms/*.parquet" --out crawl

--dataset may also be a local folder. The files are taken as they are, one at a time; a finished one is not fetched again. Their
folders become part of the name; two that meet so are an error. The chain reads .parquet with pyarrow, from the column "text".
"""

import fnmatch
import functools
import os
import shutil
from collections import Counter

from tqdm import tqdm

import cli
from cli import InputError


def files_matching(dataset, pattern):
    """({name: bytes} of the matching files in order of name, function from a name to a local path)."""
    if os.path.isdir(dataset):
        fetch = functools.partial(os.path.join, dataset)
        names = [os.path.relpath(os.path.join(folder, name), dataset) for folder, _, files in os.walk(dataset) for name in files]
        sizes = {name: os.path.getsize(fetch(name)) for name in names}
    else:
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError:
            raise InputError('python -m data.download needs the hub library: pip install ".[hub]"') from None
        try:
            entries = list(HfApi().list_repo_tree(dataset, recursive=True, repo_type="dataset"))
        except Exception as error:  # a bad name, no such dataset, no network: the library has a kind of its own for each
            raise InputError(f"{dataset}: no local folder, and the hub does not give it ({error})") from None
        sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}  # a folder has none

        def fetch(name):
            try:
                return hf_hub_download(dataset, name, repo_type="dataset")
            except Exception as error:
                raise InputError(f"{dataset}: the hub does not give {name} ({error})") from None

    chosen = {name: size for name, size in sorted(sizes.items()) if fnmatch.fnmatch(name, pattern)}
    if not chosen:
        raise InputError(f"{dataset}: none of {len(sizes)} files matches {pattern!r}")
    return chosen, fetch


def download(dataset, pattern, out):
    """Copy the matching files into `out`; return their paths there."""
    sizes, fetch = files_matching(dataset, pattern)
    paths = [os.path.join(out, name.replace("/", "_")) for name in sizes]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise InputError(f"{dataset}: two files would both become {twice[0]}: narrow --match and name another --out for the second")
    for size, target in zip(sizes.values(), paths, strict=True):
        if os.path.exists(target) and os.path.getsize(target) != size:
            raise InputError(f"{target} is there already and is not that of {dataset}, which has {size:,} bytes: name another --out")
    os.makedirs(out, exist_ok=True)
    for name, target in zip(tqdm(sizes, unit="file"), paths, strict=True):
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
