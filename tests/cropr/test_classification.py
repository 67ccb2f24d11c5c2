"""Losses, accuracy, relevance and figures of scores against values by hand."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from cropr.data import scenes
from cropr.data.imagenet import EvalImages, load_splits
from cropr.data.layouts import write
from cropr.data.loading import EvalBatches
from cropr.distributed import World
from cropr.pruning.model import Output
from cropr.pruning.tokens import Tokens
from cropr.tasks import open_task
from cropr.tasks.base import EvaluationSettings, build_model
from cropr.tasks.classification import DataSpec
from cropr.tasks.classification.run import Objective, distillation, evaluate, losses, object_map, soft_target
from cropr.tasks.scoring import FIGURES, auc, figures


def output(logits, aux=(), kept=None, patches=4):
    batch = len(logits)
    return Output(logits, tuple(aux), Tokens.full(torch.zeros(batch, patches, 2), 0), kept or {}, (1, patches))


class Recorded(nn.Module):
    """A model that answers from a table: image [1, 1, 1] holds the row."""

    def __init__(self, logits, kept=None):
        super().__init__()
        self.logits, self.kept = logits, kept or {}

    def forward(self, images):
        assert not self.training
        rows = images.flatten().long()
        return output(self.logits[rows], kept={block: index[rows] for block, index in self.kept.items()})


def rows(count, labels, batch):
    images = torch.arange(count).view(count, 1, 1, 1)
    return list(zip(images.split(batch), torch.tensor(labels).split(batch), strict=True))


def test_main_loss_is_cross_entropy_with_smoothing():
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    result = losses(output(logits), soft_target(labels, 4, 0.1))
    torch.testing.assert_close(result.total, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert result.aux.numel() == 0


def test_a_teacher_weighs_predictions_and_kept_tokens():
    """An unpruned teacher costs nothing for its own output; closed gates do not count."""
    student, teacher = output(torch.randn(3, 5)), output(torch.randn(3, 5))
    assert not any(distillation(teacher, teacher).values())
    gate = torch.tensor([[1.0, 0, 1, 0]] * 3)
    x = torch.tensor([1.0, 9.0, 3.0, 9.0])[:, None].expand(3, 4, 2)
    tokens = replace(student.tokens, x=x, gate=gate)
    found = distillation(replace(student, tokens=tokens), teacher)
    torch.testing.assert_close(found["teacher_tokens"], torch.tensor(0.5 * (1 + 9) / 2))
    p, q = teacher.logits.softmax(1), student.logits.softmax(1)
    torch.testing.assert_close(found["teacher"], 0.5 * (p * (p / q).log()).sum() / 3)
    few = distillation(replace(student, tokens=tokens.keep(torch.tensor([[2, 0]] * 3))), teacher)
    torch.testing.assert_close(few["teacher_tokens"], found["teacher_tokens"])


def test_auxiliary_losses_share_the_target_and_sum_up():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator)
    aux = [torch.randn(3, 2, 4, generator=generator) for _ in range(5)]
    target = soft_target(torch.tensor([1, 2, 3]), 4, 0.1)
    result = losses(output(logits, aux), target, aux_weight=0.5)
    each = [torch.stack([F.cross_entropy(a[:, q], target) for q in range(2)]).mean() for a in aux]
    torch.testing.assert_close(result.aux, torch.stack(each))
    torch.testing.assert_close(result.total, result.main + 0.5 * sum(each))


def test_batches_are_mixed_only_if_asked_for():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    plain, target = Objective(DataSpec(num_classes=3)).prepare(images.clone(), labels)
    assert torch.equal(plain, images)
    assert torch.equal(target, F.one_hot(labels, 3).float())
    augment = {"mixup": 0.8, "smoothing": 0.1}
    mixed, target = Objective(DataSpec(num_classes=3, augment=augment)).prepare(images.clone(), labels)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(4))
    assert target.min().item() == pytest.approx(0.1 / 3)


LOGITS = torch.tensor([[9.0, 1, 2, 3, 4, 5, 0], [1, 2, 9, 3, 4, 5, 0], [1, 2, 9, 3, 4, 5, 0]])
"""Labels 0, 1 and 6 are the first, within five, and the last."""


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_accuracy_by_hand_whatever_the_batch(batch):
    model, labels = Recorded(LOGITS).train(), [0, 1, 6]
    result = evaluate(model, rows(3, labels, batch))
    expected = {"top1": 100 / 3, "top5": 200 / 3, "val_images": 3}
    expected["loss"] = F.cross_entropy(LOGITS, torch.tensor(labels)).item()
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.series["relevance"] == []
    assert model.training
    assert evaluate(Recorded(LOGITS[:, :3]), rows(3, [0, 1, 2], batch)).metrics["top5"] == 100  # of three
    with pytest.raises(ValueError, match="validation set is empty"):
        evaluate(Recorded(LOGITS), [])


@pytest.mark.parametrize("batch", [1, 3])
def test_relevance_by_hand(batch):
    objects = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    kept = {2: torch.tensor([[0, 2, 1], [0, 1, 2], [0, 1, 2]]), 3: torch.tensor([[0, 2], [0, 1], [3, 1]])}
    result = evaluate(Recorded(LOGITS, kept), rows(3, [0, 1, 6], batch), objects=objects)
    # Shares of the kept: mean over all images. Shares of the object: mean over the two images that show one.
    assert result.series["relevance"] == [
        {"block": 0, "kept_on_object": pytest.approx(100 * (2 / 4 + 1 / 4 + 0) / 3), "object_kept": 100},
        {"block": 2, "kept_on_object": pytest.approx(100 * (2 / 3 + 0 + 0) / 3), "object_kept": 100 * (1 + 0) / 2},
        {"block": 3, "kept_on_object": pytest.approx(100 * (1 / 2 + 0 + 0) / 3), "object_kept": 100 * (0.5 + 0) / 2},
    ]


def test_mixing_asks_for_pairs_in_every_process(images):
    run = open_task(tiny.spec(recipe__batch_size=6, data__augment={"cutmix": 1.0}), images)
    assert len(run.batches(seed=0)) == 8
    with pytest.raises(ValueError, match=r"mix pairs, but a process has 3 images of a batch; .* multiple of 4"):
        run.batches(seed=0, world=World(1, 2))


def test_truth_of_scenes(tmp_path):
    spec = tiny.spec(data__scenes={"image_size": 32, "train": 10, "val": 10, "distractors": [0, 2]}).data
    write(spec.scenes, tmp_path)
    _, val = load_splits(tmp_path)
    objects = object_map(val.paths, spec, (4, 4))
    assert objects.shape == (10, 16)
    assert objects.any(dim=1).all()
    for path, row in zip(val.paths, objects, strict=True):
        assert row.tolist() == scenes.object_patches(scenes.object_mask(path), (4, 4)).tolist()
    half = object_map(val.paths, spec.model_copy(update={"image_size": 16, "crop_pct": 0.5}), (2, 2))
    middle = [scenes.object_patches(scenes.object_mask(path)[8:24, 8:24], (2, 2)).tolist() for path in val.paths]
    assert half.tolist() == middle, "masks are cropped as images are"
    _, photos = load_splits(tiny.write_folder(tmp_path / "photos"))
    assert object_map(photos.paths, tiny.spec().data, (4, 4)) is None


@pytest.fixture(scope="module")
def batches(images):
    return EvalBatches(EvalImages(load_splits(images)[1], tiny.spec().data), 5)


def build(**changes):
    torch.manual_seed(0)
    return build_model(tiny.spec().model, tiny.spec(**changes).prune, tiny.CLASSES, 32)


def test_a_random_reducer_depends_on_the_seed_alone_and_mixed_precision_is_nearly_the_same(batches):
    model = build(prune__reducer="random")
    first, again, other = (evaluate(model, batches, EvaluationSettings(seed=k)).metrics["loss"] for k in (1, 1, 2))
    assert first == again != other
    model = build(prune__reducer="variance")
    full, half = (evaluate(model, batches, EvaluationSettings(precision=p)).metrics["loss"] for p in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_the_aggregators_start_as_the_authors_do(images):
    spec = tiny.spec(model__args={**tiny.spec().model.args, "embed_dim": 64})
    layers = open_task(spec, images).build().reducers["1"].aggregator.mlp
    assert layers[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layers[1].bias.any()
    assert not layers[3].bias.any()


SCORE = torch.tensor([[3.0, 2.0, 1.0, 0.0]])


def test_auc_counts_pairs_in_order():
    """Ties are chance; without both kinds there is none."""
    for on_object, expected in (
        ([1, 1, 0, 0], 1), ([0, 0, 1, 1], 0), ([1, 0, 0, 1], 0.5), ([0, 1, 0, 0], 2 / 3), ([1, 0, 1, 0], 3 / 4),
    ):  # fmt: skip
        assert auc(SCORE, torch.tensor([on_object]).bool()).item() == pytest.approx(expected)
    assert auc(torch.zeros(1, 4), torch.tensor([[True, False, False, True]])).item() == 0.5
    assert auc(SCORE.expand(2, -1), torch.tensor([[True] * 4, [False] * 4])).isnan().all()


def test_entropy_and_attention_by_hand():
    """Two queries: one sees all patches alike, the other one patch alone."""
    logits = torch.tensor([[[[0.0, 0.0, 0.0, 0.0], [0.0, 1e4, 0.0, 0.0]]]])
    found = figures(logits, 16, torch.tensor([[False, True, False, True]]), 2)
    assert found["entropy"].tolist() == [pytest.approx(0.5)]
    assert found["attention_on_object"].tolist() == [pytest.approx(100 * (2 / 4 + 1) / 2)]
    assert found["object_share"].tolist() == [50]
    p = torch.tensor([3 / 4, 1 / 4])
    found = figures(4 * p.log().view(1, 1, 1, 2), 16, None, 1)
    assert list(found) == ["entropy"]
    assert found["entropy"].item() == pytest.approx(-(p * p.log()).sum().item() / math.log(2))


def test_orders_differ_with_several_queries_and_agree_with_one():
    """The sum of raw logits follows the query of large values; each query counts alike after its softmax."""
    logits = torch.tensor([[[[9.0, 8.0, 0.0, 0.0], [0.0, -9.0, 1.0, 0.0]]]])
    on_object = torch.tensor([[True, False, True, False]])
    found = figures(logits, 1, on_object, 2)
    assert found["auc_sum"].item() == pytest.approx(1)  # 9, -1, 1, 0
    assert found["recall_sum"].item() == 100
    wide = figures(torch.cat((logits, torch.tensor([[[[0.0, 0.0, 0.0, 5.0]]]])), dim=2), 1, on_object, 2)
    assert wide["recall_sum"].item() == 50  # 9, -1, 1, 5
    single = figures(torch.randn(8, 1, 1, 20), 4, torch.rand(8, 20) < 0.4, 7)
    assert torch.equal(single["auc_sum"], single["auc_softmax"])
    assert torch.equal(single["recall_sum"], single["recall_softmax"])


def noise(count: int, start: int = 0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=generator)[start : start + count]
    return list(zip(images.split(4), torch.zeros(count, dtype=torch.long).split(4), strict=True))


OBJECTS = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) < 0.3


def test_recall_is_what_the_module_keeps():
    """At the first module all of the object is alive, so that recall is ``object_kept`` of the evaluation."""
    model = tiny.model(tiny.spec())
    series = evaluate(model, noise(12), objects=OBJECTS).series
    assert not any(reducer._forward_pre_hooks for reducer in model.reducers.values()), "nothing stays hooked"
    assert [row["block"] for row in series["scoring"]] == [1, 2]
    first = series["scoring"][0]
    assert first["recall_sum"] == pytest.approx(series["relevance"][1]["object_kept"])
    assert set(first) == {"block", *FIGURES}
    for row, alive in zip(series["scoring"], series["relevance"], strict=False):
        assert row["object_share"] == pytest.approx(alive["kept_on_object"])
    # Only models with queries have the series; without a truth, it is shorter.
    others = tiny.model(tiny.spec(prune__reducer="random")), model.deploy()
    assert not any("scoring" in evaluate(other, noise(4)).series for other in others)
    assert set(evaluate(model, noise(4)).series["scoring"][0]) == {"block", "entropy", "aux_top1"}


@pytest.mark.parametrize("shown", [32, 48])
def test_segmentation_knows_objects_of_scenes_as_they_were_drawn(tmp_path, shown):
    scenes = {"image_size": shown, "train": 4, "val": 6, "distractors": [0, 1]}
    data = {"image_size": 32, "num_classes": 11, "scenes": scenes}
    spec = tiny.spec(task="segmentation", model__name="eva02_tiny_patch14_224", data=data)
    write(spec.data.scenes, tmp_path, "ade20k")
    task = open_task(spec, tmp_path)
    rows = task.evaluate(task.build(), EvaluationSettings(batch_size=4)).series["scoring"]
    assert [row["block"] for row in rows] == [1, 2]
    for row in rows:
        assert ("auc_sum" in row) == (shown == 32)
        assert 0 < row["entropy"] <= 1
