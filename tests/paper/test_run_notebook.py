"""The notebook runner: typed parameters, unknown names refused, failures kept, stable bytes, offline pages."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from workflow.paper import run_notebook as runner

ROOT = Path(__file__).parents[2]
PICTURE = """
import base64
from IPython.display import Image, display
display(Image(base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)))
"""


@cache
def nbformat() -> Any:
    """The package, imported where it is needed: it takes seconds."""
    return import_module("nbformat")


def notebook(path: Path, *sources: str) -> Path:
    """A notebook with the parameters ``number`` and ``name``, a formula, and code cells."""
    cells = [
        nbformat().v4.new_markdown_cell(
            "# Title\n\nA formula $a_j = \\sum_n A_{nj}$, prices of $5 and $6, and\n\n$$x^2$$"
        ),
        nbformat().v4.new_code_cell("number = 1\nname = 'nobody'", metadata={"tags": ["parameters"]}),
        *map(nbformat().v4.new_code_cell, sources),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat().write(nbformat().v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def run(source: Path, out: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflow.paper.run_notebook", str(source), "--params", json.dumps(parameters)]
    command += ["--executed", str(out / "log.ipynb"), "--notebook", str(out / "page.ipynb")]
    return subprocess.run(
        [*command, "--html", str(out / "page.html")], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )


@pytest.mark.workflow
def test_runs_with_typed_parameters_and_is_stable(tmp_path: Path) -> None:
    source = notebook(
        tmp_path / "page.ipynb", "import os; print(type(number).__name__, number, name, os.getcwd(), object())", PICTURE
    )
    for folder in ("one", "two"):
        result = run(source, tmp_path / folder, number=2.5, name="somebody")
        assert result.returncode == 0, result.stderr
    for file in ("page.ipynb", "page.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    published = nbformat().read(tmp_path / "one/page.ipynb", as_version=4)
    text = "".join(output.get("text", "") for cell in published.cells for output in cell.get("outputs", []))
    assert text.startswith("float 2.5 somebody . <object object at 0x0>"), "started in the repository; no machine paths"
    assert published.metadata["papermill"] == {"parameters": {"number": 2.5, "name": "somebody"}}
    page = (tmp_path / "one/page.html").read_text()
    assert_offline(page)
    assert "data:image/png;base64," in page
    assert page.count("<math") == 2
    assert "$5 and $6" in page


@pytest.mark.workflow
def test_failed_notebook_is_kept_and_not_published(tmp_path: Path) -> None:
    source = notebook(tmp_path / "page.ipynb", "print('before')", "raise KeyError('cropr_r9')")
    result = run(source, tmp_path / "out")
    assert result.returncode == 1
    assert "KeyError" in result.stderr
    executed = (tmp_path / "out/log.ipynb").read_text()
    assert "before" in executed
    assert "cropr_r9" in executed
    assert not (tmp_path / "out/page.ipynb").exists()
    assert not (tmp_path / "out/page.html").exists()


@pytest.mark.workflow  # papermill alone takes seconds to import
def test_unknown_parameter_is_refused(tmp_path: Path) -> None:
    source = notebook(tmp_path / "page.ipynb")
    with pytest.raises(ValueError, match="no parameter nmae; it has number, name"):
        runner.execute(source, tmp_path / "out.ipynb", {"nmae": "x"})
    with pytest.raises(FileNotFoundError, match=r"nothing\.ipynb: no such notebook"):
        runner.execute(tmp_path / "nothing.ipynb", tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()


def test_page_loads_nothing_and_pictures_keep_their_alt_text(tmp_path: Path) -> None:
    content = nbformat().read(notebook(tmp_path / "page.ipynb", "x = 1", "y = 2"), as_version=4)
    for cell, alt in zip(content.cells[2:], ({"alt": 'Top-1 of "Cropr" > 80 & rising'}, {}), strict=True):
        cell.outputs = [nbformat().v4.new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": alt})]
    before = nbformat().writes(content)
    page = runner.render(content, "Title")
    assert_offline(page)
    assert nbformat().writes(content) == before, "rendering changes the notebook"
    assert "<title>Title</title>" in page
    first, second = re.findall(r"<img[^>]*>", page)
    assert 'src="data:image/png;base64,AAAA"' in first
    assert html.escape('Top-1 of "Cropr" > 80 & rising') in first.replace("&#34;", "&quot;")
    assert "No description" in second  # nbconvert says so itself


def assert_offline(page: str) -> None:
    """No script, style sheet, picture or frame comes from elsewhere."""
    assert not re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?!data:)[^\"']*", page)
    assert not re.findall(r"<link\b[^>]*\bhref=[\"'](?!data:)[^\"']*", page)
    assert not re.findall(r"@import|url\([\"']?(?:https?:)?//", page)
    assert not re.findall(r"import\([\"']https?:", page)
