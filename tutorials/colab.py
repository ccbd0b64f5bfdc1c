"""Put links to Colab and Binder into the notebooks: python -m tutorials.colab OWNER/NAME

OWNER/NAME is the public GitHub repository that holds them on its branch main, this project's or a course's fork.  Each
notebook gets a line with two links and a first cell that installs the package where it is missing, with PyTorch for the
CPU only where there is no PyTorch.  Run again with another address, it replaces the first one.
Binder reads .binder/requirements.txt.
"""

import re

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command, write_atomic
from tutorials.run import NOTEBOOKS

INSTALL = '''# on Colab or Binder; on a machine where the package is installed this does nothing
import importlib.util
import subprocess
import sys

def install(*what):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *what], check=True)

if importlib.util.find_spec("torch") is None:
    install("torch", "torchvision", "--index-url", "https://download.pytorch.org/whl/cpu")
if importlib.util.find_spec("nano_dmd") is None:
    install("nano_dmd[sd] @ git+https://github.com/{repo}", "matplotlib")'''


def link(notebook, name, repo):
    """A notebook with the links and the first cell of repository `repo`, in place of older ones."""
    from nbformat.v4 import new_code_cell

    title, _, rest = notebook.cells[0].source.partition("\n")
    rest = re.sub(r"^\n\[Open in Colab\].*\n", "", rest)
    notebook.cells[0].source = (
        f"{title}\n\n[Open in Colab](https://colab.research.google.com/github/{repo}/blob/main/tutorials/{name}), "
        f"[Open in Binder](https://mybinder.org/v2/gh/{repo}/main?labpath=tutorials%2F{name})\n{rest}")
    if notebook.cells[1].get("id") == "install":
        del notebook.cells[1]
    notebook.cells.insert(1, new_code_cell(INSTALL.format(repo=repo), id="install", execution_count=0))
    return notebook


def main(argv=None):
    import nbformat

    p = parser("python -m tutorials.colab", __doc__)
    p.add_argument("repo", metavar="OWNER/NAME", help="a public repository on GitHub")
    repo = p.parse_args(argv).repo
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"expected OWNER/NAME, got {repo!r}: the repository's address after github.com/")
    for path in NOTEBOOKS:
        notebook = link(nbformat.read(path, as_version=4), path.name, repo)
        write_atomic(path, (nbformat.writes(notebook) + "\n").encode())
    print(f"{len(NOTEBOOKS)} notebooks point to {repo}")


if __name__ == "__main__":
    command(main)
