"""The notebooks run, top to bottom, keep to their rules, and say nothing that the code no longer does."""

import ast
import base64
import copy
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from nano_dmd import noise
from nano_dmd.denoiser import EDM
from nano_dmd.dmd_loss import dmd_loss
from nano_dmd.engine import config
from nano_dmd.engine.build import build
from nano_dmd.engine.draw import Batch
from nano_dmd.engine.files import UserError
from nano_dmd.networks import UNet
from nano_dmd.plot import COLOURS
from nano_dmd.teacher import Teacher
from toy import plots
from tutorials import answers, colab, copying, equations, healthy, run, slides

ROOT = Path(__file__).parents[1]
NUMBERS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14", "15", "16", "17", "18")


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
    assert broken(set_source("x = 1\n" * 21)) == ["a cell has 21 lines"]
    assert broken(set_source(f"x = {'1' * 107}")) == ["a line of code has 111 columns"]
    assert broken(set_source(f"x = {'1' * 106}")) == []
    assert broken(lambda cells: cells[0].update(source=cells[0].source + " word" * 500)) == [
        "614 words before the first picture, more than 500"]
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


def numbers_found_otherwise():
    """Answers to exercises by quadrature, search or simulation, where answers.py has a formula."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean = lambda v: (weights * v).sum() / weights.sum()                           # E over a standard normal variable
    grid = np.linspace(-30, 30, 600_001)
    normal = lambda m, v: np.exp(-(grid - m) ** 2 / (2 * v)) / np.sqrt(2 * np.pi * v)
    shrink = lambda a, sigma: a**2 / (a**2 + sigma**2)
    first = lambda values, good: next(v for v in values if good(v))
    fine = np.arange(0.2, 5, 1e-4)

    posterior = (normal(-1, 0.01) + normal(1, 0.01)) * np.exp(-(grid**2) / 0.5)
    p, q = normal(0, 1), normal(1, 1.5)
    levels = noise.sd_sigmas()
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    walk = [0.1, 0.1**2 / (0.1**2 + 0.25)]                                          # 03: a late critic and a generator
    highest, kappa, rho = 0.0, 0.25, 0.9
    for _ in range(60):
        a, f = walk
        f += 0.2 * (a**2 + 0.25) * (shrink(a, 0.5) - f)                             # .1 at a = .5, so that rho is .9
        walk = [a - 0.5 * a * (f - 0.5), f]
        highest = max(highest, walk[0])
    at_399, at_999 = levels[399].item(), levels[999].item()
    x = 0.0
    for _ in range(4000):
        x += 0.05 * ((0.8 + (x - 0.8) / 3) - x / 2)
    perfect = lambda S, s: brentq(lambda g: (g + s / S * (1 - g)) ** 2 * (1 + S**2) - 1 - s**2)
    g, V = perfect(14.6, 1), 1 + 14.6**2
    return {
        "00.E": np.sqrt((posterior * grid**2).sum() / posterior.sum()),
        "01.E": first(fine, lambda s: mean(np.cosh(nodes / np.sqrt(0.01 + s**2)) ** -2.0) < 0.01 + s**2),
        "02.E": fine[np.argmax(shrink(2, fine) - shrink(0.5, fine))],
        "03.E": first(range(1, 99), lambda n: (1 + rho**n - kappa * (1 - rho**n)) ** 2 >= 4 * rho**n),
        "04.E": fine[np.argmin(np.abs(fine**2 + 0.09 - 0.25))],
        "05.E": np.sqrt((0.36 + levels[249].item() ** 2) / (1 + levels[249].item() ** 2)),
        "06.E": first(fine, lambda a: a > 0.5 and shrink(0.5, 0.3) - 1 - 1.5 * (shrink(0.5, 0.3) - shrink(a, 0.3)) > 0),
        "08.3": brentq(lambda a: 3 * a - 2 * a * shrink((0.5 + a**2 / 2) ** 0.5, 1.5)
                       - 3 * (1 + shrink(0.5**0.5, 1.5) * (a - 1)) + 2 * a * shrink(1, 1.5), 0.1, 3),
        "08.E": np.abs(np.log(0.18215**2 * (1 / abar - 1))).argmin(),
        "07.E": np.dot(np.linalg.solve([[1, 1 / 5000], [1, 1 / 20_000]], [9.3, 6.1]), [1, 1 / 50_000]),
        "09.2": 100 * NormalDist().cdf(-np.sqrt(5 / 2)),
        "09.3": (grid * 20 * normal(0, 1) * np.cumsum(normal(0, 1) * 1e-4) ** 19).sum() * 1e-4,
        "09.E": first(range(1, 99), lambda n: NormalDist().cdf(0.5 * np.sqrt(n / 2)) >= 0.95),
        "10.2": levels[999].item() / levels[399].item(),
        "10.E": sum([78 * 2048 * 2] * 1_000_000) / 1e9,
        "11.E": noise.draw_sigma("flow(0.5,0.500001)", 1, "cpu").item() * 3,
        "12.E2": first(fine, lambda v: 2 * -(200**2 - 100**2) / (2 * v) + (200**2 - 100**2) / 2 > 0),
        "12.E1": 1000 / ((q * (p / q) ** 2).sum() * 1e-4),
        "13.E1": x,
        "13.E2": brentq(lambda w: w - (7 - 1), 0, 10),
        "14.E1": brentq(lambda share: 0.75 * share + 0.25 * 0.5 - 0.8),
        "14.E2": brentq(lambda a: a * 1 + (1 - a) * 0.5 - 0.8),
        "15.E1": g * (g + (1 - g) / 14.6) * V,
        "15.E2": brentq(lambda s: 2 * s**2 - 4 * (s**2 - 1), 1.01, 4),
        "16.E": brentq(lambda s: mean(((s * nodes - 0.73 * 28) ** 2 - (s * nodes) ** 2) / (2 * s**2 + 0.02)) - np.log(19), 1, 30),
        "17.E": np.sqrt(mean((10 - 10 * shrink(0.5, 10)) ** 2 * nodes**2 + ((1 - shrink(0.5, 10)) * 0.5) ** 2)
                        / mean((10 * shrink(0.5, 10) * nodes) ** 2 + ((1 - shrink(0.5, 10)) * 0.5) ** 2)),
        "18.3": np.hypot(1, at_399) - at_399 * (np.hypot(1, at_999) - 1) / at_999,
        "18.E": (2 * 859_520_964 + 10 * 134.5e6 + 6 * 67.3e6) / 2**30,             # teacher; LoRA of 128; LoRA of 64
        "03.1": highest,
    }


def brentq(f, low=1e-6, high=1.0):
    """The root of f between low and high, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) * f(low) > 0 else (low, middle)
    return low


def test_answers_of_the_exercises():
    """answers.py's numbers, found in another way."""
    found = numbers_found_otherwise()
    assert {key for key in answers.QUESTIONS if "E" in key} <= set(found)
    for key, number in found.items():
        assert answers.reply(key, number) == f"{key}: right.", (key, number)
        right = answers.QUESTIONS[key].right
        assert abs(number / right - 1) < max(answers.QUESTIONS[key].rtol / 2, 1e-3), (key, number, right)


@pytest.mark.parametrize("key", answers.QUESTIONS)
def test_a_wrong_answer_has_its_own_reply(key):
    """Right is right, None is no answer, each slip has its sentence, and anything else the hint."""
    question = answers.QUESTIONS[key]
    assert answers.reply(key, question.right) == f"{key}: right."
    assert "not answered yet" in answers.reply(key, None)
    for slip, said in question.slips.items():
        assert answers.reply(key, slip) == f"{key}: not yet. {said}"
    assert answers.reply(key, -77.7) == f"{key}: not yet. {question.hint}"
    if not isinstance(question.right, str):
        assert answers.reply(key, torch.tensor(float(question.right))) == f"{key}: right."


@pytest.mark.parametrize("key, typed", [
    ("00.2", "The smallest."), ("01.1", "none"), ("01.3", "unchanged"), ("06.1", "Not at all"), ("08.1", "4.9 %"), ("00.3", "4"),
    ("11.2", 0.01)])
def test_other_ways_to_type_the_right_answer(key, typed):
    assert answers.reply(key, typed) == f"{key}: right."


def test_a_word_where_a_number_is_asked_for():
    assert answers.reply("00.3", "smaller").startswith("00.3: not yet. Here a number is asked for. ")
    assert "Here a number" not in answers.reply("00.3", 3) and "Here a number" not in answers.reply("00.4", "never")


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_every_question_is_asked_once_and_no_answer_shown(path):
    """Blanks are None, and check() gets a key and a blank, so that no cell of a question holds its answer."""
    source = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    asked = re.findall(r'^check\("(\S+)", (?:guess_\d|answer(?:_\d)?)\)$', source, re.M)
    assert sorted(asked) == sorted(k for k in answers.QUESTIONS if k.startswith(path.name[:2]))
    assert len(asked) == source.count("check(") and len(asked) >= 4
    assert not re.search(r"^(guess_\d|answer(_\d)?) = (?!None)", source, re.M)


# "**Prediction 2**: the mean is", "(Prediction 1: 4 / 5.)", "this is **prediction 3**"; not "Prediction 1's student"
TOLD = re.compile(r"^\W*Predictions? (\d)(?: and (\d))?\b(?!')|\([Pp]rediction (\d)[:)]|\*\*prediction (\d)\*\*", re.M)


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_a_check_stands_before_its_answer(path):
    """Each prediction is checked before the text that tells it, and the exercise before its folded solution."""
    cells = nbformat.read(path, as_version=4).cells
    code, prose = ([(i, c.source) for i, c in enumerate(cells) if c.cell_type == kind] for kind in ("code", "markdown"))
    checked = {key: i for i, text in code for key in re.findall(r'^check\("(\S+)"', text, re.M)}
    told = {f"{path.name[:2]}.{k}": i for i, text in reversed(prose) for found in TOLD.findall(text) for k in found if k}
    solution = next(i for i, text in prose if "<summary>Solution" in text)
    assert set() < set(told) <= {key for key in checked if "E" not in key}
    assert [key for key, i in checked.items() if i > told.get(key, solution)] == []


def test_one_code_of_colours():
    """Notebooks, explorer and figures of runs use the colours of toy/plots.py; any other colour in a notebook is a grey."""
    names = dict(real=plots.REAL, fake=plots.FAKE, first=plots.TEACHER, move=plots.GRADIENT)
    page, script = ((ROOT / "explorer" / name).read_text() for name in ("index.html", "draw.js"))
    assert dict(re.findall(r"--(real|fake|first|move): (#\w+);", page)) == names
    found = dict(re.findall(r'(REAL|FAKE|FIRST|GRADIENT) = "(#\w+)"', script))
    assert found == dict(REAL=plots.REAL, FAKE=plots.FAKE, FIRST=plots.TEACHER, GRADIENT=plots.GRADIENT)
    assert COLOURS[:3] == (plots.REAL, plots.FAKE, plots.TEACHER)
    for path in (ROOT / "docs").glob("healthy*.png"):             # few colours: the student's and the teacher's among them
        with Image.open(path) as image:
            inks = torch.tensor(image.getpalette()).view(-1, 3)
        wanted = torch.tensor([[int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in (plots.FAKE, plots.TEACHER)])
        assert (inks[:, None] - wanted).abs().amax(-1).amin(0).max() <= 2, path.name
    for path in run.NOTEBOOKS:
        source = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        assert strange(source) == [], path.name
    assert strange('plot(x, "C0", c="red"), hist(color="tab:blue"), "#112233"') == ["C0", "red", "tab:blue", "#112233"]
    assert strange('color="black", color="#999999", "grey", c="0.5"') == []


def strange(source):
    """Colours in code that are neither names of ours nor a grey."""
    found = re.findall(r'\b(?:c|colou?r)="([^"]+)"|"(C\d|tab:\w+|#[0-9A-Fa-f]{6})"', source)
    return [c for c in map("".join, found) if not re.fullmatch(r"black|white|gr[ae]y|[\d.]+|#(..)\1\1", c)]


def small_notebook():
    """One cell of each kind, as if it had been executed."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    def shown(kind, data):
        return new_output("display_data", {kind: data})

    paragraph = " ".join(["word"] * 40)
    return new_notebook(cells=[
        new_markdown_cell(f"# Title\n\nabout it\n\n## The maths\n\n{paragraph}\n\n$$x = y$$\n\n{paragraph}"),
        new_code_cell("guess_1 = None"),
        new_code_cell("draw()", outputs=[shown("image/png", "aGVsbG8="), shown("text/plain", "<Figure>")]),
        new_code_cell("movie()", outputs=[shown("text/html", '<img alt="animation">')]),
        new_code_cell('check("00.1", guess_1)'),
        new_markdown_cell("<details><summary>A</summary>\n\n42\n</details>\n\n<details><summary>B</summary>\n\n$a<b$ 43\n"
                          "</details>\n\nNext: 01.")])


def test_slides():
    """Headings begin slides, text is cut between paragraphs, figures stand alone, solutions are the speaker's."""
    made = [(cell.metadata["slideshow"]["slide_type"], cell.source) for cell in slides.deck(small_notebook()).cells]
    data = base64.b64encode((ROOT / "docs/ttur.png").read_bytes()).decode()
    assert slides.embedded("a ![b c](../docs/ttur.png) d") == f'a <img alt="b c" src="data:image/png;base64,{data}"> d'
    paragraph = " ".join(["word"] * 40)
    assert made == [("slide", "# Title\n\nabout it"), ("slide", f"## The maths\n\n{paragraph}\n\n$$x = y$$"),
                    ("subslide", paragraph), ("subslide", '<img src="data:image/png;base64,aGVsbG8=">'),
                    ("subslide", '<img alt="animation">'), ("notes", made[-2][1]), ("subslide", "Next: 01.")]
    assert made[-2][1].split() == ["A", "42", "B", "$a<b$", "43"]
    with_code = [cell.source for cell in slides.deck(small_notebook(), code=True).cells]
    assert len(with_code) == len(made) + 2 and "draw()" in with_code and "guess_1 = None" not in with_code


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)
def test_slides_hold_what_the_notebook_holds(path):
    """Every figure has a slide, and no slide of text has more words than a projector shows."""
    notebook = nbformat.read(path, as_version=4)
    cells = slides.deck(notebook).cells
    figures = sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert sum(c.source.startswith('<img src="data:image/png') for c in cells) == figures > 0
    words = set(" ".join(c.source for c in cells).split())
    told = " ".join(re.sub(r"</?(details|summary)>|!\[.*?\]\(.*?\)", " ", c.source)
                    for c in notebook.cells if c.cell_type == "markdown")
    assert set(told.split()) <= words
    shown = [c.source for c in cells if c.metadata["slideshow"]["slide_type"] != "notes" and "<img" not in c.source]
    assert not any(".png)" in c.source for c in cells)            # pictures of files are part of the page
    assert all(len(text.split()) < 200 for text in shown) and np.median([len(text.split()) for text in shown]) < 90


def test_slides_say_how_long_they_take(tmp_path, monkeypatch, capsys):
    """Before the first notebook is executed: half a minute of silence looked like a hang."""
    pytest.importorskip("nbconvert")
    def execute(path):
        assert "executing 2 notebooks: about half a minute each" in capsys.readouterr().out
        raise UserError("stop")
    monkeypatch.setattr(slides, "execute", execute)
    with pytest.raises(UserError, match="stop"):
        slides.main(["02", "03", "--to", str(tmp_path)])


@pytest.mark.slow
def test_executing_is_silent(tmp_path, capfd):
    """The kernel's warning about unencrypted traffic within one machine is not the reader's."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tmp_path / "one.ipynb")
    run.execute(tmp_path / "one.ipynb")
    assert capfd.readouterr().err == ""


def test_page_of_slides():
    """nbconvert's page holds the pictures, our style, and the scripts of a folder where one is given."""
    pytest.importorskip("nbconvert")
    page = slides.html(slides.deck(small_notebook()), "name", "modules")
    assert page.count("<section") >= 6 and "aGVsbG8=" in page and slides.STYLE in page
    assert 'src="modules/requirejs/require.js"' in page and "modules/reveal.js" in page
    assert re.search(r"linebreaks: {\s*automatic: false", page)    # else formulas in tables of hidden slides fall apart
    assert not re.findall(r"""(?:src|href)="https?://[^"]*|from ['"]https?:""", page)


def test_links_to_colab():
    """Written once, replaced by another address, and the first cell is Python that installs nothing here."""
    notebook = nbformat.read(run.NOTEBOOKS[1], as_version=4)
    count, title = len(notebook.cells), notebook.cells[0].source.splitlines()[0]
    for repo in ("someone/fork", "other/name"):
        colab.link(notebook, "01.ipynb", repo)
        head, first = notebook.cells[0].source, notebook.cells[1]
        assert len(notebook.cells) == count + 1 and head.startswith(title) and head.count("Open in Colab") == 1
        assert f"/github/{repo}/blob/main/tutorials/01.ipynb" in head and f"git+https://github.com/{repo}" in first.source
    nbformat.validate(notebook)
    subprocess.run([sys.executable, "-c", first.source.replace("subprocess.run", "exit")], check=True, cwd=ROOT)
    with pytest.raises(UserError, match="expected OWNER/NAME, got 'https://x'"):
        colab.main(["https://x"])


def test_commands_of_the_tutorials(tmp_path, monkeypatch, capsys):
    """slides and colab from the command line, on one small notebook."""
    pytest.importorskip("nbconvert")
    path = tmp_path / "77_small.ipynb"
    nbformat.write(small_notebook(), path)
    for module in (run, colab):
        monkeypatch.setattr(module, "NOTEBOOKS", [path])
    monkeypatch.setattr(slides, "execute", lambda path: nbformat.read(path, as_version=4))
    monkeypatch.setenv("NANO_DMD_DPI", "72")
    slides.main(["77", "--to", str(tmp_path / "slides")])
    assert "aGVsbG8=" in (tmp_path / "slides" / "77_small.html").read_text() and slides.os.environ["NANO_DMD_DPI"] == "200"
    colab.main(["a/b"])
    assert "github/a/b/blob" in path.read_text() and "1 notebooks point to a/b" in capsys.readouterr().out


def test_sick_runs_differ_in_their_illness_alone():
    """Each sick run has the good ones' settings but for what its row names."""
    def settings(flags):
        p = config.parser("train", "")
        config.add_config_flags(p)
        return vars(config.resolve(vars(p.parse_args(flags.split()))))

    good = settings(f"--preset digits {healthy.GOOD}")
    for flags in healthy.SICK.values():
        changed = {word[2:] for word in flags.split() if word.startswith("--")}
        if "method" not in changed:
            sick = settings(f"--preset digits {healthy.GOOD} {flags}")
            assert {name for name in good if good[name] != sick[name]} <= changed | {"out"}, flags


def test_sick_losses():
    """climbing is DMD's loss with the other sign; shaky has dropout while it asks the fake score, and none afterwards."""
    torch.manual_seed(0)
    cfg = config.resolve(dict(preset="digits", method="dmd2", bf16=False))
    nets, _ = build(cfg, Teacher("images", EDM(UNet()), (1, 8, 8), 10, 0.5, "", EDM(UNet())), torch.device("cpu"))
    for net in (nets.fake, nets.real.denoiser):
        for p in net.parameters():
            p.data = 0.1 * torch.randn_like(p)
    x, batch = torch.randn(16, 1, 8, 8), lambda: Batch(torch.randn(1, 16, 1, 8, 8), torch.arange(16) % 10)

    def gradient(loss):
        torch.manual_seed(1)                                      # the same noise for each loss
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, nets, batch(), cfg).mean(), leaf)[0]

    right, sick = gradient(dmd_loss), gradient(healthy.shaky_loss)
    assert right.abs().sum() > 0 and torch.equal(gradient(healthy.climbing_loss), -right)
    assert 0.1 < torch.cosine_similarity(right.flatten(), sick.flatten(), 0) < 0.999
    assert torch.equal(gradient(dmd_loss), right)                 # the hooks are gone


def test_figure_of_health(tmp_path, capsys):
    """The rows of a comparison, or sick runs over a band; a mistake is one sentence before anything is trained."""
    line = {"step": 10, "mesm": [0.1] * 5, "fake_loss": [0.2] * 5, "grad": {"dmd_loss": 1.0}, "x_std": 0.7, "spread": 0.4}
    log = [line | {"teacher": {"x_std": 0.75}}, line | {"step": 20}]
    assert len(healthy.draw({"a": [log], "b": [[line, line]]}, [log, log]).axes) == 2 * len(healthy.SHOWN)
    fig = healthy.draw({"a": [log, log], "b": [[line | {"x_std": 7.0, "mesm": [0] * 5}]]})         # no band: seeds, one scale
    assert [t.get_text() for ax in fig.axes for t in ax.texts] == ["no critic"] and fig.axes[5].texts
    assert len(fig.axes[0].lines) == 2 and fig.axes[3].get_ylim() == fig.axes[8].get_ylim() and fig.axes[3].get_ylim()[1] > 7
    for arguments, sentence in ((["x.txt"], "must end in .png"), (["x.png", "--runs", str(tmp_path)], "no runs in")):
        with pytest.raises(UserError, match=sentence):
            healthy.main(arguments)
