"""The README is a test: its listing is the source, its example prints what it says, its commands parse."""

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest

from nano_dmd import methods, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_listing_is_the_source():
    """METHODS and train_step stand in README exactly as in train.py, docstring apart."""
    listing = blocks("python")[0]
    source = inspect.getsource(train)
    methods = source[source.index("METHODS = {"):source.index("def train_step")].strip()
    step = re.sub(r' +""".*?"""\n', "", inspect.getsource(methods.train_step), count=1, flags=re.S).strip()
    assert listing.strip() == f"{methods}\n\n{step}"


def test_the_example_prints_what_it_says():
    """Numbers, and the directions its comment names: descending g moves (.4, 0) out and (0, -.95) in."""
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(blocks("python")[1], names)
    assert out.getvalue() == blocks("text")[0]
    radius, moved = (v.norm(dim=1) for v in (names["x"], names["x"] - 1e-3 * names["g"]))
    assert moved[0] > radius[0] and moved[1] < radius[1]


def commands():
    return [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_the_two_commands_come_first():
    assert commands()[:2] == ["pip install -e . && python -m nano_dmd.train", 'pip install -e ".[test]" && pytest']


TRAIN = [c for c in commands() if c.startswith("python -m nano_dmd.train --")]


@pytest.mark.parametrize("command", [c for c in TRAIN if "--resume" not in c and "--help" not in c])
def test_train_commands_resolve(command, capsys):
    """Every training command of the README is accepted (--dry-run stops before any work)."""
    train.main([*shlex.split(command)[3:], "--dry-run"])
    assert "method" in capsys.readouterr().out


def test_commands_name_modules_that_exist():
    """python -m X in a code block: X has a __main__ guard or is a package with __main__.py."""
    for command in commands():
        for module in re.findall(r"python -m ([\w.]+)", command):
            path = ROOT / module.replace(".", "/")
            file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert 'if __name__ == "__main__":' in file.read_text(), module


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
