"""The one vocabulary of command-line flags, the one way in which bad input ends a script, and the one way to replace a file.

Every script asks `parse` for the flags it understands, so `--run` means the same folder and `--seed` the same thing everywhere. Scripts end
with `run(main)`: input that a user can mend (an `InputError`, a missing file, a full disk) becomes one line on stderr and exit code 2;
anything else is our bug and keeps its traceback.
"""

import argparse
import json
import os
import re
import shutil
import sys
from concurrent.futures import BrokenExecutor

FLAGS = {
    "config": dict(default="tiny", help="model size: a name in compass.CONFIGS"),
    "data": dict(default=None, help="folder of .txt/.jsonl files (default: the embedded marketplace)"),
    "run": dict(default="runs/demo", help="run folder: tokenizer, checkpoints, metrics, report"),
    "stage": dict(help="which stage of the script to run"),
    "steps": dict(type=int, default=None, help="optimizer steps (default: the stage's recipe)"),
    "resume": dict(action="store_true", help="go on from the last checkpoint; skip finished stages"),
    "device": dict(default="auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one"),
    "parallel": dict(help="layout of the processes torchrun started, as in ep=2,cp=2: pp, dp, cp, ep, tp, vpp; dp takes the rest"),
    "seed": dict(type=int, default=0, help="seed of initialisation, data order and sampling"),
}
MAY_BE_ZERO = ("seed", "rounds", "budget")  # all other whole numbers are at least 1


class InputError(ValueError):
    """Something the user gave is wrong; the message names the file, line, field or tensor."""


def parse(doc, *names, argv=None, **extra):
    """Parse the shared flags `names`. `extra` gives argparse settings by flag: they change a shared flag or add a new one; a new one with
    nargs is positional."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **{**FLAGS[name], **extra.pop(name, {})})
    for name, settings in extra.items():
        parser.add_argument(name if "nargs" in settings else f"--{name}", **settings)
    args = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ and "parallel" not in names:
        parser.error("this script runs in one process: start it without torchrun")
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is '': an unset variable?")
        if name == "stage" and value and not re.fullmatch(r"\w+(/\d+)?", value):
            parser.error(f"--stage is {value!r}: not the name of a stage")
        if type(value) is int and not (least := int(name not in MAY_BE_ZERO)) <= value < 2**63:
            parser.error(f"--{name} is {value}, must be at least {least}" + " and below 2^63" * (value > least))
    return args


def pick_device(name):
    """Return the torch.device for `--device` and print it with the reason."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    if name == "auto":
        name, why = ("cuda", "a GPU is visible") if torch.cuda.is_available() else ("cpu", "no GPU is visible")
    else:
        why = "asked for"
    print(f"device {name} ({why})" + (f", fp32, {torch.get_num_threads()} threads" if name == "cpu" else ""))
    return torch.device(name)


def write_atomically(path, content):
    """Write bytes so that `path` is always either the old file or the whole new one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = path + ".tmp"
    if os.path.isdir(temporary):  # what a killed save by many ranks left
        shutil.rmtree(temporary)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise InputError(f"{path}: could not be written ({error.strerror}); what was there before is intact") from None


def write_jsonl(path, objects):
    """`write_atomically` of one JSON object a line."""
    write_atomically(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects).encode())


def run(main):
    """Call `main()`; end with exit code 2 and one line on stderr when the user can mend the cause."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():  # torchrun started this process
            dist.destroy_process_group()
    except (InputError, OSError, BrokenExecutor) as error:  # the last: a worker process was killed, perhaps for want of memory
        if isinstance(error, OSError) or os.environ.get("LOCAL_RANK", "0") == "0":  # of a node's ranks with the same input one complains
            print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
