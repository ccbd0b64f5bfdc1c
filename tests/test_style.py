"""The rules of the house: what imports what, how long things are, and that importing does nothing.

Without these a reader loses the way through the package, and a user of one loss pays for plots and hubs.
"""

import ast
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import nano_dmd

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "nano_dmd").rglob("*.py"))
CODE = [*PACKAGE, *sorted((ROOT / "toy").rglob("*.py"))]
TEXT = [*CODE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "tutorials").rglob("*.py"))]
CONCEPTS = ["noise", "denoiser", "networks", "teacher", "real_score", "fake_score", "generator", "dmd_loss", "gan", "sid_loss",
            "f_distill", "decoupled", "sida", "real_uid", "trajectory", "methods"]
LOSSES = ["dmd_loss", "gan", "sid_loss"]
LATER = ["f_distill", "decoupled", "sida", "real_uid", "trajectory"]
BUILT_ON = {"f_distill": {"dmd_loss"}, "decoupled": {"dmd_loss"}, "sida": {"gan", "sid_loss"}, "trajectory": {"dmd_loss"}}
DOOR = "nano_dmd.teachers.zoo"                                    # teacher.load_teacher opens it, late

BUDGET = 5365       # lines of code in nano_dmd/ (docs/log.md, 29 November): lower it when they fall
READING = 950 + 7 * 80                                            # lines of the concepts: 80 for each method that came later


def name_of(path):
    """nano_dmd/engine/draw.py -> nano_dmd.engine.draw; a package by its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in CODE}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """[(module, name or "")] of everything a file imports anywhere, functions included."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def own_modules(path):
    """The modules of ours that a file imports: `from nano_dmd.engine import files` is nano_dmd.engine.files."""
    found = {f"{module}.{name}" if f"{module}.{name}" in MODULES else module for module, name in imports(path)}
    return found & MODULES.keys() - {name_of(path)}


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def lines_of_code(path):
    """Without blank lines, comments and docstrings, as cloc counts."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [node.body[0] for node in ast.walk(tree(path)) if isinstance(node, documented) and ast.get_docstring(node)]
    prose = {number for doc in docs for number in range(doc.lineno, doc.end_lineno + 1)}
    return [line for number, line in enumerate(lines(path), 1)
            if number not in prose and line.strip() and not line.strip().startswith("#")]


def shown(path):
    return str(path.relative_to(ROOT))


def functions(path):
    """{name and line: length} of every function of a file, docstrings and what is nested in it included."""
    return {f"{shown(path)}:{n.lineno} {n.name}": n.end_lineno - n.lineno + 1 for n in ast.walk(tree(path))
            if isinstance(n, ast.FunctionDef)}


def listed(found):
    """All of it: pytest shortens what it shows."""
    return "\n" + "\n".join(f"{k}: {found[k]}" if isinstance(found, dict) else k for k in sorted(found))


def concept(name):
    return MODULES[f"nano_dmd.{name}"]


# ---- what imports what


def test_reading_order_is_declared():
    order = nano_dmd.__doc__.split("Reading order:")[1].split(".")[0]
    assert [name.strip() for name in order.split(",")] == CONCEPTS


def test_no_circle_of_imports():
    """Imports inside functions count: they only hide a circle."""
    graph = {name: own_modules(path) for name, path in MODULES.items()}
    while leaves := {name for name, needed in graph.items() if not needed}:
        graph = {name: needed - leaves for name, needed in graph.items() if name not in leaves}
    assert not graph, listed(graph)


def test_a_concept_imports_torch_and_earlier_concepts():
    late = {}
    for i, name in enumerate(CONCEPTS):
        theirs = {module.split(".")[0] for module, _ in imports(concept(name))} - sys.stdlib_module_names
        assert theirs <= {"torch", "tqdm", "nano_dmd"}, name
        if more := own_modules(concept(name)) - {f"nano_dmd.{earlier}" for earlier in CONCEPTS[:i]}:
            late[name] = more
    assert late == {"teacher": {DOOR}}
    door = next(n for n in tree(concept("teacher")).body if getattr(n, "name", "") == "load_teacher")
    assert any(isinstance(n, ast.ImportFrom) and n.module == DOOR for n in door.body)


def test_losses_never_import_each_other():
    """DMD, GAN and SiD stand alone.  A later method takes the gradient or integrand it changes from the one it grew from."""
    for name in LOSSES + LATER:
        others = own_modules(concept(name)) & {f"nano_dmd.{other}" for other in LOSSES + LATER}
        assert others == {f"nano_dmd.{other}" for other in BUILT_ON.get(name, ())}, name


def test_no_file_but_train_ties_everything_together():
    """At most 15 own names."""
    count = {shown(path): sum(module.split(".")[0] == "nano_dmd" for module, _ in set(imports(path))) for path in PACKAGE}
    many = {name: n for name, n in count.items() if n > 15 and name != "nano_dmd/train.py"}
    assert not many, listed(many)


def test_mixtures_need_torch_alone():
    """One can read and use the exact mixtures without the package."""
    assert set(imports(MODULES["toy.mixtures"])) == {("math", ""), ("torch", "")}


# ---- how long things are


def test_the_package_stays_small():
    assert sum(len(lines_of_code(path)) for path in PACKAGE) <= BUDGET


def test_the_concepts_are_read_in_one_sitting():
    assert sum(len(lines(concept(name))) for name in CONCEPTS) <= READING
    assert len(lines(concept("methods"))) <= 110 + 7 * 4          # a row and its import, for each later method


def test_functions_fit_a_screen():
    length = {name: n for path in CODE for name, n in functions(path).items()}
    long = {name: n for name, n in length.items() if n > 40}
    assert not long, listed(long)
    step, = (n for name, n in length.items() if name.endswith(" train_step"))
    assert step <= 25
    assert median(n for name in CONCEPTS for n in functions(concept(name)).values()) <= 10


def test_lines_are_short():
    """100 columns in what is read, 130 in tests and tutorials."""
    limit = {path: 100 if path in CODE else 130 for path in TEXT}
    long = Counter(shown(path) for path in TEXT for line in lines(path) if len(line) > limit[path])
    assert not long, listed(long)


# ---- how it is written


def test_at_most_two_targets_in_a_packed_assignment():
    """a, b, c = 1, 2, 3 hides three lines; what a call returns may be unpacked."""
    packed = [f"{shown(path)}:{node.lineno}" for path in CODE for node in ast.walk(tree(path))
              if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
              for target in node.targets if isinstance(target, ast.Tuple) and len(target.elts) > 2]
    assert not packed, listed(packed)


def test_no_name_has_two_meanings():
    """A function, class or constant of one name is defined once in the package."""
    defined = {}
    for path in PACKAGE:
        for node in tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main" and node.name[0] != "_":
                defined.setdefault(node.name, []).append(shown(path))
        targets = [t for node in tree(path).body if isinstance(node, ast.Assign) for t in node.targets]
        assigned = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in assigned - {"__all__"}:        # a file may assign one twice
            defined.setdefault(name, []).append(shown(path))
    twice = {name: where for name, where in defined.items() if len(where) > 1}
    assert not twice, listed(twice)


def test_source_is_plain():
    for path in TEXT:
        text = path.read_text(encoding="utf-8")
        assert text.isascii() and "\t" not in text and (text.endswith("\n") or not text), shown(path)


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
    modules = [name for name in MODULES if not name.endswith(".__main__")]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                           + CHECK.format(modules=", ".join(modules))], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_names_others_rely_on():
    """What users and their tests import stays where it is (design, section 4)."""
    from nano_dmd.dmd_loss import dmd_gradient
    from nano_dmd.gan import critic_logit_loss, generator_logit_loss
    from nano_dmd.noise import add_noise, expand, karras_sigmas
    from nano_dmd.sid_loss import sid_integrand
    from nano_dmd.teacher import heun, load_teacher
    from nano_dmd.teachers.edm_checkpoint import build_edm, read_edm_pickle
    from nano_dmd.train import METHODS, PRESETS, Config, main, train_step
    from toy.mixtures import MIXTURES, Mixture

    calls = [dmd_gradient, critic_logit_loss, generator_logit_loss, add_noise, expand, karras_sigmas, sid_integrand, heun,
             load_teacher, build_edm, read_edm_pickle, Config, main, train_step, Mixture]
    assert all(map(callable, calls)) and all(isinstance(v, dict) for v in (METHODS, PRESETS, MIXTURES))
    assert load_teacher("toy:ring8").denoiser.shape == load_teacher("toy:ring8").shape == (2,)
