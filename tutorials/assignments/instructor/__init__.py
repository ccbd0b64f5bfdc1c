"""Solutions, and wrong answers that the graders are shown to reject: a grader is as good as the mistakes it was seen to find."""

from pathlib import Path
from typing import NamedTuple


class Wrong(NamedTuple):
    """A plausible wrong answer: the solution with one piece of text, found exactly once, replaced.

    tasks  the numbers of the tasks that must lose marks, "A1.2" or ("A1.2", "A1.3"): those and no others
    public_passes  right at the public constants by accident or by copying numbers; only hidden constants tell
    """

    name: str
    tasks: str | tuple
    old: str
    new: str
    public_passes: bool = False

    @property
    def broken(self):
        return {self.tasks} if isinstance(self.tasks, str) else set(self.tasks)


def solution(name):
    return (Path(__file__).parent / name / "solution.py").read_text()


def answer(name, wrong):
    """The text of that wrong answer; raises ValueError unless its old text stands exactly once in the solution."""
    text = solution(name)
    if text.count(wrong.old) != 1:
        raise ValueError(f"{wrong.name}: {wrong.old!r} stands {text.count(wrong.old)} times in the solution of {name}, not once")
    return text.replace(wrong.old, wrong.new)
