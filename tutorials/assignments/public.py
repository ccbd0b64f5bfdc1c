"""The public tests of an assignment as pytest functions: each check of each task, at the public constants."""

from pathlib import Path

import pytest

from tutorials.assignments.checking import PUBLIC_SEED
from tutorials.assignments.isolated import assignment, explain, load


def tests_of(name, beside):
    """A parametrised test that imports NAME.py from the folder of the file `beside`; -k A1_2 picks a task."""
    known, path = assignment(name), Path(beside).parent / f"{name}.py"

    @pytest.mark.parametrize("check", [pytest.param(c, id=f"{c.task}: {c.title}".replace(".", "_")) for c in known.checks])
    def test(check):
        why = None
        try:
            check.run(load(path), known.constants(PUBLIC_SEED))
        except (NotImplementedError, AssertionError) as e:        # others keep their traceback: it helps the student
            why = explain(e, path)
        if why:
            pytest.fail(why, pytrace=False)
    return test


tests_of.__test__ = False                                         # its name, imported into a test file, is no test
