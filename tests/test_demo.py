"""demo.sh from end to end in a micro setting, every stage from the command line, and the report it leaves."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from conftest import ROOT

import cli
from checkpoint import checkpoints, load_latest
from data import market
from data.reader import read_tasks
from data.tasks import tasks, training
from evaluate import accuracy, copied_answers, majority_answers, without_text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(run folder, finished process) of demo.sh with three steps a stage."""
    run = tmp_path_factory.mktemp("demo") / "run"
    os.makedirs(f"{run}-awq")  # as a kill in the middle of quantize.py leaves it
    env = {**os.environ, "RUN": str(run), "STEPS": "3", "TASKS": "1"}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    return run, subprocess.run(["bash", "demo.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def test_demo_runs_the_whole_chain_and_then_skips_it(demo, script):
    run, first = demo
    assert first.returncode == 0, first.stderr[-2000:]
    report = json.load(open(run / "report.json"))
    stages = ["general", "anneal", "long", "sft1", "sft2", "otpo"]
    assert list(report["loss"]) == stages[:5] and all(loss > 0 for loss in report["loss"].values())
    assert set(report["accuracy"]) == {"long", "sft1", "sft2", "otpo", "without text", "majority", "copy"}
    assert set(report["accuracy"]["sft2"]["by_language"]) == {"en", "zh", "id", "ms", "pt", "tl", "th", "vi"}
    assert set(report["thinking"]) == {"on", "off"} and report["bits_per_byte"]["long"]["th"] > 0
    assert {"loss.png", "load.png", "accuracy.png", "needles.png", "report.md", "metrics.jsonl"} <= set(os.listdir(run))
    assert all(os.path.basename(checkpoints(run, stage)[0]) == "step_3.pt" for stage in stages)
    assert "| all |" in first.stdout and "inherited from long step 3" in first.stdout
    assert checkpoints(f"{run}-awq", "otpo") and os.path.exists(f"{run}-awq/quantization.json")
    again = [script(f"{name}.py", "--run", run, "--steps", 3, "--resume") for name in ("train", "sft")]
    assert [result.stdout.count("already finished") for result in again] == [3, 2]


@pytest.mark.parametrize("newest, quantizes", (("run/reward/step_5.pt", False), ("run/otpo/step_3.pt", True)))
def test_the_demo_quantizes_what_is_newer_than_its_int4_run(tmp_path, newest, quantizes):
    """With a python that only says what it was asked: a reward model trained after the demo changes nothing, another otpo stage does."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    for age, name in enumerate(("run/otpo/step_3.pt", "run-awq/otpo/step_3.pt", newest)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (1000 + age, 1000 + age))
    env = {**os.environ, "RUN": str(tmp_path / "run"), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", "demo.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "evaluate.py" in result.stdout, result.stderr
    assert ("quantize.py" in result.stdout) == quantizes == (not (tmp_path / "run-awq").exists())  # it would refuse a folder that is there


def test_chat_in_the_terminal(demo, script):
    result = script("generate.py", "--run", demo[0], input="/think\nhi\n\nWhat is 2 + 2?\n")
    assert result.returncode == 0 and "thinking is on" in result.stdout and result.stdout.count("> ") >= 5


def test_a_users_own_tasks(demo, script, tmp_path):
    path = tmp_path / "mine.jsonl"
    task = {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "scorer": "number", "task": "sums/easy"}
    path.write_text(json.dumps(task))
    run = shutil.copytree(demo[0], tmp_path / "run")
    (run / "sft2" / "step_4.pt").write_bytes(b"")  # torn: the one before it is asked
    result = script("evaluate.py", "--run", run, "--tasks", path, "--samples", 2)
    assert result.returncode == 0 and "| sums/easy | 0.0 |" in result.stdout and "| mean@1 | majority@2 | pass@2 |" in result.stdout
    assert json.loads((run / "report.json").read_text())["accuracy"]["majority"]["overall"] == 1  # of these tasks, not of the embedded
    path.write_text("{")
    for command in (("evaluate.py", "--run", run, "--tasks", path), ("sft.py", "--run", run, "--data", path, "--stage", "drills")):
        result = script(*command)
        assert result.returncode == 2 and f"{path}:1: malformed JSON" in result.stderr


def test_checkpoints_are_listed(demo, script, tmp_path):
    result = script("checkpoint.py", "--run", demo[0])
    assert result.stdout.count("intact, seed 0") == 6 and result.stdout.endswith("last stage, in training order: otpo\n")
    run = shutil.copytree(demo[0], tmp_path / "run")
    (run / "anneal" / "step_3.pt").write_bytes(b"torn")
    result = script("checkpoint.py", "--run", run)
    assert result.returncode == 2 and result.stdout.count("intact, seed 0") == 5 and result.stderr.count("anneal/step_3.pt is torn") == 1


def test_the_shipped_checkpoints_script_goes_on_and_exports(demo, script, tmp_path):
    run = shutil.copytree(demo[0], tmp_path / "run")
    out = run / "export"
    for stage in ("sft2", "otpo"):  # the shipped one ends with sft2, after drills
        shutil.rmtree(run / stage)
    env = {**os.environ, "RUN": str(run), "STEPS": "3", "TASKS": "1"}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    first = subprocess.run(["bash", "pretrained.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert first.returncode == 0 and first.stdout.count("already finished") == 4, first.stderr[-2000:]
    assert all(f"inherited from {stage} step 3" in first.stdout for stage in ("sft1", "pairs", "drills", "sft2"))
    assert {"origin.json", "metrics.jsonl", "report.md", "tokenizer.tiktoken", "sft2"} <= set(os.listdir(out))
    exact, short = (load_latest(str(folder), "sft2") for folder in (run, out))
    assert short["optimizer"] is None and short["step"] == 3 and short["seed"] == 0
    for name, tensor in exact["model"].items():
        assert short["model"][name].dtype == torch.bfloat16 and torch.equal(short["model"][name], tensor.bfloat16())
    assert os.path.getsize(checkpoints(out, "sft2")[0]) < 0.2 * os.path.getsize(checkpoints(run, "sft2")[0])
    assert script("generate.py", "--run", out, "--prompt", "hi").returncode == 0
    again = script("checkpoint.py", "--run", run, "--export", out)
    assert again.returncode == 2 and "already holds a checkpoint" in again.stderr


def test_corpus_benchmark_reads_a_folder(demo, script, tmp_path):
    texts = [document["text"] for document in islice(market.documents("general", 5), 400)]
    (tmp_path / "th.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = script("-m", "benchmarks.corpus", "--data", tmp_path, "--run", demo[0])
    assert result.returncode == 0, result.stderr
    figures = json.load(open(demo[0] / "corpus.json"))["by_language"]["th"]
    assert 0 < figures["xz"] < 8 and 0 < figures["compass"] < 8 and "| th |" in result.stdout


def test_written_task_files_are_read_back(script, tmp_path):
    assert script("-m", "data.tasks", "--out", tmp_path).returncode == 0
    assert read_tasks(tmp_path / "test.jsonl") == tasks("test", 0, 10)
    assert read_tasks(tmp_path / "train.jsonl") == [{"scorer": "exact", **task} for task in training(0, 2000)]


def test_an_interrupted_script_says_so(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        cli.run(main)
    assert capsys.readouterr().err.endswith(": interrupted\n")


def test_another_tokenizer_is_refused(tmp_path, script, micro_tokenizer):
    micro_tokenizer.save(tmp_path)
    assert script("train.py", "--run", tmp_path, "--stage", "general", "--steps", "1").returncode == 0
    lines = (tmp_path / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"".join(lines[:-1]))
    result = script("train.py", "--run", tmp_path, "--stage", "anneal", "--steps", "1")
    assert result.returncode == 2 and "is not the one that general was trained with" in result.stderr


def test_every_script_explains_itself(script):
    names = [name for name in os.listdir(ROOT) if name.endswith(".py")]
    names = [name for name in names if "\nif __name__" in open(os.path.join(ROOT, name), encoding="utf-8").read()]
    with ThreadPoolExecutor(2) as pool:  # most of the time is the import of torch
        for name, result in zip(names, pool.map(lambda name: script(name, "--help"), names), strict=True):
            assert result.returncode == 0 and f"python {name}" in result.stdout, name
    assert "30.13B" in script("compass.py").stdout


@pytest.mark.parametrize("flag,value", [("seed", -1), ("seed", 2**63), ("steps", 0), ("samples", 0), ("gpus", -8)])
def test_numbers_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        extra = {} if flag in cli.FLAGS else {flag: dict(type=int, default=1)}
        cli.parse("", *({flag} - {*extra}), argv=[f"--{flag}", str(value)], **extra)
    assert f"--{flag} is {value}, must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("flag,value", [("data", ""), ("run", ""), ("stage", "*"), ("stage", "../x/sft2"), ("stage", "")])
def test_empty_values_and_stages_that_are_paths_are_refused(flag, value, capsys):
    """An unset variable of the shell is not the default; a stage is no pattern and leads out of no run."""
    with pytest.raises(SystemExit):
        cli.parse("", flag, argv=[f"--{flag}", value])
    assert f"--{flag} is {value!r}: " in capsys.readouterr().err
    assert cli.parse("", "stage", argv=["--stage", "reward/2"]).stage == "reward/2"


def test_scripts_of_one_process_refuse_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        cli.parse("", "run", argv=[])
    assert "runs in one process: start it without torchrun" in capsys.readouterr().err
    assert cli.parse("", "run", "parallel", argv=[]).parallel is None


@pytest.fixture(scope="module")
def worlds():
    return tasks("test", 0, 4), tasks("train", 0, 10)


def test_accuracy_by_hand(worlds):
    test = worlds[0][:4]
    result = accuracy(test, [test[0]["answer"], "wrong", test[2]["answer"], ""])
    assert result["overall"] == 0.5 and result["n"] == 4 and list(result["by_task"].values()) == [0.5]


def test_baselines(worlds):
    test, train = worlds
    assert accuracy(test, [task["answer"] for task in test])["overall"] == 1.0
    assert accuracy(test, majority_answers(test, train))["overall"] < 0.3
    assert accuracy(test, copied_answers(test))["overall"] < 0.3
    for task in test:
        if task["task"] == "product_info":
            assert task["answer"] not in without_text(task)["messages"][0]["content"]
