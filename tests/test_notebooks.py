"""Every notebook, executed from top to bottom as Jupyter would; and what every notebook has to have.

    python tests/test_notebooks.py              # executes all of them in full and writes their outputs back
    python tests/test_notebooks.py otpo tour    # only these
"""

import ast
import glob
import os
import re
import sys
import textwrap

import nbclient
import nbformat
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOTEBOOKS = sorted(glob.glob(os.path.join(ROOT, "notebooks", "*.ipynb")))
MOST_BYTES = 3_000_000  # of all notebooks with their pictures


def name_of(path):
    return os.path.basename(path).removesuffix(".ipynb")


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    """The Python of its code cells, without Jupyter's magics."""
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.split("\n")]
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def functions(tree):
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def execute(notebook):
    """Run all cells with the folder of the notebooks as the working directory; an error in a cell is raised with its traceback."""
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": os.path.join(ROOT, "notebooks")}}
    ).execute()  # fmt: skip


def images(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def refusal(exercise, solution, check):
    """A cell that gives an exercise wrong answers: the solution's cell, which fills in for None, lets them be, the check refuses them."""
    tries, example = [], re.findall(r"for example (.+)", exercise.source)  # wrong, but of the right type: the check itself says no
    for wrong, error in (("-7", "Exception"), ("0", "Exception"), *((answer, "AssertionError") for answer in example)):
        answer = exercise.source.partition("#")[0].replace("None", wrong)
        judged = textwrap.indent(f"{solution.source}\n{check.source}", "    ")
        tries.append(f"{answer}\ntry:\n{judged}\nexcept {error}:\n    pass\nelse:\n    raise ValueError({answer!r} + 'was accepted')")
    return nbformat.v4.new_code_cell("\n".join([*tries, exercise.source]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_runs_from_top_to_bottom_and_refuses_wrong_answers(path, monkeypatch):
    monkeypatch.setenv("QUICK", "1")  # notebooks that train read it: fewer steps, smaller data
    stored, fresh = read(path), read(path)
    cells, fresh.cells = fresh.cells, []
    for i, cell in enumerate(cells):
        if cell.cell_type == "code":
            cell.outputs = []
        fresh.cells.append(cell)
        if "exercise" in cell.metadata.get("tags", []):
            fresh.cells.append(refusal(cell, cells[i + 1], cells[i + 2]))
    execute(fresh)
    assert images(fresh) == images(stored), "other pictures than the stored ones: python tests/test_notebooks.py writes them"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_has_pictures_and_exercises_and_no_copy_of_a_script(path):
    notebook = read(path)
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert images(notebook) >= 3
    assert tags == ["exercise", "solution", "check"] * (len(tags) // 3) and 2 <= len(tags) // 3 <= 4
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []):
            assert cell.metadata["jupyter"]["source_hidden"]
        if cell.cell_type == "code":
            assert cell.execution_count and not any(output.output_type == "error" for output in cell.outputs)
    for script in [path for folder in ("", "data", "benchmarks") for path in glob.glob(os.path.join(ROOT, folder, "*.py"))]:
        with open(script, encoding="utf-8") as file:
            copied = functions(code_of(notebook)) & functions(ast.parse(file.read()))
        assert not copied, f"{copied} of {os.path.basename(script)}: import it"


def test_all_are_small():
    assert sum(map(os.path.getsize, NOTEBOOKS)) < MOST_BYTES


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if len(sys.argv) < 2 or name_of(path) in sys.argv[1:]:
            notebook = read(path)
            execute(notebook)
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times, which change with every run
                if cell.cell_type == "code":  # progress bars are for the one who waits
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            nbformat.write(notebook, path)
            print(f"{path}: {os.path.getsize(path) / 1000:.0f} kB, {images(notebook)} pictures")
