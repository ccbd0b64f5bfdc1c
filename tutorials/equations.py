"""Keep the map from the papers' equations to the code, in README.md, at the right lines.

    python -m tutorials.equations          correct every file:line in tutorials/README.md

An entry reads [file.py:LINE](../folder/file.py#LLINE) `name`; LINE is where that function or class is defined, or, for
`Class.name`, where the method is.
"""

import ast
import re
from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command, write_atomic

INDEX = Path(__file__).parent / "README.md"
ENTRY = re.compile(r"\[(\w+\.py):\d+\]\((\.\./[\w/]+\.py)#L\d+\) `([\w.]+)`")


def line_of(path, name):
    """The line of a function, class or Class.method; raises UserError if it is gone."""
    scope = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = next((n for n in scope if getattr(n, "name", None) == part), None)
        if found is None:
            raise UserError(f"{path.name} has no {name} any more: correct its entry in {INDEX}")
        scope = getattr(found, "body", [])
    return found.lineno


def updated(text):
    """text with the line numbers of all entries corrected."""
    def entry(match):
        file, target, name = match.groups()
        line = line_of(INDEX.parent / target, name)
        return f"[{file}:{line}]({target}#L{line}) `{name}`"
    return ENTRY.sub(entry, text)


def main(argv=None):
    parser("python -m tutorials.equations", __doc__).parse_args(argv)
    write_atomic(INDEX, updated(INDEX.read_text()).encode())


if __name__ == "__main__":
    command(main)
