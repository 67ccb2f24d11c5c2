"""Measurements that take no time: tiny models, one pass a round, no large matrix product."""

import pytest
import torch

from cropr.bench import models, timing

MODEL = {"name": "vit_tiny_patch16_224", "args": {"depth": 4, "embed_dim": 48, "num_heads": 3}}
RATE = {"constant": {"rate": 3}}
CROPR = {"reducer": "cropr", "schedule": RATE}
VARIANTS = {"cropr": CROPR, "cropr_llf": {**CROPR, "fusion": "llf"}}
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def instant(monkeypatch):
    """One forward pass a round; bfloat16 also on CPUs that are slow in it."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0)
    monkeypatch.setattr(models, "SIZES", {"cpu": (16,), "cuda": (16,)})
    monkeypatch.setattr(models, "SECONDS", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
