"""Write ``report.html``, the tables of claims and the headline table of a scale.

    python -m workflow.paper.page --results results/laptop --out results/laptop/report.html

The page lies beside the folders ``notebooks``, ``tables`` and ``figures`` and links into them; it loads nothing else.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from cropr.records import write_text
from workflow.paper.claims import VERDICTS, load_claims, verdicts
from workflow.paper.output import to_markdown
from workflow.paper.records import REPOSITORY, load_manifest, load_published, load_records, load_speed, setting
from workflow.paper.stats import mean_interval, with_interval, write

TEMPLATES = REPOSITORY / "workflow" / "report"
FIRST = {
    "pruning_maps": "Which patches each method prunes, and after which block; kept patches are shown as they are.",
    "relevance": "By block: kept patches that lie on the object, and the object's patches that are kept.",
}
"""Figures that the page begins with, those of them that the scale has: name, what it shows."""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of a scale, with its manifests")
    parser.add_argument("--out", type=Path, required=True, help="page to write")
    parser.add_argument("--artefacts", nargs="+", metavar="NAME", help="in their order; default: all there are")
    args = parser.parse_args(argv)
    names = args.artefacts or artefacts(args.results)
    tables, claims = args.results / "tables", claims_table(args.results, names)
    write_text(tables / "claims.csv", claims.to_csv(index=False, lineterminator="\n"))
    write_text(tables / "claims.md", to_markdown(claims))
    write_text(tables / "headline.md", headline(args.results, names))
    write_text(args.out, render(args.results, names, claims))
    return 0


def artefacts(results: Path) -> list[str]:
    """Artefacts of the scale, in the order that their YAML files give."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in (results / "manifests").glob("*.json")]
    return [manifest["artefact"] for manifest in sorted(manifests, key=lambda manifest: manifest["order"])]


def claims_table(results: Path, names: list[str]) -> pd.DataFrame:
    """Verdicts of all claims: notebook, claim, measured, predicted, claimed, verdict, why, over, source."""
    about = {claim.artefact for claim in load_claims()}
    # The first artefact gives the columns, also where none has a claim.
    parts = [verdicts(name, results).assign(notebook=name) for name in names if name in about or name == names[0]]
    table = pd.concat(parts, ignore_index=True)
    return table[["notebook", *table.columns.drop("notebook")]]


def headline(results: Path, names: list[str]) -> str:
    """The README's table as Markdown: published beside measured, of the notebook that compares methods on each task.

    Columns without any value are left out.
    """
    lines: list[dict[str, str]] = []
    notes: list[str] = []
    seen: set[str] = set()
    for name in names:
        manifest = load_manifest(name, results)
        if manifest["metrics"] and manifest["task"] not in seen:  # microbenchmarks have no metrics
            seen.add(manifest["task"])
            lines += _headline(manifest, results)
            about = [line.strip() for line in setting(name, results).splitlines()[1:]]
            notes.append(f"* {(manifest['paper_model'] or manifest['title']).rstrip('?.')}. {' '.join(about)}\n")
    table = pd.DataFrame(lines)
    return f"{to_markdown(table.loc[:, table.astype(bool).any()])}\n{''.join(notes)}"


def _headline(manifest: dict[str, Any], results: Path) -> list[dict[str, str]]:
    """Lines of the baseline and of the rows of which the paper has an accuracy or a speed-up, of all rows if it has
    none; speeds are those of the notebook's table."""
    name, (metric, label) = manifest["artefact"], next(iter(manifest["metrics"].items()))
    value = load_published(name).set_index(["row", "quantity"])["value"]
    runs, speeds = load_records(name, results), results / "tables" / f"{name}_speed.csv"
    accuracy = with_interval(mean_interval(runs, metric)) if len(runs) else pd.Series(dtype=object)
    table = pd.read_csv(speeds, dtype=str, keep_default_na=False) if speeds.is_file() else pd.DataFrame({"name": []})
    speedup = dict(zip(table["name"], table.get("speed-up", []), strict=True))
    ran = [row for row in manifest["rows"] if row["why"] is None]
    known = {row for row, quantity in value.index if quantity in (metric, "speedup")}
    return [
        {
            "paper's model": manifest["paper_model"] or "",
            "pruning": row["paper_name"],
            "metric": f"{label} (%)",
            "published": write(value.get((row["row"], metric), float("nan"))),
            "measured, small model": accuracy.get(row["row"], ""),
            "published speed-up": write(value.get((row["row"], "speedup"), float("nan"))),
            "measured speed-up": speedup.get(row["paper_name"], ""),
        }
        for row in ran
        if not known or row["row"] in known or row["row"] == manifest["baseline"]
    ]


def render(results: Path, names: list[str], claims: pd.DataFrame) -> str:
    """The page."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        manifest = load_manifest(name, results)
        entry = {key: manifest[key] for key in ("artefact", "title", "question")}
        entry |= {"figure": _figure(results, name), "table": _table(results / "tables" / f"{name}.md")}
        sections.setdefault(manifest["section"], []).append(entry)
    manifest = load_manifest(names[0], results)
    titles = {name: load_manifest(name, results)["title"] for name in names}
    first = [{"figure": picture, "text": text} for name, text in FIRST.items() if (picture := _figure(results, name))]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        scale=manifest["scale"],
        seeds=", ".join(map(str, manifest["seeds"])),
        devices=_devices(results, names),
        first=first,
        counts={verdict: int((claims["verdict"] == verdict).sum()) for verdict in VERDICTS},
        signs=VERDICTS,
        claims={
            (str(name), titles[str(name)]): own.to_dict("records")
            for name, own in claims.groupby("notebook", sort=False)
        },
        sections=sections,
    )


def _devices(results: Path, names: list[str]) -> list[str]:
    """Devices on which speed was measured."""
    frames = [load_speed(name, results, partial=True) for name in names if load_manifest(name, results)["metrics"]]
    return sorted({device for frame in frames if "device" in frame for device in frame["device"]})


def _figure(results: Path, name: str) -> str | None:
    """The artefact's main figure as a data URI; None if it has none."""
    path = results / "figures" / f"{name}.png"
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None


def _table(path: Path) -> Markup | None:
    """A pipe table as HTML whose cells know their columns, for narrow windows; None if the artefact has none."""
    if not path.is_file():
        return None
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in path.read_text(encoding="utf-8").splitlines()]
    head, _, *cells = [[escape(cell.strip().replace(r"\|", "|")) for cell in line] for line in lines]
    columns = "".join(f"<th>{name}</th>" for name in head)
    rows = (
        "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(head, line, strict=True)) for line in cells
    )
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return Markup(f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>")


if __name__ == "__main__":
    raise SystemExit(main())
