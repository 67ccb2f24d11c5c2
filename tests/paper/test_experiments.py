"""The grid: every row at every scale, and runs that rows share."""

import json
import struct
from pathlib import Path

import pytest

from cropr.pruning.methods import REDUCERS
from cropr.pruning.schedule import Schedule, attended
from cropr.specs import ModelSpec, PruneSpec
from cropr.tasks import TASKS
from cropr.tasks.detection import DetModelSpec
from workflow.paper.configuration import read_yaml
from workflow.paper.grid import Grid, load_grid
from workflow.paper.sources import shipped

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
SCALES = ["ci", "laptop", "fashion", "workstation", "paper"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's images: two classes; and, for the tables of the other tasks, the folders of their layouts."""
    root = tmp_path_factory.mktemp("images")
    for name in (*(name for task in TASKS.values() for name in task.folders), *("train/cat", "train/dog")):
        (root / name).mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture(scope="module")
def grids(folder: Path) -> dict[str, Grid]:
    roots = dict.fromkeys(("imagenet", "ade20k", "coco", "folder"), folder)
    return {scale: load_grid(CONFIG, scale, roots=roots) for scale in SCALES}


def job(path: str | None) -> str:
    """Id in the path of a record."""
    return Path(str(path)).parent.name


def test_every_artefact_has_a_notebook_a_place_and_a_question(grids: dict[str, Grid]) -> None:
    configs = {file.stem for file in (CONFIG / "experiments").glob("*.yaml")}
    assert configs == {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")} == set(grids["ci"].artefacts)
    artefacts = [artefact.config for artefact in grids["ci"].artefacts.values()]
    orders = [artefact.order for artefact in artefacts]
    assert orders == sorted(set(orders))
    sections = [artefact.section for artefact in artefacts]
    assert sections == sorted(sections, key=sections.index), "artefacts of a section follow each other"
    assert all(artefact.question.endswith("?") for artefact in artefacts)
    assert all((one.published is None) == (one.config.paper_model is None) for one in grids["ci"].artefacts.values())


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_runs_exactly_if_its_reducer_exists_and_a_microbenchmark_has_a_record_alone(grids, scale: str) -> None:
    grid, measured = grids[scale], []
    for artefact in grid.artefacts.values():
        for row in artefact.rows:
            if artefact.config.is_microbench:
                measured += [row] if row.why is None else []
                assert row.run is None
                assert row.reducer is None
                assert not row.records
                continue
            left_out = str(row.why).startswith("left out at")
            assert (row.run is not None) == (row.reducer in REDUCERS and not left_out)
            assert (row.run is None) == (row.why is not None) == (row.records == ())
    assert {job(row.bench) for row in measured} == set(grid.microbenches)
    assert ("eva_l_512" in {row.row for row in measured}) == (scale in ("workstation", "paper"))
    for digest, spec in (grid.runs | grid.benches | grid.pretrains).items():  # a spec keeps its digest on its way
        assert type(spec).model_validate_json(json.dumps(spec.model_dump(mode="json"))).digest() == digest


def test_equal_rows_share_a_run_and_equal_inference_a_measurement(grids: dict[str, Grid]) -> None:
    grid = grids["paper"]
    methods, ablations = grid.artefacts["imagenet_methods"], grid.artefacts["ablations"]
    assert ablations["cropr"].run == methods["cropr_r8_llf"].run
    assert ablations["no_llf"].run == methods["cropr_r8"].run
    assert ablations["no_mlp"].run != ablations["cropr"].run
    assert ablations["no_mlp"].bench == methods["cropr_r8_llf"].bench
    assert ablations["norm"].bench != methods["cropr_r8_llf"].bench
    assert {row.run for artefact in grid.artefacts.values() for row in artefact.rows if row.run} == set(grid.runs)


def test_a_scale_of_ones_own_may_have_fewer_artefacts_and_rows() -> None:
    artefacts = ["imagenet_methods", "model_scaling"]
    left = {"leave_out": ["model_scaling/vit_h_224", "breakeven/vit_l"], "artefacts": artefacts}
    grid = load_grid(CONFIG, "laptop", overrides=left)
    assert set(grid.artefacts) == {"imagenet_methods", "model_scaling", "methods_speed"}, "with what a notebook reads"
    row = grid.artefacts["model_scaling"]["vit_h_224"]
    assert (row.why, row.bench) == ("left out at the laptop scale", None)
    own, overrides = load_grid(CONFIG, "laptop"), read_yaml(CONFIG / "complete.yaml")["overrides"]
    complete = load_grid(CONFIG, "laptop", overrides=overrides)
    assert all(set(getattr(own, kind)) < set(getattr(complete, kind)) for kind in ("runs", "benches"))


def test_every_ablation_changes_one_thing_and_a_row_of_other_scales_is_left_out(grids: dict[str, Grid]) -> None:
    grid, paper = grids["laptop"], grids["paper"]
    specs = {row.row: grid.runs[row.run].model_dump() for row in grid.artefacts["ablations"].rows if row.run}
    base = specs.pop("cropr")
    for row, spec in specs.items():
        assert len([key for key in spec["prune"] if spec["prune"][key] != base["prune"][key]]) == 1, row
        assert len(spec["prune"]["options"]) <= 1 or row == "heads_16"  # the paper's row has projections, too
        assert {key for key in spec if spec[key] != base[key]} == {"prune"}
    row = grid.artefacts["imagenet_methods"]["small_image"]
    assert (row.why, row.run, row.bench) == ("left out at the laptop scale", None, None)
    small = paper.benches[job(paper.artefacts["imagenet_methods"]["small_image"].bench)]
    assert (small.pruned_image_size, small.prune.reducer) == (176, "none")


def test_paper_scale_is_the_authors_recipe(grids: dict[str, Grid]) -> None:
    grid = grids["paper"]
    spec = grid.runs[str(grid.artefacts["imagenet_methods"]["cropr_r8_llf"].run)]
    model, recipe, augment = spec.model, spec.recipe, spec.data.augment
    assert (model.name, model.drop_path, spec.init) == ("vit_large_patch16_224.mae", 0.2, "timm")
    assert model.args == {"global_pool": "avg", "pool_include_prefix": True}
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (50, 1024, 5)
    assert (recipe.peak_lr, recipe.min_lr, recipe.layer_decay, recipe.weight_decay) == (4e-3, 1e-6, 0.75, 0.05)
    assert (recipe.precision, recipe.clip_grad) == ("fp16", None)
    assert (augment.mixup, augment.cutmix, augment.erasing, augment.smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (augment.auto_augment, augment.hflip, augment.scale) == ("rand-m9-mstd0.5-inc1", 0.5, (0.08, 1.0))
    assert spec.prune.schedule == {"constant": {"rate": 8, "first_extra": 1, "align": 1}}
    assert spec.prune.aux_weight == 1
    spec = grid.runs[str(grid.artefacts["coco"]["cropr"].run)]
    assert spec.detector == DetModelSpec()
    assert (spec.data.image_size, spec.data.num_classes, spec.data.scale) == (1536, 80, (0.1, 2.0))
    recipe = spec.recipe
    assert (recipe.batch_size, recipe.layer_decay, recipe.ema, recipe.weight_decay) == (64, 0.8, 0.9999, 0.1)
    assert (recipe.peak_lr, recipe.decay, spec.model.drop_path) == (pytest.approx(4e-5), "constant", 0.3)
    assert spec.prune.schedule["kept"]["at"] == {"5": 6400, "8": 4096, "11": 2304, "14": 1024, "20": 256}


@pytest.mark.parametrize("scale", ["laptop", "workstation", "paper"])
def test_speed_is_measured_on_the_papers_models_and_schedules(grids: dict[str, Grid], scale: str) -> None:
    grid = grids[scale]
    table = grid.artefacts["imagenet_methods"]
    specs = {row.row: grid.benches[job(row.bench)] for row in table.rows if row.bench}
    assert {(spec.model.name, spec.image_size) for spec in specs.values()} == {("vit_large_patch16_224", 224)}
    assert specs["cropr_r8_llf"].prune.schedule["constant"]["rate"] == 8
    assert table["cropr_r8"].paper_schedule == "R=8"
    if scale == "paper":
        coco = grid.artefacts["coco"]
        assert [row.row for row in coco.rows if row.bench] == ["none", "random", "cropr"]
        spec = grid.benches[job(coco["cropr"].bench)]
        assert (spec.model.name, spec.image_size) == ("eva02_large_patch14_224", 1536)
        assert spec.detector == DetModelSpec()
        others = [one for one in grid.benches.values() if (one.model.name, one.image_size) != (spec.model.name, 1536)]
        assert all(one.detector is None for one in others)


def test_weights_of_average_pooling_start_both_poolings(grids: dict[str, Grid]) -> None:
    grid = grids["laptop"]
    attention = grid.runs[str(grid.artefacts["imagenet_methods"]["attn_topk_r8_llf"].run)]
    pretrain = grid.pretrains[attention.init]
    assert (pretrain.prune.reducer, pretrain.model.args["global_pool"]) == ("none", "avg")
    assert attention.model.args["global_pool"] == "token"
    unpruned = grid.artefacts["imagenet_methods"]["none"].run
    inits = {spec.init for spec in grid.runs.values() if spec.model.args == pretrain.model.args}
    assert inits == {pretrain.digest(), unpruned}
    untrained = grid.runs[str(grid.artefacts["training_free"]["tome_r8"].run)]
    assert (untrained.init, untrained.recipe.epochs) == (unpruned, 0)


@pytest.mark.parametrize("scale", ["laptop", "workstation", "paper"])
def test_smaller_image_is_the_nearest_to_croprs_multiply_adds(grids: dict[str, Grid], scale: str) -> None:
    config = grids[scale].config.tasks["classification"]
    model = config.model
    width = {"laptop": 96, "workstation": 384, "paper": 1024}[scale]

    def macs(image_size: int, schedule: Schedule, fusion: bool) -> float:
        patches = (image_size // model.patch_size) ** 2
        tokens = attended(schedule.resolve(patches, model.depth, fusion, 1), patches, fusion, 1)
        return sum(12 * n * width**2 + 2 * n**2 * width for n in tokens) + patches * 3 * model.patch_size**2 * width

    image_size = grids[scale].runs[str(grids[scale].artefacts["imagenet_methods"]["none"].run)].data.image_size
    wanted = macs(image_size, Schedule.from_config(config.schedules["r8"]), True)
    sizes = range(model.patch_size, image_size, model.patch_size)
    nearest = min(sizes, key=lambda size: abs(macs(size, Schedule.constant(0), False) - wanted))
    assert config.image_sizes["small"] == nearest


def test_earlier_artefacts_go_first_and_relevance_needs_a_known_truth(grids: dict[str, Grid]) -> None:
    grid = grids["laptop"]
    methods, ablations = grid.artefacts["imagenet_methods"], grid.artefacts["ablations"]
    assert grid.priority(str(methods["random_r8_llf"].run)) > grid.priority(str(ablations["no_mlp"].run))
    cropr, none = str(ablations["cropr"].run), str(methods["none"].run)
    assert grid.priority(cropr, 0) > grid.priority(cropr, 1) == grid.priority(none, 0), "pruning maps first"
    assert len(methods["none"].records) == len(grid.seeds) > len(grid.artefacts["pruning_maps"]["cropr"].records) == 1
    assert "relevance" in grid.artefacts
    assert "relevance" not in grids["paper"].artefacts


def test_tasks_without_images_are_left_out_as_long_as_one_is_left(folder: Path, grids: dict[str, Grid]) -> None:
    roots = {"imagenet": folder, "ade20k": None, "coco": None, "folder": None}
    grid = load_grid(CONFIG, "paper", roots=roots)
    assert {artefact.config.task for artefact in grid.artefacts.values()} == {"classification"}
    assert "segmentation" in grid.lacking
    assert {spec.task for spec in grid.runs.values()} == {"classification"}
    grid = load_grid(CONFIG, "paper", roots=roots | {"imagenet": None, "ade20k": folder})
    assert "ade20k" in grid.artefacts
    assert "imagenet_methods" not in grid.artefacts
    own = [spec for spec in grids["workstation"].runs.values() if spec.task == "classification"]
    assert {spec.data.num_classes for spec in own} == {2}, "class folders of the user are counted"


def test_public_images_are_downloaded_unless_the_user_names_a_folder(folder: Path) -> None:
    none = dict.fromkeys(("imagenet", "ade20k", "coco", "folder"))
    grid = load_grid(CONFIG, "workstation", roots=none)
    assert grid.public == {"pets": ["imagenet", "ade20k", "coco"]}
    assert {spec.task: spec.data.num_classes for spec in grid.runs.values()} == {
        "classification": 37, "segmentation": 38, "detection": 37,
    }  # fmt: skip
    assert {"relevance", "ade20k", "coco"} <= set(grid.artefacts)
    assert grid.source(str(grid.artefacts["coco"]["cropr"].run)).folder == "results/workstation/data/coco"
    own = load_grid(CONFIG, "workstation", roots=none | {"folder": folder})
    assert (own.public, own.lacking) == ({}, ("segmentation", "detection"))
    assert "relevance" not in own.artefacts
    fashion = load_grid(CONFIG, "fashion", roots=none)
    assert (list(fashion.artefacts), fashion.public) == (["fashion"], {"fashion": ["imagenet", "ade20k"]})
    assert {row.schedule for row in fashion.artefacts["fashion"].rows} == {"none", "R=6"}
    for wrong in ("cats", "fashion"):
        overrides = {"tasks": {"detection": {"data": {"public": wrong}}}}
        with pytest.raises(ValueError, match=rf"detection.data.public = '{wrong}': choose one of pets"):
            load_grid(CONFIG, "workstation", roots=none, overrides=overrides)
    with pytest.raises(ValueError, match=r"artefacts: no artefact 'fashions'; choose among .*fashion"):
        load_grid(CONFIG, "fashion", overrides={"artefacts": ["fashions"]})


def test_manifest_says_all_that_a_notebook_needs() -> None:
    grid = load_grid(CONFIG, "laptop", seeds=2)
    manifest = json.loads(json.dumps(grid.manifest("imagenet_methods")))
    assert (manifest["seeds"], manifest["results"], manifest["baseline"]) == ([0, 1], "results/laptop", "none")
    assert manifest["metrics"]["top1"] == "Top-1"
    assert manifest["published"].endswith("config/published/imagenet_methods.csv")
    rows = {row["row"]: row for row in manifest["rows"]}
    row, run = rows["cropr_r8_llf"], rows["cropr_r8_llf"]["run"]
    assert row["records"] == [f"results/laptop/runs/{run}/seed{seed}/record.json" for seed in (0, 1)]
    assert (row["maps"], rows["cropr_r50"]["schedule"]) == (None, "R=16 @ 2,4,6")
    assert rows["small_image"]["records"] == []
    assert rows["small_image"]["why"]
    assert grid.manifest("pruning_maps")["rows"][0]["maps"] == f"results/laptop/maps/{run}/seed0.npz"
    relevance = grid.artefacts["relevance"].rows
    assert set(grid.files("relevance")) == {record for row in relevance for record in row.records}
    files = set(grid.files("tradeoff"))  # a notebook that reads another table waits for it
    for name in ("training_free", "methods_speed"):
        assert files >= {*grid.files(name), f"results/laptop/manifests/{name}.json"}


def test_rows_are_found_by_name(grids: dict[str, Grid]) -> None:
    grid = grids["laptop"]
    assert grid.find_row("no_mlp") == ("ablations", "no_mlp")
    assert grid.find_row("imagenet_methods/random_r8_llf") == ("imagenet_methods", "random_r8_llf")
    for wrong in ("no_mlpp", "ablations/cropr", "imagenet_methods/small_image", "relevance/random"):
        with pytest.raises(ValueError, match=rf"row = '{wrong}'.*(ablations/no_mlp|left out)"):
            grid.find_row(wrong)
    with pytest.raises(ValueError, match="no such row to compare"):
        grid.find_row("none")


NINE = {"schedules": {"squares": {"squares": {"at": {2: 3}}}}, "detector": {"global_blocks": [4]}}
UNFIT = {
    "tasks.segmentation.detector: segmentation has no detector": {"segmentation": {"detector": {"window": 2}}},
    r"global_blocks = \[2\]: .* model.depth = 4, and": {"detection": {"detector": {"global_blocks": [2]}}},
    "image size 48 must be a multiple of 32": {"detection": {"detector": {"window": 4}}},
    "9 patches enter block 3, whose windows need a multiple of 4.*needed by .*coco.yaml: row": {"detection": NINE},
    r"detector: windows: unknown key; .*window": {"detection": {"detector": {"windows": 2}}},
    "tasks.detection.bench.rows: no row 'cropper'; choose": {"detection": {"bench": {"rows": ["cropper"]}}},
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_detector_that_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grid(CONFIG, "ci", overrides={"tasks": UNFIT[message]})


def test_shipped_weights_count_only_if_the_same_run_made_them(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    assert not shipped(file, "0123456789")
    for metadata, same in (({"__metadata__": {"spec": "0123456789"}}, True), ({}, False)):
        header = json.dumps(metadata).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert shipped(file, "0123456789") == same
        assert not shipped(file, "9876543210")
    file.write_bytes(b"no header at all, but long enough")
    assert not shipped(file, "0123456789")


@pytest.mark.model
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_describes_the_models_that_timm_builds(grids: dict[str, Grid], scale: str) -> None:
    import timm
    import torch

    from cropr.tasks.detection.model import build_detector

    for task, config in grids[scale].config.tasks.items():
        block, size = config.model, config.data["image_size"]
        for pool, arguments in block.pools.items():
            with torch.device("meta"):
                if task == "detection":
                    spec = ModelSpec(name=block.name, args=block.args | arguments)
                    windows = DetModelSpec(**config.detector or {})
                    model = build_detector(spec, PruneSpec(), windows, 2, size).backbone.host
                else:
                    model = timm.create_model(block.name, img_size=size, num_classes=2, **block.args, **arguments)
            assert len(model.blocks) == block.depth
            assert model.num_prefix_tokens == block.prefix
            assert model.patch_embed.patch_size == (block.patch_size, block.patch_size)
            assert model.global_pool == {"avg": "avg", "cls": "token"}[pool]
