"""The promises about the code itself: what imports what, how long things are, and that importing does nothing.

Without these a reader loses the one-directional reading path, and a user of one loss pays for plots and hubs.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import nano_dmd

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "nano_dmd").glob("*.py"), *(ROOT / "toy").glob("*.py")])
CONCEPTS = ["noise", "networks", "teacher", "real_score", "fake_score", "dmd_loss", "gan", "sid_loss", "generator",
            "train"]
LOSSES = ["dmd_loss", "gan", "sid_loss"]
INFRASTRUCTURE = {"schema", "checkpoint", "cache", "data", "lora", "zoo", "parallel"}


def imported(path):
    """Names of the nano_dmd modules that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.partition("nano_dmd.")[2] for a in node.names if a.name.startswith("nano_dmd.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "nano_dmd":
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nano_dmd."):
            names.add(node.module.split(".")[1])
    return names


def functions(path):
    """(name, lines) of every function and method of a file, docstrings and nested functions included."""
    tree = ast.parse(path.read_text())
    return [(f"{path.stem}.{n.name}", n.end_lineno - n.lineno + 1) for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef)]


def concept(name):
    return ROOT / "nano_dmd" / f"{name}.py"


def test_reading_order_is_declared():
    order = nano_dmd.__doc__.split("Reading order:")[1].strip().rstrip(".").replace("\n", " ").split(", ")
    assert order == CONCEPTS


@pytest.mark.parametrize("name", CONCEPTS[:-1])
def test_concept_imports_only_earlier_concepts(name):
    """train, the last, ties everything together and may import what it likes."""
    assert imported(concept(name)) <= set(CONCEPTS[: CONCEPTS.index(name)]) | INFRASTRUCTURE


def test_losses_never_import_each_other():
    for name in LOSSES:
        assert not imported(concept(name)) & set(LOSSES), name


def test_infrastructure_hangs_below_the_concepts():
    """schema imports nothing of ours, checkpoint and data hardly more: so every concept may import them."""
    assert imported(concept("schema")) == set() and imported(concept("checkpoint")) == {"schema"}
    assert imported(concept("data")) <= {"checkpoint", "cache", "noise"}


def test_mixtures_need_torch_alone():
    """One can read and use the exact mixtures without the package."""
    tree = ast.parse((ROOT / "toy" / "mixtures.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert modules == {"math", "torch"} and not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]


def test_concepts_are_short():
    for name in CONCEPTS:
        assert len(concept(name).read_text().splitlines()) <= (300 if name == "train" else 250), name


def test_functions_fit_a_screen():
    lengths = dict(f for path in FILES for f in functions(path))
    assert {k: v for k, v in lengths.items() if v > 40} == {}
    assert lengths["train.train_step"] <= 40


def test_median_function_is_short():
    assert median(lines for name in CONCEPTS for _, lines in functions(concept(name))) <= 12


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tutorials").rglob("*.py"))],
                         ids=lambda p: f"{p.parent.name}/{p.name}")
def test_source_is_plain(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    long = [line for line in text.splitlines() if len(line) > 130]
    assert [line for line in long if not re.match(r' {4}"[\w-]+": +dict\(', line)] == []  # PRESETS: one line each
    assert text.endswith("\n") and "\t" not in text


CHECK = """
import sys, torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
import {modules}
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
print(*sorted({{"matplotlib", "diffusers", "transformers"}} & set(sys.modules)))
"""


def test_importing_does_nothing(tmp_path):
    """No files, no output, no random numbers drawn, no plots or hubs loaded: safe to import anywhere."""
    modules = [f"{p.parent.name}.{p.stem}" for p in FILES if p.stem not in ("__init__", "__main__")]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                           + CHECK.format(modules=", ".join(modules))], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
