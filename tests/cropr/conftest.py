"""Fixtures of several files: images on disk, and how often fused attention was called."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from cropr.data.imagenet import Split, load_splits


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders that tests only read."""
    return tiny.write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def split(images: Path) -> Split:
    """Its training images."""
    return load_splits(images)[0]


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of every call of fused attention."""
    from torch.nn import functional as F

    calls: list[dict[str, Any]] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fused(*a, **k))
    return calls
