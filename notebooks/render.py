"""Execute every notebook from a fresh kernel; write it down as Markdown with its pictures.

    python notebooks/render.py            execute and rewrite notebooks/rendered/
    python notebooks/render.py --check    execute only (CI)

Notebooks are percent-format Python files named NN_title.py beside this script. Any exception in one
ends the run. Needs the ``docs`` and ``audit`` extras.
"""

import argparse
import io
import os
import shutil
from pathlib import Path

import jupytext
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

HERE = Path(__file__).resolve().parent
RENDERED = HERE / "rendered"


def execute(path: Path):
    """Run a notebook from its first cell to its last; its outputs are in the result."""
    notebook = jupytext.read(path)
    runner = ExecutePreprocessor(timeout=600, kernel_name="python3", coalesce_streams=True)
    runner.preprocess(notebook, {"metadata": {"path": str(HERE)}})
    return notebook


def small(png: bytes) -> bytes:
    """The same picture in 256 colors and without metadata: a third of the size."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def write(path: Path, notebook) -> None:
    """Write rendered/<name>.md and its pictures, replacing what was there."""
    folder = RENDERED / f"{path.stem}_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    resources = {"output_files_dir": folder.name, "unique_key": path.stem}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    for number, (name, content) in enumerate(resources["outputs"].items(), start=1):
        # Numbered by picture, so that adding a cell renames nothing.
        picture = f"{folder.name}/{number}.png"
        (RENDERED / picture).write_bytes(small(content))
        text = text.replace(name, picture)
    origin = f"<!-- Made from notebooks/{path.name} by notebooks/render.py: edit that file. -->\n\n"
    lines = (line.rstrip() for line in text.strip().splitlines())
    (RENDERED / f"{path.stem}.md").write_text(origin + "\n".join(lines) + "\n")


def main() -> None:
    """Execute all notebooks, in the order of their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="execute only, write nothing")
    check = parser.parse_args().check
    # Pictures must land in the notebook, whatever backend the caller's shell has chosen.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
        print(path.name, flush=True)
        notebook = execute(path)
        if not check:
            write(path, notebook)


if __name__ == "__main__":
    main()
