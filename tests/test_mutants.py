"""The suite is shown to see mistakes: each wrong version in mutants.py fails its check, the right one passes it."""

import pytest

from mutants import MUTANTS, applied


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_is_rejected(mutant):
    """By the assertion meant for it, not by a crash; and the code is right again afterwards."""
    with applied(mutant):
        with pytest.raises((AssertionError, pytest.fail.Exception)):      # the second: "did not raise ValueError"
            mutant.check()
    mutant.check()


def test_mutants_are_many_and_distinct():
    assert len(MUTANTS) >= 24 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert all(m.old != m.new for m in MUTANTS)
