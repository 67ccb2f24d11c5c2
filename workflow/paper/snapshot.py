"""Copy a finished run to docs/rendered/ and bring the README's tables of measurements up to date.

    python workflow/snapshot.py results/laptop      copy, then rewrite the tables
    python workflow/snapshot.py                     rewrite the tables from what docs/ holds

Nothing is replaced unless all of it can be.

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
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("notebooks/*.ipynb", "tables/*.csv", "tables/*.md", "figures/pruning_maps*.png")


class Methods(NamedTuple):
    """A table of methods."""

    measured: dict[str, str]
    """Quantity to its name as a column; the first is the one that is published, too."""
    timed: str
    """The model whose speed is measured."""
    published: str
    """The first quantity's name in the paper."""
    rows: str


METHODS = {
    "imagenet_methods": Methods(
        {"top1": "top-1, small ViT on scenes"},
        "ViT-L/16",
        "top-1, ImageNet",
        "none cropr_r8_llf variance_r8_llf attn_topk_r8_llf random_r8_llf non_salient_r8_llf",
    ),
    "ade20k": Methods(
        {"miou": "mIoU, small EVA on scenes"}, "EVA-02-L", "mIoU, ADE20k", "none cropr variance attn_topk random"
    ),
    "reactivation": Methods(
        {"miou": "mIoU, small EVA on scenes", "miou_difference": "difference"},
        "",
        "mIoU, ADE20k",
        "unpruned llf llf_no_self cross exit concat none_pruned",
    ),
    "coco": Methods(
        {"box_ap": "box AP, small detector on scenes", "mask_ap": "mask AP"},
        "EVA-02-L's encoder",
        "box AP, COCO",
        "none cropr random",
    ),
}
SPEEDS = {"speedup": "", "speedup_whole": ", whole detector"}
VARIANTS = {"unpruned": "unpruned", "cropr": "Cropr", "cropr_llf": "Cropr + LLF"}
SCALE = "laptop"
"""What the README shows."""
SPEEDUP = {"measured": "speedup", "low": "speedup_low", "high": "speedup_high"}
_REGION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Run from the command line. Returns 0, or 2 with one message where the run is not finished."""
    docs, readme = ROOT / "docs", ROOT / "README.md"
    try:
        with TemporaryDirectory(dir=docs) as folder:
            fresh = Path(folder) / "rendered"
            collect(Path(argv[0]), docs / "rendered", fresh) if argv else shutil.copytree(docs / "rendered", fresh)
            text = refreshed(readme.read_text(encoding="utf-8"), fresh, docs / "records")
            if argv:
                shutil.rmtree(docs / "rendered")
                fresh.rename(docs / "rendered")
            readme.write_text(text, encoding="utf-8")
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def collect(results: Path, before: Path, rendered: Path) -> None:
    """Put notebooks, tables and maps of a run into a new folder, with the README of the one before.

    Raises:
        FileNotFoundError: the run has no report, which is made last.
        ValueError: the report is older than a notebook, or the run is of another scale than the README is about.
    """
    if results.name != SCALE:
        raise ValueError(f"{results}: the README shows the scale {SCALE}; run that one")
    report = results / "report.html"
    if not report.exists():
        raise FileNotFoundError(f"{results}: no finished run; make reproduce SCALE={results.name} first")
    newer = [path for path in results.glob("notebooks/*.ipynb") if path.stat().st_mtime > report.stat().st_mtime]
    if newer:
        raise ValueError(f"{report} is older than {newer[0].name}; make reproduce SCALE={results.name} first")
    rendered.mkdir(parents=True)
    for path in [before / "README.md", *(path for pattern in COPIED for path in sorted(results.glob(pattern)))]:
        shutil.copy(path, rendered)


def refreshed(text: str, rendered: Path, records: Path) -> str:
    """``text`` with every region between markers made anew.

    Args:
        rendered: the snapshot.
        records: of single measurements.

    Raises:
        KeyError: a region of an unknown name, or a row that a table lacks.
        FileNotFoundError: a table that the snapshot lacks.
    """

    def region(match: re.Match[str]) -> str:
        head, *lines = _table(match[2], rendered, records)
        rows = (head, ["---"] * len(head), *lines)
        return match[1] + "".join(f"| {' | '.join(line)} |\n" for line in rows) + match[3]

    return _REGION.sub(region, text)


def _table(name: str, rendered: Path, records: Path) -> Iterable[list[str]]:
    makers: dict[str, Callable[[], Iterable[list[str]]]] = {
        "claims": lambda: _claims(rendered),
        "records": lambda: _records(records),
        "laboratory": lambda: _laboratory(rendered, records),
        **dict.fromkeys(METHODS, lambda: _methods(name, rendered)),
    }
    if name not in makers:
        raise KeyError(f"README.md has a region {name!r}; choose one of {sorted(makers)}")
    return makers[name]()


def _methods(name: str, rendered: Path) -> Iterable[list[str]]:
    found, about = {line["row"]: line for line in _lines(rendered, name)}, METHODS[name]
    lines = [found[row] for row in about.rows.split()]
    (seeds,) = {line["seeds"] for line in lines}
    speeds = [key for key in SPEEDS if any(line.get(f"{key}.measured") for line in found.values())]
    published = f"{next(iter(about.measured))}.published"
    head = ["pruning", *about.measured.values()]
    head[1] += f" ({seeds} seed{'s' * (seeds != '1')})"
    for key in speeds:
        head += [f"speed-up{SPEEDS[key] or f', {about.timed}'}", "ratio of multiply-adds"]
    yield [*head, f"published {about.published}", *(f"published speed-up{SPEEDS[key]}" for key in speeds)]
    for line in lines:
        cells = [line["label"], *(_interval(line, quantity, 1) for quantity in about.measured)]
        for key in speeds:
            cells += [_interval(line, key, 2), _number(line.get(f"{key}.bound"), 2)]
        yield [*cells, _number(line.get(published), 1), *(_number(line.get(f"{key}.published"), 1) for key in speeds)]


def _claims(rendered: Path) -> Iterable[list[str]]:
    """Claim, measured, claimed, verdict (with the reason where it is undecided), whose claim it is."""
    lines = (rendered / "claims.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    yield ["claim", "measured", "claimed", "verdict", "from"]
    for text, measured, claimed, verdict, why, source in table[2:]:
        if measured == "—":
            continue  # of a row that this scale leaves out
        reason = f" ({why})" if "undecided" in verdict else ""
        yield [text, measured, claimed, verdict + reason, re.split("[,;]", source)[0]]


def _records(records: Path) -> Iterable[list[str]]:
    yield ["deployed model", "precision, batch", "speed-up", "ratio of multiply-adds", "share of it", "rounds"]
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] != "bench":
            continue
        spec, metrics = record["spec"], record["metrics"]
        (schedule,) = spec["prune"]["schedule"].items()
        rate = f"R = {schedule[1]['rate']}" if schedule[0] == "constant" else f"{schedule[0]} {schedule[1]['at']}"
        fusion = " + LLF" if spec["prune"]["fusion"] == "llf" else ""
        size = spec["model"]["args"].get("patch_size")
        patch = f", patches of {size}" if size else ""
        yield [
            f"[{spec['model']['name']}](docs/records/{path.name}), {spec['image_size']} px{patch}, {rate}{fusion}",
            f"{spec['precision']}, {spec['batch_size']}",
            _interval(_speedup(metrics), "speedup", 2),
            f"{metrics['bound']:.2f}",
            f"{metrics['share_of_bound']:.2f}",
            str(spec["rounds"]),
        ]


def _laboratory(rendered: Path, records: Path) -> Iterable[list[str]]:
    """What stands in notebooks of the laboratory and in the record of the ONNX file."""

    def cell(name: str, **at: str) -> dict[str, str]:
        found = [line for line in _lines(rendered, name) if all(line.get(key) == value for key, value in at.items())]
        if len(found) != 1:
            raise KeyError(f"{rendered / name}.csv has {len(found)} lines with {at}, not one")
        return found[0]

    yield ["what", "measured", "notebook or command"]
    fastest = {name: cell("precision", variant=name, precision="bf16", attention="flash") for name in VARIANTS}
    gains = [f"{VARIANTS[name]} {_interval(line, 'gain', 1)}" for name, line in fastest.items()]
    what = "bf16 with flash attention, times faster than the unpruned ViT-L/16 in fp32 with math attention"
    yield [what, "; ".join(gains), "`precision`"]
    shares = [
        f"{VARIANTS[name]} {_number(cell('profile', row='vit_l_224', variant=name)['pruning_share.measured'], 1)} %"
        for name in ("cropr", "cropr_llf")
    ]
    yield ["scoring, selecting, gathering, fusing: share of the pruned pass, ViT-L/16", "; ".join(shares), "`profile`"]
    steps = [
        f"{name} {_interval(cell('memory', row=row, variant='cropr_llf'), 'speedup', 2)}"
        for row, name in (("laptop_vit", "small ViT, 64 px"), ("vit_s_224", "ViT-S/16, 224 px"))
    ]
    yield ["a training step with Cropr and LLF, times faster than without pruning", "; ".join(steps), "`memory`"]
    one = cell("profile", row="scoring", variant="one_vector")
    text = f"{_interval(one, 'over_all_queries', 2)} times faster"
    yield ["one vector for scoring, against all 1024 queries, EVA-02-L at 512 px", text, "`profile`"]
    errors = sorted(abs(float(line["error.measured"])) for line in _lines(rendered, "plan"))
    text = f"off by {errors[-1]:.1f} % at most, {errors[len(errors) // 2]:.1f} % in the median"
    yield [f"`plan`: predicted speed-up against measured, {len(errors)} targets, ViT-B/16", text, "`plan`"]
    metrics = json.loads((records / "export.json").read_text(encoding="utf-8"))["metrics"]
    speedup = _interval(_speedup(metrics), "speedup", 2)
    text = f"the same tokens, logits within {metrics['logits_difference']:.0e}, {speedup} of {metrics['bound']:.2f}"
    command = "`python -m cropr export --model vit_base_patch16_224 --rate 16 --bench --out exported`"
    yield ["ONNX in onnxruntime, ViT-B/16, R = 16 + LLF, speed-up over its unpruned file", text, command]


def _lines(rendered: Path, name: str) -> list[dict[str, str]]:
    with (rendered / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _speedup(metrics: dict[str, Any]) -> dict[str, str]:
    """A record's speed-up as a line of a table has it."""
    return {f"speedup.{end}": str(metrics[key]) for end, key in SPEEDUP.items()}


def _interval(line: dict[str, str], quantity: str, digits: int) -> str:
    """``76.9 [75.6, 78.3]``; differences with their sign; empty where nothing was measured."""
    sign = "+" if quantity.endswith("_difference") else ""
    texts = [_number(line.get(f"{quantity}.{key}"), digits, sign) for key in ("measured", "low", "high")]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if texts[1] else "")


def _number(text: str | None, digits: int, sign: str = "") -> str:
    return f"{float(text):{sign}.{digits}f}" if text else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
