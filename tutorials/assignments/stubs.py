"""Generate what students get from the solutions, so that the two cannot drift apart.

    python -m tutorials.assignments.stubs              write every starter from its solution

What students get comes from `python -m tutorials.course --to DIR`.

In a solution, the lines between "### BEGIN SOLUTION A1.2" and "### END SOLUTION" become one that raises
NotImplementedError naming the task; signatures, docstrings and everything else stay as they are.
"""

import re
from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command

HERE = Path(__file__).parent
SOLUTIONS = HERE / "instructor"
NAMES = tuple(p.parent.name for p in sorted(HERE.glob("a?/checks.py")))               # a hand-out may hold only some
PUBLIC = ("README.md", "{name}.py", "test_public.py")
REGION = re.compile(r"^( *)### BEGIN SOLUTION (A\d\.\d)\n.*?^ *### END SOLUTION\n", re.M | re.S)


def starter(solution):
    """The text students start from; raises ValueError where markers do not pair up."""
    text = REGION.sub(lambda m: f'{m[1]}raise NotImplementedError("{m[2]} is yours to write")\n', solution)
    if "### BEGIN" in text or "### END" in text:
        raise ValueError("a marker without its partner, or one that names no task")
    return text


def main(argv=None):
    parser("python -m tutorials.assignments.stubs", __doc__).parse_args(argv)
    if not SOLUTIONS.is_dir():
        raise UserError(f"there is no {SOLUTIONS.name}/ here: starters are written from solutions")
    for name in NAMES:
        (HERE / name / f"{name}.py").write_text(starter((SOLUTIONS / name / "solution.py").read_text()))


if __name__ == "__main__":
    command(main)
