"""RESULTS.md says what benchmarks/results says, and `python -m benchmarks` knows every benchmark and names what it leaves out."""

import glob
import importlib
import os
import re

import pytest
from conftest import ROOT

import cli
from benchmarks.__main__ import BENCHMARKS, NAMES, PAGE, REPORTS, figures, rewritten, run, tables_of


@pytest.fixture
def page():
    with open(PAGE, encoding="utf-8") as file:
        return file.read()


def test_results_are_what_draw_would_write(page):
    drawn = page
    for name in (*NAMES, *REPORTS):
        results = figures(name)
        drawn = drawn if results is None else rewritten(drawn, name, tables_of(name, results))
    assert drawn == page, "python -m benchmarks --draw"


def test_the_readme_counts_the_lines():
    def lines(path):
        with open(path, encoding="utf-8") as file:
            return sum(1 for _ in file)

    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        said = {name: int(count) for name, count in re.findall(r"^\| (\w+\.py|data/) \| (\d+) \|", file.read(), re.M)}
    scripts = glob.glob(os.path.join(ROOT, "*.py"))
    counted = {os.path.basename(path): lines(path) for path in scripts}
    assert said == {**counted, "data/": sum(map(lines, glob.glob(os.path.join(ROOT, "data", "*.py"))))}


def test_every_place_belongs_to_a_table(page):
    places = re.findall(r"<!-- (\w+):(\w+) -->", page)
    assert len(places) == len(set(places)) > 30
    for name, title in places:
        assert title in tables_of(name, figures(name)), f"{name}:{title}"


def test_a_table_without_a_place_is_named():
    with pytest.raises(cli.InputError, match="has no <!-- moe:step --> with <!-- /moe:step --> below it"):
        rewritten("<!-- /moe:step -->\n<!-- moe:step -->\n", "moe", {"step": ""})


def test_every_script_is_listed_with_arguments_that_it_understands(monkeypatch):
    scripts = {name.removesuffix(".py") for name in os.listdir(os.path.join(ROOT, "benchmarks")) if name.endswith(".py")}
    assert scripts - {"__init__", "__main__"} == set(NAMES)
    understood, parse = [], cli.parse

    def only_parse(doc, *names, **extra):
        understood.append(parse(doc, *names, argv=words, **extra))
        raise StopIteration

    monkeypatch.setattr(cli, "parse", only_parse)
    for name, arguments, length in BENCHMARKS:
        words = arguments.split()
        with pytest.raises(StopIteration):
            importlib.import_module(f"benchmarks.{name}").main()
        assert length in ("short", "long", "by name")
    assert len(understood) == len(BENCHMARKS)


def test_what_is_left_out_and_what_fails_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("chain", "--data DATA", "long"), ("selection", "--run runs/demo", "long"), ("nothing", "", "short")]
    assert run(rows, {"DATA": None}) == ["nothing"]
    output, bar = capsys.readouterr()
    assert "chain is left out: it needs --data, see python -m benchmarks.chain --help" in output
    assert "selection is left out: it needs runs/demo" in output and "chain --data DATA: " in bar and "3/3" in bar


def test_unknown_names_are_refused(script):
    result = script("-m", "benchmarks", "--draw", "mo", "moe")
    assert result.returncode == 2 and result.stderr.startswith("__main__.py: error: no benchmark mo; there are drills, vocabulary, ")
    assert result.stderr.count("\n") == 1
