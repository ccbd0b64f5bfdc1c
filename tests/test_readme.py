"""README and docs are tests: the listing is the source, the example prints what it says, commands parse, links lead somewhere."""

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest

from nano_dmd import methods, train

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "nano_dmd" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "log.md"                                    # its commands are those of their day


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_readme_is_short():
    text = README.read_text()
    assert len(text.encode()) <= 8 * 1024 and len(text.split()) <= 1200


def test_the_listing_is_the_source():
    """The first five METHODS and train_step stand in README exactly as in methods.py, docstring apart; the others by name."""
    source = inspect.getsource(methods)
    rows = source[source.index("METHODS = {"):source.index("METHODS |=")].strip()
    step = re.sub(r' +""".*?"""\n', "", inspect.getsource(methods.train_step), count=1, flags=re.S).strip()
    assert blocks(README, "python")[0].strip() == f"{rows}\n\n\n{step}"


def test_the_example_prints_what_it_says():
    """Numbers, and the directions its comment names: descending g moves (.4, 0) out and (0, -.95) in."""
    page, out, names = ROOT / "docs" / "vocabulary.md", io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(blocks(page, "python")[0], names)
    assert out.getvalue() == blocks(page, "text")[0]
    radius, moved = (v.norm(dim=1) for v in (names["x"], names["x"] - 1e-3 * names["g"]))
    assert moved[0] > radius[0] and moved[1] < radius[1]


def commands(page):
    """Lines of the bash blocks without comments; $C is replaced where C="..." stands above it."""
    found = []
    for block in blocks(page, "bash"):
        values = {}
        for line in block.splitlines():
            line = line.split("  #")[0].strip()
            if setting := re.fullmatch(r'([A-Z])="(.*)"', line):
                values[setting[1]] = setting[2]
            elif line:
                found.append(re.sub(r"\$([A-Z])\b", lambda m: values[m[1]], line))
    return found


def test_the_two_commands_come_first():
    assert commands(README)[:2] == ["pip install -e . && python -m nano_dmd.train", 'pip install -e ".[test]" && pytest']


EVERY = [(page.name, c) for page in PAGES if page != LOG for c in commands(page)]
TRAIN = [c for _, c in EVERY if "-m nano_dmd.train --preset" in c]


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_resolve(command, capsys):
    """Every training command is accepted (--dry-run stops before any work)."""
    train.main([*shlex.split(command.partition("-m nano_dmd.train ")[2]), "--dry-run"])
    assert "method" in capsys.readouterr().out


@pytest.mark.parametrize("name, command", EVERY)
def test_commands_name_modules_that_exist(name, command):
    """python -m X in a code block: X has a __main__ guard or is a package with __main__.py."""
    for module in re.findall(r"-m ((?:nano_dmd|toy|tutorials)[\w.]*)", command):
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__":' in file.read_text(), module


def rows_of_comparisons():
    """(preset, row) of every comparison in a code block."""
    for _, command in EVERY:
        if "-m nano_dmd.compare" in command:
            words = shlex.split(command.partition("-m nano_dmd.compare ")[2])
            flags = [i for i, w in enumerate(words) if w.startswith("--")]
            rows = [w for i, w in enumerate(words) if i not in flags and i - 1 not in flags]
            preset = words[words.index("--preset") + 1] if "--preset" in words else "digits"
            yield from ((preset, row) for row in rows)


@pytest.mark.parametrize("preset, row", list(rows_of_comparisons()))
def test_rows_of_comparisons_resolve(preset, row):
    from nano_dmd.compare import parse_row
    from nano_dmd.engine.config import resolve

    resolve({k: v for k, v in parse_row(preset, row).items() if v != "FOLDER"})


PRESET = r"--preset ([a-z][\w-]*)|`((?:toy|digits|mnist|cifar10|imagenet64|ffhq64|afhqv2-64|sd15)[\w-]*)`"


@pytest.mark.parametrize("page", [p for p in PAGES if p != LOG], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_presets_exist(page):
    """Also in tables and sentences."""
    names = {a or b for a, b in re.findall(PRESET, page.read_text())}
    assert names <= set(train.PRESETS), names - set(train.PRESETS)


def anchor(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page):
    for target, _, name in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if name:
            assert name in [anchor(h) for h in re.findall(r"(?m)^#+ (.*)$", path.read_text())], name


def test_the_log_has_an_index():
    """Every entry is named on top."""
    text = LOG.read_text()
    for heading in re.findall(r"(?m)^## (.*)$", text):
        assert f"](#{anchor(heading)}): " in text, heading
