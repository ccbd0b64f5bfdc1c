"""Make slides of a notebook: python -m tutorials.slides 02 --to slides

The notebook is executed again, with figures of 200 dpi.  Each figure gets a slide of its own; text is cut into slides of
a few sentences; code is left out unless --code is given; solutions become speaker notes (key s).  The slides are one
HTML file for each notebook, 1920 x 1080, made by nbconvert with reveal.js and MathJax, which the browser fetches.

    python -m tutorials.slides               all of them
    python -m tutorials.slides 02 --code     with the cells of code, for a walk through them

For a hall without a network: `npm install reveal.js@4 mathjax@2 requirejs jquery@3` in the folder of the slides, then
--modules node_modules.
"""

import base64
import importlib.util
import os
import re
from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command, write_atomic
from tutorials.run import HERE, announce, choose, execute

WORDS, DPI = 75, 200                                              # text of a slide; pixels per inch of its figures
STYLE = """<style>
.reveal .slides .jp-RenderedHTMLCommon {font-size: 42px; line-height: 1.4; text-align: left; padding: 0}
.reveal .slides .jp-RenderedHTMLCommon :is(h1, h2) {font-size: 72px; text-transform: none}
.reveal .slides .jp-RenderedHTMLCommon blockquote {font-size: 32px; width: auto}
.reveal .slides .jp-RenderedHTMLCommon img {display: block; margin: auto; width: 1860px; max-width: 1860px; max-height: 940px;
    object-fit: contain}
.reveal .slides .jp-RenderedHTMLCommon table {font-size: 36px; table-layout: auto}
.reveal pre, .reveal pre code {font-size: 26px; line-height: 1.3}
</style>"""


def sections(text):
    """A markdown cell as slides [(starts a section, text)]: cut at headings, then into groups of paragraphs.

    A paragraph stays whole; a displayed formula counts as 25 words and stays with the text before it.
    """
    found = []
    for part in re.split(r"\n(?=#+ )", text):
        group, size, first = [], 0, True
        for paragraph in filter(None, re.split(r"\n\s*\n|\n(?=[*-] )", part.strip())):
            words = 25 if paragraph.startswith("$$") else len(paragraph.split())
            if group and size + words > WORDS and not paragraph.startswith("$$") and not group[-1].startswith("#"):
                found.append((first, "\n\n".join(group)))
                group, size, first = [], 0, False
            group, size = group + [paragraph], size + words
        if group:
            found.append((first and part.startswith("#"), "\n\n".join(group)))
    return found


def embedded(text):
    """Markdown whose pictures, ![words](../docs/file.png), are part of it.  nbconvert refuses those outside its folder."""
    def whole(found):
        data = base64.b64encode((HERE / found[2]).read_bytes()).decode()
        return f'<img alt="{found[1]}" src="data:image/png;base64,{data}">'

    return re.sub(r"!\[(.*?)\]\((.*?\.png)\)", whole, text)


def deck(notebook, code=False):
    """A notebook whose cells are the slides of an executed one."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    slides = []

    def add(cell, kind):
        cell.metadata["slideshow"] = {"slide_type": kind}
        slides.append(cell)

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            folded, _, told = cell.source.rpartition("</details>")
            if folded:
                add(new_markdown_cell(re.sub(r"</?(details|summary)>", " ", folded)), "notes")
            for starts, text in sections(told):
                add(new_markdown_cell(embedded(text)), "slide" if starts else "subslide")
        elif 'check("' not in cell.source and "guess_1" not in cell.source and cell.get("id") != "install":
            if code:
                add(new_code_cell(cell.source), "subslide")
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:
                    add(new_markdown_cell(f'<img src="data:image/png;base64,{data["image/png"]}">'), "subslide")
                elif "text/html" in data:                         # an animation
                    add(new_markdown_cell(data["text/html"]), "subslide")
    return new_notebook(cells=slides, metadata=notebook.metadata)


MODULES = dict(reveal_url_prefix="reveal.js", mathjax_url="mathjax/MathJax.js?config=TeX-AMS_CHTML-full,Safe",
               require_js_url="requirejs/require.js", jquery_url="jquery/dist/jquery.min.js",
               mermaid_js_url="mermaid/dist/mermaid.esm.min.mjs")         # not used: it may be absent


def html(notebook, title, modules=None):
    """The page of a deck, as text; `modules` is where the scripts lie if not on their public servers."""
    from nbconvert import SlidesExporter

    urls = {name: f"{modules}/{path}" for name, path in MODULES.items()} if modules else {}
    exporter = SlidesExporter(exclude_input_prompt=True, exclude_output_prompt=True, reveal_scroll=True, reveal_theme="white",
                              reveal_width="1920", reveal_height="1080", reveal_number="c/t", **urls)
    page = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})[0]
    # MathJax would break formulas by the width of a slide that is hidden, 0
    page = re.sub(r"(linebreaks: {\s*automatic: )true", r"\1false", page)
    return page.replace("</head>", f"{STYLE}</head>", 1)


def main(argv=None):
    p = parser("python -m tutorials.slides", __doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="how the file's name starts, 02 for example")
    p.add_argument("--to", type=Path, default=Path("slides"), metavar="DIR", help="folder of the pages (default: slides)")
    p.add_argument("--code", action="store_true", help="with the cells of code")
    p.add_argument("--modules", metavar="DIR", help="npm's folder with the scripts; without it a browser fetches them")
    args = p.parse_args(argv)
    if importlib.util.find_spec("nbconvert") is None:
        raise UserError("slides need nbconvert: pip install nbconvert")
    os.environ["NANO_DMD_DPI"] = str(DPI)                         # read by tutorials.show, in the kernel
    announce(chosen := choose(args.names))
    for path in chosen:
        page = html(deck(execute(path), args.code), path.stem, args.modules)
        write_atomic(args.to / f"{path.stem}.html", page.encode())
        print(f"{args.to / path.stem}.html: {len(page) // 1000} KB", flush=True)


if __name__ == "__main__":
    command(main)
