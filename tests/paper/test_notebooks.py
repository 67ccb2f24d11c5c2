"""Notebooks on made-up records, whose main tables plain Python computes again; the notebook runner."""

import ast
import csv
import html
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from synthetic import BASE, run_cells, write_microbench, write_results

from workflow.paper import compare
from workflow.paper import run_notebook as runner
from workflow.paper.microbench.profiling import CATEGORIES
from workflow.paper.records import REPOSITORY, load_published

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
TOP1 = ("imagenet_methods", "ablations", "relevance", "scoring", "fashion", "training_free", "tradeoff", "auxiliary")
ALL = ", all validation images"
METRIC = {
    **dict.fromkeys((*TOP1, "similarity", "model_size"), ("top1", "top-1 (%)")),
    **dict.fromkeys(("ade20k", "reactivation"), ("miou", "mIoU (%)")),
    "coco": ("box_ap", "box AP (%)"),
    "pruning_maps": ("top1", f"top-1 (%){ALL}"),
    "pruning_maps_segmentation": ("miou", f"mIoU (%){ALL}"),
    "pruning_maps_detection": ("box_ap", f"box AP (%){ALL}"),
}
T_975 = 4.302652729911275
"""Student's t of two degrees of freedom: three seeds."""


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_source_holds_no_result(path):
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    made = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in made)


@pytest.mark.parametrize("name", METRIC)
def test_code_has_one_parameter_one_import_and_no_published_or_measured_value(name):
    """Numbers of code cells are counts, sizes and limits; none is a number of the paper."""
    path = REPOSITORY / "notebooks" / f"{name}.ipynb"
    values = {value for value in load_published(name)["value"] if value > 2}
    for source in code(path):
        numbers = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        numbers = [number for number in numbers if type(number) in (int, float)]
        assert not values & set(numbers)
        assert not [number for number in numbers if isinstance(number, float) and len(str(number)) > 3]
    tagged = ["".join(cell["source"]) for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [f'results = "results/{"fashion" if name == "fashion" else "laptop"}"']
    assert re.findall(r"from (workflow\S*|cropr\S*) import", "\n".join(code(path))) == ["workflow.paper"]


@pytest.mark.workflow
@pytest.mark.parametrize(("name", "seeds"), [(name, 1 + 2 * (i % 3 > 0)) for i, name in enumerate(METRIC)])
def test_runs_and_its_main_table_is_right(tmp_path, name, seeds):
    results = write_results(tmp_path / "scale", name, seeds)
    run_cells(name, results)
    assert sorted((results / "figures").glob(f"{name}*.png"))
    metric, column = METRIC[name]
    with (results / "tables" / f"{name}.csv").open(newline="") as file:
        table = [line for line in csv.DictReader(file) if line.get("training") != "not trained"]
    manifest = json.loads((results / "manifests" / f"{name}.json").read_text())
    rows = [row for row in manifest["rows"] if row["why"] is None]
    assert len(table) == len(rows)
    found = {row["row"]: values(results, row, metric) for row in rows}
    base = found.get(BASE.get(name, "none"))
    for line, row in zip(table, rows, strict=True):
        own = found[row["row"]]
        assert line["name"].startswith(row["label"])
        assert line[column] == expected(own)
        if line.get("difference (points)"):
            differences = [mine - theirs for mine, theirs in zip(own, base, strict=True)]
            assert line["difference (points)"] == expected(differences, "+")


def values(results: Path, row: dict, metric: str) -> list[float]:
    files = [results / Path(path).relative_to("results/ci") for path in row["records"]]
    return [json.loads(file.read_text())["metrics"][metric] for file in files]


def expected(numbers: list[float], sign: str = "") -> str:
    """Mean and Student-t interval without pandas, scipy or the code under test."""
    mean = statistics.fmean(numbers)
    ends = []
    if len(numbers) == 3:
        half = T_975 * statistics.stdev(numbers) / 3**0.5
        ends = [mean - half, mean + half]
    middle, *rest = (f"{round(value, 1) + 0.0:{sign}.1f}" for value in [mean, *ends])
    return middle + (f" [{', '.join(rest)}]" if rest else "")


@pytest.mark.workflow
def test_a_missing_record_stops_the_notebook_with_the_command(tmp_path):
    results = write_results(tmp_path / "scale", "relevance", 1)
    (results / "runs" / "cropr" / "seed0" / "record.json").unlink()
    argv = [sys.executable, "-m", "workflow.paper.run_notebook", "notebooks/relevance.ipynb"]
    argv += ["--params", json.dumps({"results": str(results)}), "--executed", str(tmp_path / "log.ipynb")]
    argv += ["--notebook", str(tmp_path / "page.ipynb"), "--html", str(tmp_path / "page.html")]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "runs/cropr/seed0/record.json: no such file; make it with: snakemake" in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_two_results_folders_stand_beside_each_other(tmp_path, capsys, monkeypatch):
    for name, top in (("mine", 70.0), ("yours", 80.0)):
        write_results(tmp_path / name, "imagenet_methods", none=[top, top + 1, top + 2])
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "mine"), str(tmp_path / "yours")])
    compare.main()
    shown = capsys.readouterr().out
    assert "71.00" in shown
    assert "81.00" in shown
    assert "speed-up, B" in shown
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "mine"), str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main()


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
        nbformat().v4.new_markdown_cell("# Title\n\nFormula $a_j = \\sum_n A_{nj}$, prices $5 and $6, and\n\n$$x^2$$"),
        nbformat().v4.new_code_cell("number = 1\nname = 'nobody'", metadata={"tags": ["parameters"]}),
        *map(nbformat().v4.new_code_cell, sources),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat().write(nbformat().v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def run(source: Path, out: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflow.paper.run_notebook", str(source), "--params", json.dumps(parameters)]
    command += ["--executed", str(out / "log.ipynb"), "--notebook", str(out / "page.ipynb")]
    command += ["--html", str(out / "page.html")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=REPOSITORY)


@pytest.mark.workflow
def test_runs_with_typed_parameters_and_is_stable(tmp_path: Path) -> None:
    printed = "import os; print(type(number).__name__, number, name, os.getcwd(), object())"
    source = notebook(tmp_path / "page.ipynb", printed, PICTURE)
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
def test_failed_notebook_is_kept_and_not_published_and_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    source = notebook(tmp_path / "page.ipynb", "print('before')", "raise KeyError('cropr_r9')")
    result = run(source, tmp_path / "out")
    assert result.returncode == 1
    assert "KeyError" in result.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"log.ipynb"}
    executed = (tmp_path / "out/log.ipynb").read_text()
    assert "before" in executed
    assert "cropr_r9" in executed
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
    assert 'Top-1 of "Cropr" > 80 & rising' in html.unescape(first)
    assert "No description" in second  # nbconvert says so itself


def assert_offline(page: str) -> None:
    """No script, style sheet, picture or frame comes from elsewhere."""
    elsewhere = r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?!data:)|<link\b[^>]*\bhref=["'](?!data:)"""
    assert not re.findall(elsewhere + r"""|@import|url\(["']?(?:https?:)?//|import\(["']https?:""", page)


NOISE = (1.0, 1.1, 0.97) * 2
"""Factors of the pruned models' times by round. The interval of six rounds is their range."""
SPEED = {"unpruned": 1.0, "cropr": 1.8, "cropr_llf": 1.7}
SWEEPS = {
    "methods_speed": (("r8", "r50"), {**SPEED, "control": 1.0}),
    "model_scaling": (("vit_b_224", "vit_l_224", "vit_h_224", "vit_l_448"), {"unpruned": 1.0, "cropr_llf": 1.7}),
    "eva02": (("eva02_l_448",), SPEED),
}
"""Rows and variants of notebooks whose main table leaves out the unpruned model and the control."""


def cell(
    variant: str, speed: float, base: float = 2.0, metrics: dict[str, float] | None = None, **setting: Any
) -> dict:
    """A variant that is ``speed`` times as fast as ``base`` seconds."""
    seconds = [base * (1 if variant == "unpruned" else noise) / speed for noise in NOISE]
    setting = {"precision": "fp32", "attention": "math", "batch_size": 4, "tokens": [17, 9, 17], **setting}
    common = {"images_per_s": 4 / median(seconds), "mfu": 0.5, "mac_ratio": 1.1 * speed, "gmacs": 9 / speed}
    series = {"seconds": seconds, "base_seconds": [base * (1 if variant == "unpruned" else 1.02)] * len(NOISE)}
    return {"variant": variant, **setting, **series, "metrics": common | {"batch_size": 2} | (metrics or {})}


def block(count: int) -> dict:
    """Counts that are not multiples of 8 take longer."""
    latency = 0.01 + 1e-4 * count + (0.002 if count % 8 else 0)
    setting = {"tokens": count, "precision": "fp32", "attention": "auto", "batch_size": 2, "seconds": [latency] * 3}
    return {**setting, "metrics": {"block_s": latency, "block_s_iqr": 0.0, "block_gmacs": 0.1}}


def target(asked: float, reason: str | None, **metrics: float) -> dict:
    line = {"target": asked, "schedule": f"R={asked:g}", "config": {}, "predicted": 1.05 * asked}
    return {**line, "metrics": metrics, "rounds": 2, "reached": reason is None, "reason": reason}


def microbench_records() -> dict[str, dict[str, list[dict]]]:
    """Cells by artefact and row. In ``breakeven``, one image is slower when pruned; no device has cudnn's kernel."""
    seconds = {part: 0.001 * number for number, part in enumerate(CATEGORIES, 1)}
    profile = {"batch_size": 4, "precision": "fp32", "attention": "auto", "seconds": seconds}
    profile["metrics"] = {"total_s": sum(seconds.values()), "pruning_share": 0.4, "gmacs": 3.0}
    settings = [("fp32", "math", 2.0), ("fp32", "flash", 1.6), ("amp_bf16", "flash", 1.0)]
    sweep = [cell(v, s, base, precision=p, attention=a) for p, a, base in settings for v, s in SPEED.items()]
    gone = {"variant": "cropr", "precision": "fp32", "attention": "cudnn", "batch_size": 4, "unsupported": "no kernel"}
    pays = [cell(v, s if size > 1 else 1 / s, batch_size=size) for size in (1, 8) for v, s in [*SPEED.items()][::2]]
    step = {v: {"step_ms": 9 / s, "training_memory_mb": 8 / s, "inference_memory_mb": 1.0} for v, s in SPEED.items()}
    schedules = {"unpruned": 1.0, "as_in_paper": 1.5, "multiples_of_8": 1.7, "one_token_more": 1.6}
    scoring = {"unpruned": 1.0, "one_vector": 1.9, "all_queries": 1.6}
    measured = target(1.5, None, speedup=1.52, speedup_low=1.35, speedup_high=1.8)
    return {
        "precision": {"vit_l_224": [*sweep, gone]},
        "alignment": {"blocks": [*map(block, range(30, 67))], "schedules": [cell(v, s) for v, s in schedules.items()]},
        "breakeven": {"vit_s": pays, "vit_b": pays},
        "profile": {
            "vit_l_224": [{"variant": v, **profile} for v in SPEED],
            "scoring": [cell(v, s) for v, s in scoring.items()],
        },
        "memory": {row: [cell(v, s, metrics=step[v]) for v, s in SPEED.items()] for row in ("vit_s_224", "laptop_vit")},
        **{name: {row: [cell(v, s) for v, s in each.items()] for row in rows} for name, (rows, each) in SWEEPS.items()},
        "plan": {"plan": [measured, target(9.0, "out of reach") | {"schedule": None, "predicted": None}]},
    }


def run_microbench(results: Path, name: str) -> tuple[dict[str, list[dict]], list[dict[str, str]]]:
    """Run a notebook; returns its records' cells by row, and the lines of its main table."""
    made = microbench_records()[name]
    write_microbench(results, name, made)
    run_cells(name, results)
    assert (results / "figures" / f"{name}.png").is_file()
    return made, list(csv.DictReader((results / "tables" / f"{name}.csv").read_text().splitlines()))


@pytest.mark.workflow
@pytest.mark.parametrize("name", ["precision", "breakeven", "memory", *SWEEPS])
def test_speedups_are_ratios_of_the_same_round(tmp_path, name):
    made, table = run_microbench(tmp_path, name)
    expected = []
    for row, cells in made.items():
        measured = {(c["precision"], c["attention"], c["batch_size"], c["variant"]): c for c in cells if "metrics" in c}
        for (*place, variant), c in measured.items():
            base = measured[*place, "unpruned"]["seconds"] if name == "memory" else c["base_seconds"]
            ratios = [b / s for b, s in zip(base, c["seconds"], strict=True)]
            text = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            if variant != "control" and (name not in ("breakeven", *SWEEPS) or variant != "unpruned"):
                expected.append((row.upper(), text, round(c["metrics"]["mac_ratio"], 2)))
    assert [(line["label"], line["speedup"], float(line["mac_ratio"])) for line in table] == expected
    if name == "breakeven":
        assert [line["pays"] for line in table] == ["False", "True"] * 2
    if name == "memory":
        shares = [round(1 / speed, 2) for speed in SPEED.values()]
        assert [float(line["training_memory_mb_relative"]) for line in table] == shares * 2


@pytest.mark.workflow
def test_counts_are_compared_with_their_neighbours(tmp_path):
    made, table = run_microbench(tmp_path, "alignment")
    latency = {c["tokens"]: c["metrics"]["block_s"] for c in made["blocks"]}
    assert [(line["multiple_of"], line["counts"]) for line in table[:2]] == [("64", "1"), ("32", "1")]
    steps = [round(latency[n + 1] / latency[n], 3) for n in (64, 32)]
    assert [float(line["next_count_max"]) for line in table[:2]] == steps
    assert float(table[0]["excess_percent"]) < 0 < float(table[-1]["excess_percent"])


@pytest.mark.workflow
def test_parts_add_up_and_plans_stand_beside_their_targets(tmp_path):
    made, table = run_microbench(tmp_path, "profile")
    seconds = made["vit_l_224"][0]["seconds"]
    total = sum(seconds.values())
    parts = [(part, round(1000 * s, 2), round(100 * s / total, 2)) for part, s in [*seconds.items(), ("total", total)]]
    assert {(line["part"], float(line["cropr_ms"]), float(line["cropr_percent"])) for line in table} == set(parts)
    _, table = run_microbench(tmp_path, "plan")
    found = [(line["target"], line["measured"], line["deviation_percent"], line["reached"]) for line in table]
    assert found == [("1.5", "1.52 [1.35, 1.80]", "1.3", "True"), ("9", "", "", "False")]
