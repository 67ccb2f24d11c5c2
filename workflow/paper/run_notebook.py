"""Execute one notebook with papermill and publish it as ``.ipynb`` and as a page that opens without a network.

    python -m workflow.paper.run_notebook notebooks/ablations.ipynb --params '{"results": "results/laptop"}'
        --executed logs/ablations.ipynb --notebook results/ablations.ipynb --html results/ablations.html

Parameters keep their JSON types, and names that the notebook does not have are refused. The executed copy is written
cell by cell, so after a failure it holds the traceback; the published files appear on success alone. They are the same
byte for byte whenever code, records and packages are: no times, random ids, addresses or machine paths.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from cropr.records import write_text

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 300
"""Seconds for the kernel to start."""
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
_TEX = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)

# The stock template loads scripts for widgets, formulas and diagrams from a content network; ours needs none of them.
# It also leaves out what a figure's cell says for readers who cannot see the picture.
_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata('alt', 'image/png') -%}
{{ super() | replace('<img', '<img alt="' ~ (alt | escape_html) ~ '"', 1) if alt else super() }}
{%- endblock data_png -%}
"""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0, 1 when a cell failed, 2 when it was called wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the notebook")
    parser.add_argument("--params", type=json.loads, default={}, metavar="JSON", help="values of its parameters")
    parser.add_argument("--executed", type=Path, required=True, help="raw executed copy, kept on failure")
    parser.add_argument("--notebook", type=Path, required=True, help="published notebook")
    parser.add_argument("--html", type=Path, required=True, help="published page")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from papermill.exceptions import PapermillExecutionError

    try:
        execute(args.source, args.executed, args.params)
    except PapermillExecutionError as error:
        logging.error("%s failed in cell %s: %s: %s", args.source, error.exec_count, error.ename, error.evalue)
        logging.error("the executed copy with the traceback: %s", args.executed)
        return 1
    except (ValueError, FileNotFoundError) as error:
        logging.error("error: %s", error)
        return 2
    publish(args.executed, args.notebook, args.html)
    return 0


def execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run ``source`` with ``parameters``, writing ``target`` as cells finish; the kernel starts in the repository.

    Raises:
        ValueError: a parameter that the notebook does not have.
        FileNotFoundError: no such notebook.
        PapermillExecutionError: a cell failed; ``target`` holds its traceback.
    """
    import papermill

    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such notebook")
    known = papermill.inspect_notebook(str(source))
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{source} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The kernel of this environment, even if the user's home has one of the same name; and plain text in logs.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.update(JUPYTER_PREFER_ENV_PATH="1", PYDEVD_DISABLE_FILE_VALIDATION="1", NO_COLOR="1", PYTHONPATH=paths)
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters=parameters,
        kernel_name="python3",
        cwd=str(ROOT),
        start_timeout=START_TIMEOUT,
        progress_bar=False,
        log_output=True,
    )


def publish(executed: Path, notebook: Path, page: Path) -> None:
    """Write the scrubbed notebook and its page, each whole or not at all."""
    import nbformat

    content = scrub(nbformat.read(executed, as_version=4))
    write_text(notebook, nbformat.writes(content) + "\n")
    write_text(page, render(content, notebook.stem))


def scrub(notebook: Any) -> Any:
    """Take out what differs between two equal runs: times, random ids, memory addresses, machine paths."""
    papermill = notebook.metadata.pop("papermill", {})
    notebook.metadata["papermill"] = {"parameters": papermill.get("parameters", {})}
    notebook.metadata.get("language_info", {}).pop("version", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            # Texts only: within an encoded picture the same letters mean something else.
            texts = output if "text" in output else output.get("data", {})
            for kind in [key for key in texts if key.startswith("text")]:
                texts[kind] = _ADDRESS.sub("0x0", texts[kind].replace(str(ROOT), "."))
    return notebook


def render(notebook: Any, title: str) -> str:
    """The notebook as HTML that loads nothing: pictures inside, formulas as MathML."""
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(notebook)
    formulas: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell = _without_formulas(cell, formulas)
    exporter = HTMLExporter(
        raw_template=_TEMPLATE, embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    # Only now: embedding pictures parses the page again and would break the tags of formulas.
    for placeholder, mathml in formulas.items():
        html = html.replace(placeholder, mathml)
    return html


def _without_formulas(cell: Any, formulas: dict[str, str]) -> Any:
    """Put placeholders for the formulas of a markdown cell; ``formulas`` learns what they stand for."""
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        block = match[1] is not None
        tex = match[1] if block else match[2]
        placeholder = f"formula{hashlib.sha256(match[0].encode()).hexdigest()[:16]}"
        formulas[placeholder] = convert(tex, display="block" if block else "inline")
        return placeholder

    cell["source"] = _TEX.sub(replace, cell.source)
    return cell


if __name__ == "__main__":
    sys.exit(main())
