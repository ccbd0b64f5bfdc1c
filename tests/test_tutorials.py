"""The notebooks run, top to bottom, keep to their rules, and say nothing that the code no longer does."""

import ast
import copy
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest

from nano_dmd.engine.files import UserError
from tutorials import copying, equations, run

ROOT = Path(__file__).parents[1]
NUMBERS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14", "15")


def test_none_is_missing():
    assert tuple(path.name[:2] for path in run.NOTEBOOKS) == NUMBERS


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_keeps_the_rules(path):
    assert run.complaints(nbformat.read(path, as_version=4), path.stat().st_size) == []


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_names_in_notebooks_exist(path):
    """Every name that a cell imports from this repository is there, and every cell is Python: found without running it."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("nano_dmd", "toy", "tutorials"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name


@pytest.mark.slow
@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    """In a kernel of its own; a failing assertion or a stale import is a failing test.  The file is not touched."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = path.read_bytes()
    executed = run.execute(path)
    assert [o for c in executed.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"] == []
    assert path.read_bytes() == before


def test_rules_are_seen_to_be_broken():
    """Each rule complains about a notebook that breaks it and no other."""
    good = nbformat.read(run.NOTEBOOKS[0], as_version=4)
    code = next(i for i, c in enumerate(good.cells) if c.cell_type == "code")

    def broken(edit, size=1000):
        notebook = copy.deepcopy(good)
        edit(notebook.cells)
        return [c.split(":")[0] for c in run.complaints(notebook, size)]

    def set_source(text):
        return lambda cells: cells[code].update(source=text)

    def without_pictures(cells):
        for c in cells:
            if c.cell_type == "code":
                c.outputs = []

    assert broken(lambda cells: None) == []
    assert broken(lambda cells: None, size=600_000) == ["600 KB, more than 500"]
    assert broken(set_source("x = 1\n" * 16)) == ["a cell has 16 lines"]
    assert broken(set_source("%matplotlib inline")) == ["magic or shell command"]
    assert broken(without_pictures) == ["no picture in the outputs"]
    assert broken(lambda cells: cells[code].update(execution_count=None)) == ["a cell was never executed"]
    for word, said in (("## Exercise", "no heading 'Exercise'"), ("assert", "nothing is asserted")):
        assert broken(lambda cells: [c.update(source=c.source.replace(word, "")) for c in cells]) == [said]


def test_a_failing_cell_fails(tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")]), path)
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run.execute(path)


def test_unknown_notebook():
    with pytest.raises(UserError, match="no notebook starts with 77"):
        run.main(["77"])


def test_equation_map_is_up_to_date():
    """python -m tutorials.equations would change nothing: every file:line of the map is where that name is defined."""
    text = equations.INDEX.read_text()
    assert equations.updated(text) == text
    assert len(re.findall(equations.ENTRY, text)) >= 30


def test_equation_map_follows_the_code():
    """A line that moved is corrected; a name that is gone is an error."""
    row = "[dmd_loss.py:1](../nano_dmd/dmd_loss.py#L1) `dmd_gradient`"
    line = (ROOT / "nano_dmd" / "dmd_loss.py").read_text().splitlines().index("def dmd_gradient(x, d_real, d_fake):") + 1
    assert equations.updated(row) == f"[dmd_loss.py:{line}](../nano_dmd/dmd_loss.py#L{line}) `dmd_gradient`"
    with pytest.raises(UserError, match="no_such_name"):
        equations.updated(row.replace("dmd_gradient", "no_such_name"))


def test_index_lists_every_notebook():
    text = equations.INDEX.read_text()
    for path in run.NOTEBOOKS:
        assert f"]({path.name})" in text, path.name
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (equations.INDEX.parent / target).exists(), target


def test_figure_of_what_students_copy(tmp_path, capsys):
    """tutorials.copying: the first row of a method counts, references do not; a mistake is one sentence."""
    rows = {"dmd --steps 9": {"pairing": [0.9, 0.01], "sw2": [1.0, 0.1]}, "dmd": {"pairing": [0.1, 0.0]},
            "sid": {"pairing": [0.8, 0.02]}, "teacher": {"sw2": [1.0, 0.0]}}
    (tmp_path / "compare.json").write_text(json.dumps(rows))
    assert copying.pairings(tmp_path) == {"dmd": [0.9, 0.01], "sid": [0.8, 0.02]}
    copying.main([str(tmp_path / "a.png"), f"ring, 2={tmp_path}", f"again, 2={tmp_path}"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    for arguments, sentence in (([tmp_path / "a.txt", f"a={tmp_path}"], "must end in .png"),
                                ([tmp_path / "a.png", "ring"], "expected NAME=FOLDER, got 'ring'")):
        with pytest.raises(UserError, match=sentence):
            copying.main([str(a) for a in arguments])
    (tmp_path / "compare.json").write_text(json.dumps({"teacher": {"sw2": [1.0, 0.0]}}))
    with pytest.raises(UserError, match="has no pairing"):
        copying.pairings(tmp_path)
