"""Execute the notebooks in place, top to bottom, and keep their outputs; the rules they follow are checked here too.

    python -m tutorials.run              all of them
    python -m tutorials.run 02 06        those whose names start so
"""

import base64
import io
import time
from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command, write_atomic

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
SECTIONS = ("Question", "Your prediction", "The maths", "Break it", "Exercise")       # headings every notebook has
LINES, COLUMNS, KILOBYTES, WORDS = 20, 110, 500, 500                   # 110 columns fit a projector


def execute(path, timeout=1200):
    """The executed notebook; raises nbclient's CellExecutionError where a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    quiet = ["--log-level=ERROR"]                                 # it warns that traffic within this machine is not encrypted
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(HERE)}},
                   record_timing=False, extra_arguments=quiet).execute()
    return notebook


def shrink(notebook, colours=96):
    """Pictures as PNGs of few colours: a third of the size, and no difference to be seen in plots.  Warnings of libraries,
    which name paths of this machine, are left out."""
    from PIL import Image

    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for output in (o for c in notebook.cells if c.cell_type == "code" for o in c.outputs):
        if "image/png" in output.get("data", {}):
            image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
            image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(buffer := io.BytesIO(), "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def complaints(notebook, size):
    """What breaks the rules, a list of sentences: cell length, long lines, size, sections, an assertion, an early picture,
    kept outputs."""
    code = [c for c in notebook.cells if c.cell_type == "code"]
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    outputs = [o for c in code for o in c.outputs]
    found = [f"a cell has {len(c.source.splitlines())} lines: {c.source.splitlines()[0]}" for c in code
             if len(c.source.splitlines()) > LINES]
    found += [f"a line of code has {len(line)} columns: {line.strip()}" for c in code for line in c.source.splitlines()
              if len(line) > COLUMNS]
    found += [f"no heading {s!r}" for s in SECTIONS if f"## {s}" not in text]
    found += [f"{size // 1000} KB, more than {KILOBYTES}"] * (size > 1000 * KILOBYTES)
    found += [f"magic or shell command: {c.source.splitlines()[0]}" for c in code if c.source.lstrip().startswith(("%", "!"))]
    found += ["nothing is asserted"] * (not any("assert" in c.source for c in code))
    drawn = [i for i, c in enumerate(notebook.cells) if any("image/png" in o.get("data", {}) for o in c.get("outputs", []))]
    before = sum(len(c.source.split()) for c in notebook.cells[: drawn[0]] if c.cell_type == "markdown") if drawn else 0
    found += ["no picture in the outputs"] * (not drawn)
    found += [f"{before} words before the first picture, more than {WORDS}"] * (before > WORDS)
    found += ["a cell was never executed"] * any(c.execution_count is None for c in code)
    found += ["an output holds an error"] * any(o.output_type == "error" for o in outputs)
    return found


def announce(paths):
    """Say what is going to happen, and how long it takes, before it does."""
    count = "1 notebook" if len(paths) == 1 else f"{len(paths)} notebooks"
    print(f"executing {count}: about half a minute each on two free cores, more on a busy machine", flush=True)


def choose(names):
    """The notebooks whose files' names start with one of `names`; all of them without names."""
    chosen = [path for path in NOTEBOOKS if not names or path.name.startswith(tuple(names))]
    if not chosen:
        known = ", ".join(p.stem for p in NOTEBOOKS) or "none beside this module: they come with a clone"
        raise UserError(f"no notebook starts with {' or '.join(names) or 'anything'}; there are {known}")
    return chosen


def main(argv=None):
    import nbformat

    p = parser("python -m tutorials.run", __doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="how the file's name starts, 02 for example")
    announce(chosen := choose(p.parse_args(argv).names))
    for path in chosen:
        start = time.perf_counter()
        notebook = execute(path)
        shrink(notebook)
        text = nbformat.writes(notebook)
        write_atomic(path, (text + "\n").encode())
        wrong = complaints(notebook, len(text))
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {len(text) // 1000} KB", *wrong, sep="\n    ")


if __name__ == "__main__":
    command(main)
