"""One offline page to start reading from: claims with verdicts, a picture and a link for each notebook, the runs.

    python -m workflow.paper.page --manifests results/laptop/manifests/*.json --out results/laptop/report.html

Everything that the page shows lies inside of it; links to the notebooks' pages and figures are relative.
"""

from __future__ import annotations

import argparse
import base64
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from cropr.records import write_text
from workflow.paper import setting, text
from workflow.paper.claims import OUTCOMES, Judgement, judge_all, load_claims
from workflow.paper.load import Artefact, Record, load, make_command
from workflow.paper.names import row_names
from workflow.paper.quantities import TASKS, quantity
from workflow.paper.tables import claims_table
from workflow.paper.template import PAGE

THUMBNAIL = (1000, 1500)
"""Pixels at most; the full figure is a link away. Tall figures are cut at the bottom."""
_LOG = logging.getLogger("cropr")


@dataclass(frozen=True)
class Entry:
    """What the page says of an artefact."""

    question: str
    figures: tuple[str, ...]
    """Figures shown, by what follows the artefact's name in theirs; empty for a figure that has its very name."""
    sentences: tuple[Callable[[Artefact], str], ...] = (text.coverage,)


_METHODS = (text.coverage, text.accuracy, text.speed)
ENTRIES = {
    "imagenet_methods": Entry(
        "Does it matter which patches are pruned, and does the saved arithmetic turn into speed?",
        ("trade_off", "speed"),
        _METHODS,
    ),
    "ablations": Entry("What is each part of the Cropr module worth?", ("forest",), (text.ablations,)),
    "pruning_maps": Entry("Which patches does each method drop, and when?", ("",)),
    "relevance": Entry("Do the kept patches lie on the object?", ("curves",), (text.relevance,)),
    "ade20k": Entry("Does pruning hurt where every pixel wants a label?", ("trade_off", "speed"), _METHODS),
    "reactivation": Entry("What brings pruned patches back?", ("forest",), (text.ablations,)),
    "pruning_maps_segmentation": Entry("Which patches go where every pixel wants a label, and what comes back?", ("",)),
    "coco": Entry("How many patches can go before boxes and masks get worse?", ("trade_off", "speed"), _METHODS),
    "pruning_maps_detection": Entry("Which patches does a detector drop, and which objects does it still find?", ("",)),
    "precision": Entry("Does pruning still pay on top of low precision and fused attention?", ("throughput",)),
    "alignment": Entry("What does a token count off by one cost?", ("curve",)),
    "breakeven": Entry("From which batch and model size on does pruning pay?", ("batches",)),
    "profile": Entry("Where does the time of a pruned forward pass go?", ("parts",)),
    "memory": Entry("What does pruning save in training?", ("bars",)),
    "plan": Entry("Which schedule meets a budget, and is its speed what was foretold?", ("predicted",)),
}
"""By artefact; others have coverage alone."""


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    name: str
    source: str
    """``data:`` address."""
    link: str
    """Relative path of the full figure."""
    cut: bool
    """Whether its lower part is missing here."""


@dataclass(frozen=True)
class Section:
    """What the page says of one notebook."""

    name: str
    title: str
    question: str
    link: str | None
    """Relative path of the notebook's page; None if it is not there."""
    sentences: list[Markup]
    pictures: list[Picture]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 0, or 2 with one message for an error of the user's."""
    parser = argparse.ArgumentParser(prog="workflow.paper.page", description="Write the page to start reading from.")
    parser.add_argument("--manifests", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--claims", type=Path, default=Path("config/claims.yaml"), metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--claims-table", type=Path, metavar="FILE", help="the claims with their verdicts, as Markdown")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        artefacts = [load(manifest) for manifest in args.manifests]
        judgements = judge_all(load_claims(args.claims), by_name(artefacts))
        write_text(args.out, render(artefacts, judgements, args.out.parent))
        if args.claims_table:
            write_text(args.claims_table, claims_table(judgements).markdown())
    except (ValueError, FileNotFoundError) as error:
        _LOG.error("error: %s", error)
        return 2
    _LOG.info("wrote %s", args.out)
    return 0


def render(artefacts: Sequence[Artefact], judgements: Sequence[Judgement], folder: Path) -> str:
    """The page as HTML.

    Args:
        artefacts: of one scale, in the order of reading.
        judgements: what they say about the claims.
        folder: where the page will lie; links start there.
    """
    first = artefacts[0]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        scale=first.manifest.scale,
        seeds=len(first.manifest.seeds),
        scope=_inline(setting.scope(first)),
        settings=[(name, [_inline(part) for part in value.split("<br>")]) for name, value in setting.settings(first)],
        claims=[_claim(judgement) for judgement in judgements],
        verdicts=_inline(text.verdicts(judgements)),
        sections=[_section(artefact, folder) for artefact in artefacts],
        runs=inventory(artefacts),
        commands=[(artefact.manifest.title, make_command(artefact.manifest)) for artefact in artefacts],
        everything=make_command(first.manifest, ""),
    )


def by_name(artefacts: Sequence[Artefact]) -> dict[str, Artefact]:
    """The artefacts of one page.

    Raises:
        ValueError: none, or of several scales.
    """
    scales = {artefact.manifest.scale for artefact in artefacts}
    if len(scales) != 1:
        raise ValueError(f"a page shows one scale, got {', '.join(sorted(scales)) or 'no manifest'}")
    return {artefact.manifest.artefact: artefact for artefact in artefacts}


def inventory(artefacts: Iterable[Artefact]) -> list[dict[str, str]]:
    """Every record once: what it is, which rows use it, seed, result, wall time, peak memory, commit, path."""
    found: dict[str, dict[str, Any]] = {}
    for artefact in artefacts:
        accuracy, speed = row_names(artefact), row_names(artefact, "speed")
        for row in artefact.manifest.rows:
            if not row.available:
                continue
            trained = zip(row.records, artefact.runs.get(row.row, {}).values(), strict=False)
            files = [(path, record, accuracy) for path, record in trained]
            if row.bench is not None:
                files.append((row.bench, artefact.benches[row.row], speed))
            for path, record, names in files:
                short = _relative(path, artefact.manifest.results)
                used = artefact.manifest.artefact, names[row.row]
                found.setdefault(short, {"record": record, "rows": []})["rows"].append(used)
    return [_run(path, entry["record"], entry["rows"]) for path, entry in found.items()]


def _run(path: str, record: Record, rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    origin, metrics = record["provenance"], record["metrics"]
    train = record["kind"] == "train"
    name = TASKS[record["spec"].get("task", "classification")].primary if train else "speedup"
    entry = quantity(name)
    result = f"{entry.label} {entry.write(format(metrics[name], f'.{entry.digits}f'))}" if name in metrics else ""
    return {
        "kind": {"train": "training", "bench": "throughput", "lab": "laboratory"}.get(
            record["kind"], str(record["kind"])
        ),
        "rows": rows[0][1] + (f" and {len(rows) - 1} more" if len(rows) > 1 else ""),
        "all_rows": "; ".join(f"{artefact}: {name}" for artefact, name in rows),
        "seed": str(record["seed"]) if train else "",
        "result": result,
        "time": _duration(origin.get("wall_s")),
        "memory": f"{origin['peak_memory_mb']:,.0f} MB" if origin.get("peak_memory_mb") else "",
        "commit": str(origin.get("commit") or "none")[:10] + ("+" if origin.get("dirty") else ""),
        "path": path,
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _claim(judgement: Judgement) -> dict[str, str]:
    return {
        "text": judgement.claim.text,
        "source": judgement.claim.source,
        "needed": judgement.claim.relation,
        "measured": judgement.measured,
        "outcome": judgement.verdict.outcome,
        "verdict": OUTCOMES[judgement.verdict.outcome],
        "reason": judgement.verdict.reason,
    }


def _section(artefact: Artefact, folder: Path) -> Section:
    name = artefact.manifest.artefact
    entry = ENTRIES.get(name, Entry("", ("",)))
    results = artefact.root / artefact.manifest.results
    page = results / "notebooks" / f"{name}.html"
    files = [results / "figures" / f"{'_'.join(filter(None, (name, figure)))}.png" for figure in entry.figures]
    return Section(
        name,
        artefact.manifest.title,
        entry.question,
        _relative(page, folder) if page.is_file() else None,
        [_inline(sentence(artefact)) for sentence in entry.sentences],
        [_picture(file, folder) for file in files if file.is_file()],
    )


def _picture(path: Path, folder: Path) -> Picture:
    """A smaller copy of a figure, embedded."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        width = min(THUMBNAIL[0], small.width)
        small = small.resize((width, round(small.height * width / small.width)), Image.Resampling.LANCZOS)
        cut = small.height > THUMBNAIL[1]
        small = small.crop((0, 0, width, min(small.height, THUMBNAIL[1])))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(path.stem.replace("_", " "), source, _relative(path, folder), cut)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _inline(markdown: str) -> Markup:
    """The little Markdown that ``text`` writes inside of a sentence: bold and code."""
    html = str(Markup.escape(markdown))
    for mark, tag in (("**", "strong"), ("`", "code")):
        parts = html.split(mark)
        html = parts[0] + "".join(
            f"<{tag}>{part}" if number % 2 else f"</{tag}>{part}" for number, part in enumerate(parts[1:], start=1)
        )
    return Markup(html)


if __name__ == "__main__":
    sys.exit(main())
