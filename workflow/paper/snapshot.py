"""Copy a finished scale to ``docs/rendered/`` and its headline table into the README.

    python -m workflow.paper.snapshot results/laptop
    python -m workflow.paper.snapshot results/fashion --under fashion    # to docs/rendered/fashion/, README.md stays

Copies executed notebooks, tables and PNG figures, and lists them in ``docs/rendered/README.md``. In README.md, the text
between ``<!-- headline -->`` and ``<!-- end -->`` becomes ``tables/headline.md``; nothing else of it is touched.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from cropr.records import write_text
from workflow.paper.page import artefacts
from workflow.paper.records import REPOSITORY, load_manifest

FILES = ("notebooks/*.ipynb", "tables/*.md", "tables/*.csv", "figures/*.png")
_HEADLINE = re.compile(r"(<!-- headline -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a finished scale")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="repository with README.md and docs/")
    parser.add_argument("--under", default="", metavar="NAME", help="copy to docs/rendered/NAME; README.md stays")
    args = parser.parse_args(argv)
    target = args.root / "docs" / "rendered" / args.under
    copy(args.results, target)
    write_text(target / "README.md", index(args.results, _docs(target)))
    if args.under:
        return 0
    readme = args.root / "README.md"
    table = (args.results / "tables" / "headline.md").read_text(encoding="utf-8")
    write_text(readme, with_headline(readme.read_text(encoding="utf-8"), table))
    return 0


def copy(results: Path, target: Path) -> None:
    """Replace the files of an earlier snapshot by those of ``results``.

    Raises:
        FileNotFoundError: the scale has no report, so that it is not finished.
    """
    if not (results / "report.html").is_file():
        raise FileNotFoundError(f"{results}/report.html: the scale is not finished; run: snakemake --cores all")
    target.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for old in target.glob(Path(pattern).name):
            old.unlink()
    for pattern in FILES:
        for new in sorted(results.glob(pattern)):
            shutil.copyfile(new, target / new.name)
    for notebook in target.glob("*.ipynb"):
        write_text(notebook, notebook.read_text(encoding="utf-8").replace("(../docs/", f"({_docs(target)}"))


def _docs(target: Path) -> str:
    """Relative link from ``target`` to the folder ``docs`` that it lies in."""
    return "../" * target.parts[::-1].index("docs")


def index(results: Path, docs: str) -> str:
    """List of the notebooks with their questions, by section, as Markdown; ``docs``: link to the folder ``docs``."""
    executed = {path.stem for path in (results / "notebooks").glob("*.ipynb")}
    manifests = [load_manifest(name, results) for name in artefacts(results)]
    scale, seeds = manifests[0]["scale"], ", ".join(map(str, manifests[0]["seeds"]))
    lines = [
        "# Rendered notebooks",
        "",
        f"A copy of a run of the scale `{scale}`, seeds {seeds}; `make snapshot SCALE={scale}` copies",
        f"`{manifests[0]['results']}/`. Every notebook names its device and ends with the command that makes it again.",
        f"How to read the numbers: [reading.md]({docs}reading.md). Claims and verdicts: [claims.md](claims.md).",
    ]
    for section in dict.fromkeys(manifest["section"] for manifest in manifests):
        lines += ["", f"## {section}", ""]
        for manifest in (one for one in manifests if one["section"] == section):
            name = manifest["artefact"]
            link = f"[{name}]({name}.ipynb) ([table]({name}.md))" if name in executed else f"{name} (not in this copy)"
            lines.append(f"* {link}: {manifest['question']}")
    return "\n".join(lines) + "\n"


def with_headline(text: str, table: str) -> str:
    """``text`` with ``table`` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    if not _HEADLINE.search(text):
        raise ValueError(
            "README.md has no lines '<!-- headline -->' and '<!-- end -->'; write both, the table goes between"
        )
    return _HEADLINE.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


if __name__ == "__main__":
    raise SystemExit(main())
