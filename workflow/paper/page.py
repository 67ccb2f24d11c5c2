"""Write ``report.html``, the tables of claims and the headline table of a scale.

    python -m workflow.paper.page --results results/laptop --out results/laptop/report.html

The page lies beside the folders ``notebooks``, ``tables`` and ``figures`` and links into them; it loads nothing else.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cropr.records import write_text
from workflow.paper.claims import verdicts
from workflow.paper.output import to_markdown
from workflow.paper.records import REPOSITORY, load_manifest, load_published, load_records, load_speed, setting
from workflow.paper.stats import mean_interval, median_interval, with_interval, write

TEMPLATES = REPOSITORY / "workflow" / "report"
SIGNS = {"holds": "✓", "contradicted": "✗", "undecided": "?"}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of a scale, with its manifests")
    parser.add_argument("--out", type=Path, required=True, help="page to write")
    args = parser.parse_args(argv)
    names = artefacts(args.results)
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
    """Verdicts of all claims: notebook, claim, measured, claimed, verdict, why, source."""
    parts = []
    for name in names:
        if load_manifest(name, results)["metrics"]:  # microbenchmarks have no rows to compare
            found = verdicts(name, results)
            found.insert(0, "notebook", name)
            parts.append(found)
    return pd.concat(parts, ignore_index=True)


def headline(results: Path, names: list[str]) -> str:
    """The README's table as Markdown: published beside measured, for rows that the paper has accuracies of."""
    lines: list[dict[str, str]] = []
    captions: dict[str, None] = {}
    for name in names:
        manifest = load_manifest(name, results)
        published = load_published(name)
        if not manifest["metrics"] or published.empty or all(row["bench"] is None for row in manifest["rows"]):
            continue
        metric, label = next(iter(manifest["metrics"].items()))
        if name != first_of_task(results, names, manifest["task"]):
            continue
        runs, speed = load_records(name, results), load_speed(name, results)
        accuracy = with_interval(mean_interval(runs, metric)) if len(runs) else {}
        speedup = with_interval(median_interval(speed, "speedup"), digits=2) if len(speed) else {}
        value = published.set_index(["row", "quantity"])["value"]
        for row in manifest["rows"]:
            if row["why"] is None and ((row["row"], metric) in value or (row["row"], "speedup") in value):
                lines.append(
                    {
                        "model (paper), metric": f"{manifest['paper_model']}, {label} (%)",
                        "pruning": row["paper_name"],
                        "published": write(value.get((row["row"], metric), float("nan"))),
                        "measured, small model": accuracy.get(row["row"], ""),
                        "published speed-up": write(value.get((row["row"], "speedup"), float("nan"))),
                        "measured speed-up": speedup.get(row["row"], ""),
                    }
                )
        captions |= dict.fromkeys(setting(name, results).splitlines()[1:])
    about = " ".join(line.strip() for line in captions)
    return f"{to_markdown(pd.DataFrame(lines))}\n{about}\n"


def first_of_task(results: Path, names: list[str], task: str) -> str:
    """The artefact that compares methods on a task: the first one."""
    return next(name for name in names if load_manifest(name, results)["task"] == task)


def render(results: Path, names: list[str], claims: pd.DataFrame) -> str:
    """The page."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        manifest = load_manifest(name, results)
        entry = {key: manifest[key] for key in ("artefact", "title", "question")}
        entry |= {"figure": _figure(results, name), "table": _table(results / "tables" / f"{name}.csv")}
        sections.setdefault(manifest["section"], []).append(entry)
    manifest = load_manifest(names[0], results)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        scale=manifest["scale"],
        seeds=", ".join(map(str, manifest["seeds"])),
        device=sorted({device for name in names for device in load_speed_devices(name, results)}),
        counts={verdict: int((claims["verdict"] == verdict).sum()) for verdict in SIGNS},
        signs=SIGNS,
        claims=claims.to_dict("records"),
        sections=sections,
    )


def load_speed_devices(name: str, results: Path) -> list[str]:
    """Devices on which the speed of an artefact's rows was measured."""
    speed = load_speed(name, results) if load_manifest(name, results)["metrics"] else pd.DataFrame()
    return list(speed["device"].unique()) if "device" in speed else []


def _figure(results: Path, name: str) -> str | None:
    """The artefact's first figure as a data URI; None if it has none."""
    paths = sorted((results / "figures").glob(f"{name}*.png"), key=lambda path: (len(path.stem), path.stem))
    own = [path for path in paths if path.stem == name or not path.stem.startswith(("pruning_maps_",))]
    if not own:
        return None
    return "data:image/png;base64," + base64.b64encode(own[0].read_bytes()).decode()


def _table(path: Path) -> Markup | None:
    """The artefact's main table as HTML; None if it has none."""
    if not path.is_file():
        return None
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return Markup(frame.to_html(index=False, border=0, escape=True))


if __name__ == "__main__":
    raise SystemExit(main())
