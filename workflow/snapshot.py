"""Copy a finished run to docs/rendered/ and bring the README's tables of measurements up to date.

    python workflow/snapshot.py results/laptop      copy, then rewrite the tables
    python workflow/snapshot.py                     rewrite the tables from what docs/ holds

The tables stand in the README between ``<!-- measured: NAME -->`` and ``<!-- end -->``; no number in them is written by
hand. They come from the copied ``tables/*.csv`` and from the records of single measurements in docs/records/.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("notebooks/*.ipynb", "tables/*.csv", "tables/*.md", "figures/pruning_maps*.png")


class Methods(NamedTuple):
    """A table of methods."""

    measured: dict[str, str]
    """Quantity to its name as a column; the first is the one that is published, too."""
    published: str
    """Its name there."""
    rows: str


METHODS = {
    "imagenet_methods": Methods(
        {"top1": "top-1, scenes"},
        "top-1, ImageNet",
        "none cropr_r8_llf variance_r8_llf attn_topk_r8_llf random_r8_llf non_salient_r8_llf",
    ),
    "ade20k": Methods({"miou": "mIoU, scenes"}, "mIoU, ADE20k", "none cropr variance attn_topk random"),
    "reactivation": Methods(
        {"miou": "mIoU, scenes", "miou_difference": "difference"},
        "mIoU, ADE20k",
        "unpruned llf llf_no_self cross exit concat none_pruned",
    ),
    "coco": Methods({"box_ap": "box AP, scenes", "mask_ap": "mask AP"}, "box AP, COCO", "none cropr random"),
}
VARIANTS = {"unpruned": "unpruned", "cropr": "with Cropr", "cropr_llf": "with Cropr and LLF"}
_REGION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Run from the command line. Returns 0, or 2 with one message where the run is not finished."""
    rendered = ROOT / "docs" / "rendered"
    try:
        if argv:
            copy(Path(argv[0]), rendered)
        readme = ROOT / "README.md"
        readme.write_text(refreshed(readme.read_text(encoding="utf-8"), ROOT / "docs"), encoding="utf-8")
    except (FileNotFoundError, KeyError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def copy(results: Path, rendered: Path) -> None:
    """Replace the snapshot by notebooks, tables and maps of a run.

    Raises:
        FileNotFoundError: the run has no such files, or no report, which is made last.
    """
    if not (results / "report.html").exists():
        raise FileNotFoundError(f"{results}: no finished run; make reproduce SCALE={results.name} first")
    for old in rendered.iterdir():
        if old.name != "README.md":
            old.unlink()
    for pattern in COPIED:
        for path in sorted(results.glob(pattern)):
            shutil.copy(path, rendered)


def refreshed(text: str, docs: Path) -> str:
    """``text`` with every region between markers made anew.

    Raises:
        KeyError: a region of an unknown name.
        FileNotFoundError: a table that the snapshot lacks.
    """

    def region(match: re.Match[str]) -> str:
        return f"{match[1]}{_table(match[2], docs)}\n{match[3]}"

    return _REGION.sub(region, text)


def _table(name: str, docs: Path) -> str:
    makers: dict[str, Callable[[Path], Iterable[list[str]]]] = {
        "claims": _claims,
        "records": _records,
        "laboratory": _laboratory,
        **dict.fromkeys(METHODS, lambda docs: _methods(name, docs)),
    }
    if name not in makers:
        raise KeyError(f"README.md has a region {name!r}; choose one of {sorted(makers)}")
    head, *lines = makers[name](docs)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _methods(name: str, docs: Path) -> Iterable[list[str]]:
    found = {line["row"]: line for line in _lines(docs, name)}
    about = METHODS[name]
    timed = any(line.get("speedup.measured") for line in found.values())
    published = f"{next(iter(about.measured))}.published"
    speeds = ["speed-up", "bound by multiply-adds"] * timed
    yield ["pruning", *about.measured.values(), *speeds, f"published {about.published}"] + [
        "published speed-up"
    ] * timed
    for row in about.rows.split():
        line = found[row]
        cells = [line["label"], *(_interval(line, quantity, digits=1) for quantity in about.measured)]
        if timed:
            cells += [_interval(line, "speedup", digits=2), _number(line.get("speedup.bound"), 2)]
        cells.append(_number(line.get(published), 1))
        if timed:
            cells.append(_number(line.get("speedup.published"), 1))
        yield cells


def _claims(docs: Path) -> Iterable[list[str]]:
    """The first four columns: claim, measured, claimed, verdict."""
    lines = (docs / "rendered" / "claims.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [cells[:4] for cells in table if not set(cells[0]) <= set("- ")]


def _records(docs: Path) -> Iterable[list[str]]:
    yield ["deployed model", "precision, batch", "speed-up", "bound", "share of the bound", "rounds"]
    for path in sorted((docs / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] != "bench":
            continue
        spec, metrics = record["spec"], record["metrics"]
        rate = spec["prune"]["schedule"]["constant"]["rate"]
        fusion = " + LLF" if spec["prune"]["fusion"] == "llf" else ""
        yield [
            f"[{spec['model']['name']}](docs/records/{path.name}), {spec['image_size']} px, R = {rate}{fusion}",
            f"{spec['precision']}, {spec['batch_size']}",
            _interval({f"speedup.{key}": _of(metrics, key) for key in ("measured", "low", "high")}, "speedup", 2),
            f"{metrics['bound']:.2f}",
            f"{metrics['share_of_bound']:.2f}",
            str(spec["rounds"]),
        ]


def _laboratory(docs: Path) -> Iterable[list[str]]:
    """What stands in notebooks of the laboratory and in the record of the ONNX file."""

    def cell(name: str, **at: str) -> dict[str, str]:
        (line,) = [line for line in _lines(docs, name) if all(line.get(key) == value for key, value in at.items())]
        return line

    yield ["what", "measured", "notebook or command"]
    fastest = {name: cell("precision", variant=name, precision="bf16", attention="flash") for name in VARIANTS}
    gains = [f"{_interval(line, 'gain', 1)} {VARIANTS[name]}" for name, line in fastest.items()]
    yield ["bf16 with flash over fp32 with math attention, ViT-L/16, times faster", "; ".join(gains), "`precision`"]
    shares = [
        f"{_number(cell('profile', row='vit_l_224', variant=name)['pruning_share.measured'], 1)} % {VARIANTS[name]}"
        for name in ("cropr", "cropr_llf")
    ]
    yield ["scoring, selecting, gathering, fusing: share of the pruned pass, ViT-L/16", "; ".join(shares), "`profile`"]
    one = cell("profile", row="scoring", variant="one_vector")
    text = f"{_interval(one, 'over_all_queries', 2)} times faster"
    yield ["one vector for scoring, against all 1024 queries, EVA-02-L at 512 px", text, "`profile`"]
    errors = sorted(abs(float(line["error.measured"])) for line in _lines(docs, "plan"))
    text = f"off by {errors[-1]:.1f} % at most, {errors[len(errors) // 2]:.1f} % in the median"
    yield [f"`plan`: predicted speed-up against measured, {len(errors)} targets, ViT-B/16", text, "`plan`"]
    metrics = json.loads((docs / "records" / "export.json").read_text(encoding="utf-8"))["metrics"]
    speedup = _interval({f"speedup.{key}": _of(metrics, key) for key in ("measured", "low", "high")}, "speedup", 2)
    text = f"the same tokens, logits within {metrics['logits_difference']:.0e}, {speedup} of {metrics['bound']:.2f}"
    command = "`python -m cropr export --model vit_base_patch16_224 --rate 16 --bench --out exported`"
    yield ["ONNX in onnxruntime, ViT-B/16, R = 16 + LLF, speed-up over its unpruned file", text, command]


def _lines(docs: Path, name: str) -> list[dict[str, str]]:
    with (docs / "rendered" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _of(metrics: dict[str, Any], key: str) -> str:
    return str(metrics["speedup" if key == "measured" else f"speedup_{key}"])


def _interval(line: dict[str, str], quantity: str, digits: int) -> str:
    """``76.9 [75.6, 78.3]``; differences with their sign; empty where nothing was measured."""
    sign = "+" if quantity.endswith("_difference") else ""
    texts = [_number(line.get(f"{quantity}.{key}"), digits, sign) for key in ("measured", "low", "high")]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if texts[1] else "")


def _number(text: str | None, digits: int, sign: str = "") -> str:
    return f"{float(text):{sign}.{digits}f}" if text else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
