"""Reducers with weights that matter, random tokens for them, and what a block would give them to read."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from cropr.pruning.methods import REDUCERS
from cropr.pruning.reducers import Context, create
from cropr.pruning.tokens import Tokens

DIM, PATCHES, HEADS, KEEP = 8, 20, 2, 13
RULES = [
    *(("evit", {"rule": rule}) for rule in ("reference", "corrected")),
    *((name, {"depth": depth}) for name in ("tome", "pitome", "tofu") for depth in (0.25, 0.75)),
    *(("k_medoids", {"rule": rule}) for rule in ("reference", "corrected")),
    *(("k_medoids", {"weights": weights}) for weights in ("cls", "equal")),
    *(("dpc_knn", {"rule": rule, "weights": w}) for rule in ("reference", "corrected") for w in ("learned", "equal")),
    ("sit", {}),
    ("sinkhorn", {}),
    ("sinkhorn", {"epsilon": 0.25, "iterations": 5}),
    *(("patch_merger", {"rule": rule}) for rule in ("reference", "corrected")),
    *(("ats", {"rule": rule}) for rule in ("reference", "corrected")),
    ("dynamic_vit", {}),
]
"""Every reducer but the pruners, with the options that change its rule."""
PRUNERS = [name for name, method in REDUCERS.items() if name != "none" and method.family == "pruner"]
each_rule = pytest.mark.parametrize(("name", "options"), RULES, ids=str)


def case(batch: int = 3, prefix: int = 1, patches: int = PATCHES, dim: int = DIM) -> tuple[Tokens, Context]:
    """Random tokens, and all that a reducer may read, as one block would give it."""
    tokens = Tokens.full(torch.randn(batch, prefix + patches, dim), prefix)
    rows = torch.randn(batch, HEADS, 1 + patches, 1 + patches).softmax(dim=3)
    return tokens, Context(
        cls_attention=rows[:, :, 0, 1:],
        mean_key=torch.randn(batch, prefix + patches, 4),
        value_norms=torch.rand(batch, HEADS, patches) + 0.5,
        column_sums=rows.sum(dim=(1, 2))[:, 1:],
        pixels=torch.rand(batch, patches),
    )


def part(tokens: Tokens, context: Context, b: int) -> tuple[Tokens, Context]:
    """One image of a batch, and what was read for it."""

    def cut(one):
        found = {field.name: getattr(one, field.name) for field in fields(one)}
        return replace(one, **{key: v[b : b + 1] for key, v in found.items() if isinstance(v, torch.Tensor)})

    return cut(tokens), cut(context)


def read(reducer, context: Context) -> Context:
    """What the reducer says that it reads, and no more."""
    return Context(**{name: getattr(context, name) for name in reducer.reads})


def make(name: str, keep: int = KEEP, dim: int = DIM, **options):
    """A reducer in evaluation, every weight at a value that matters."""
    torch.manual_seed(1)
    reducer = create(name, dim, 4, keep=keep, **options).eval()
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    return reducer


def run(name: str, tokens: Tokens, context: Context, keep: int = KEEP, **options) -> Tokens:
    reducer = make(name, keep, tokens.x.shape[-1], **options)
    return reducer(tokens, keep, read(reducer, context), want_pruned=False).kept
