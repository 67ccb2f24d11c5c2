"""Scores against slow references and values by hand; windows against models whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cropr.data.ade20k import IGNORE
from cropr.tasks.segmentation import SegDataSpec
from cropr.tasks.segmentation.run import count_pixels, predict, predict_sliding, scores


def slow_scores(prediction: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[float, float, float, list]:
    """Pixel by pixel, class by class."""
    pairs = [(p, t) for p, t in zip(prediction.ravel(), labels.ravel(), strict=True) if t != IGNORE]
    iou, accuracy = [], []
    for c in range(num_classes):
        both = sum(p == c and t == c for p, t in pairs)
        either = sum(p == c or t == c for p, t in pairs)
        labelled = sum(t == c for _, t in pairs)
        iou.append(100 * both / either if either else None)
        accuracy.append(100 * both / labelled if labelled else None)

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values)

    return mean(iou), mean(accuracy), 100 * sum(p == t for p, t in pairs) / len(pairs), iou


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_a_slow_reference(seed):
    """Class 5 is absent, class 4 is predicted only, class 3 labelled only; a fifth of the pixels has no label."""
    random = np.random.default_rng(seed)
    labels = random.choice([0, 1, 2, 3], (3, 7, 9))
    prediction = np.where(random.random(labels.shape) < 0.5, labels, random.choice([0, 1, 2, 4], labels.shape))
    prediction[prediction == 3] = 4
    labels[random.random(labels.shape) < 0.2] = IGNORE
    counts = count_pixels(torch.from_numpy(prediction), torch.from_numpy(labels.astype(np.uint8)), 6)
    assert counts.shape == (3, 3, 6)
    metrics, found = scores(counts.sum(dim=0))
    miou, mean_accuracy, pixel_accuracy, iou = slow_scores(prediction, labels, 6)
    assert metrics == pytest.approx({"miou": miou, "macc": mean_accuracy, "aacc": pixel_accuracy})
    assert [value is None for value in found] == [value is None for value in iou]
    assert (found[4], found[5]) == (0, None)
    assert [v for v in found if v is not None] == pytest.approx([v for v in iou if v is not None])


def test_scores_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [2, IGNORE, 1, 1]])
    prediction = torch.tensor([[0, 1, 1, 1], [0, 2, 1, 1]])
    (counts,) = count_pixels(prediction[None], labels[None], 3)
    assert counts.tolist() == [[1, 4, 0], [2, 4, 1], [2, 5, 0]]
    metrics, iou = scores(counts)
    assert iou == pytest.approx([100 / 3, 80, 0])
    means = {"miou": (100 / 3 + 80) / 3, "macc": (50 + 100 + 0) / 3, "aacc": 100 * 5 / 7}
    assert metrics == pytest.approx(means)
    with pytest.raises(ValueError, match="no pixel of the validation set is labelled"):
        scores(count_pixels(prediction[None], torch.full((1, 2, 4), IGNORE), 3).sum(dim=0))


class Recorder:
    """Logits that are a fixed linear map of each pixel, and the windows that were asked for."""

    def __init__(self, shift: bool = False) -> None:
        self.weight = torch.randn(5, 3)
        self.windows: list[torch.Tensor] = []
        self.shift = shift

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.windows.append(images)
        logits = torch.einsum("cd,bdhw->bchw", self.weight, images)
        return logits + len(self.windows) if self.shift else logits


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 13), (17, 9), (5, 20), (3, 2), (24, 31)])
def test_windows_cover_any_image_and_agree_with_a_pixelwise_model_in_any_batch(size):
    for stride in (8, 5, 1):
        images, model = torch.randn(2, 3, *size), Recorder()
        logits = predict_sliding(model, images, 8, stride)
        torch.testing.assert_close(logits, torch.einsum("cd,bdhw->bchw", model.weight, images), rtol=1e-5, atol=1e-5)
        assert {tuple(window.shape) for window in model.windows} == {(2, 3, 8, 8)}
        alone = torch.cat([predict_sliding(model, image[None], 8, stride) for image in images])
        torch.testing.assert_close(logits, alone, rtol=1e-6, atol=1e-6)


def test_windows_by_hand():
    """A row of 10 pixels, windows of 4 every 3: they begin at 0, 3, 6; every third overlap counts half each."""
    model = Recorder(shift=True)
    model.weight = torch.zeros(5, 3)
    logits = predict_sliding(model, torch.arange(10.0).expand(1, 3, 4, 10), 4, 3)
    assert [int(window[0, 0, 0, 0]) for window in model.windows] == [0, 3, 6]
    assert logits[0, 0, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]
    # Small images are padded with zeros at the right and the bottom.
    model = Recorder()
    assert predict_sliding(model, torch.ones(1, 3, 2, 3), 4, 4).shape == (1, 5, 2, 3)
    (window,) = model.windows
    assert window[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0] * 4, [0] * 4]
    # Windows in half precision are summed in full.
    assert predict_sliding(lambda x: x.bfloat16(), torch.rand(1, 3, 8, 12), 8, 1).dtype == torch.float32


def test_the_spec_chooses_sliding_windows_or_one_that_is_padded_cropped_and_enlarged():
    images, model = torch.randn(2, 3, 5, 8), Recorder()
    logits = predict(model, images, (10, 16), SegDataSpec(image_size=8, num_classes=5))
    (window,) = model.windows
    assert window.shape == (2, 3, 8, 8)
    assert window[:, :, 5:].abs().max() == 0
    inner = torch.einsum("cd,bdhw->bchw", model.weight, images)
    expected = F.interpolate(inner, (10, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    model = Recorder()
    sliding = SegDataSpec(image_size=8, num_classes=5, evaluation="slide", stride=4)
    assert predict(model, torch.randn(1, 3, 16, 8), (16, 8), sliding).shape == (1, 5, 16, 8)
    assert len(model.windows) == 3
