"""What Cropr modules see in an evaluation: how sharp their scores are, and whether high scores lie on the object.

B images, N patches of the grid, n patches alive before a module, K kept by it, H heads, Q queries.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FIGURES = ("entropy", "attention_on_object", "object_share", "auc_sum", "auc_softmax", "recall_sum", "recall_softmax",
           "aux_top1")  # fmt: skip


class Scoring:
    """Watches the Cropr modules of a model in training form; their results stay as they are. Within ``with scoring:``,
    every forward pass adds to the figures; other reducers, and deployed models, which have no queries, add nothing."""

    def __init__(self, model: nn.Module) -> None:
        reducers = getattr(model, "reducers", None)
        named: Iterable[tuple[str, Any]] = reducers.items() if isinstance(reducers, nn.ModuleDict) else ()
        self.on_object: Tensor | None = None
        """[B, N] bool, which patches of the next images lie on the object; None where that is not known."""
        self.labels: Tensor | None = None
        """[B], classes of the next images; None without a class an image."""
        self._modules = {int(block): module for block, module in named if hasattr(module, "aggregator")}
        self._sums = {block: module.scorer.queries.new_zeros(len(FIGURES), 2, dtype=torch.float64)
                      for block, module in self._modules.items()}  # fmt: skip
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [m.register_forward_pre_hook(partial(self._look, block)) for block, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def series(self, total: Callable[[Tensor], Tensor]) -> dict[str, list[dict[str, Any]]]:
        """Series ``scoring``: ``block`` and means over images of what ``figures`` gives; a figure that no image has is
        left out, and so is the series without any. ``total`` adds over processes, all of which must call this."""
        if not self._sums:
            return {}
        rows = []
        for block, sums in zip(self._sums, total(torch.stack(list(self._sums.values()))).tolist(), strict=True):
            means = {name: value / count for name, (value, count) in zip(FIGURES, sums, strict=True) if count}
            rows += [{"block": block, **means}] if means else []
        return {"scoring": rows}

    @torch.no_grad()
    def _look(self, block: int, module: Any, arguments: tuple[Any, ...]) -> None:
        """Before a module runs on (tokens, K, ...): add the figures of its images to the sums."""
        tokens, keep, *_ = arguments
        on_object = None if self.on_object is None else self.on_object.to(tokens.index.device).gather(1, tokens.index)
        with torch.autocast(tokens.x.device.type, enabled=False):
            logits, x = module.scorer(tokens.x.float())
            guess = None if self.labels is None else module.head(module.aggregator(logits, x)).mean(dim=1).argmax(dim=1)
            logits = logits[..., tokens.prefix :]
        width = tokens.x.shape[-1] // module.scorer.num_heads
        found = figures(logits, width, on_object, keep)
        if guess is not None:
            found["aux_top1"] = 100 * (guess == self.labels).double()
        for name, values in found.items():
            known = ~values.isnan()
            self._sums[block][FIGURES.index(name)] += torch.stack((values[known].sum(), known.sum()))


def figures(logits: Tensor, width: int, on_object: Tensor | None, keep: int) -> dict[str, Tensor]:
    """Figures of each image, [B] float64. Learnt scores are meant, as Cropr ranks; ``NonSalient`` turns them around.

    ``logits`` are [B, H, Q, n], of the patches without the prefix; ``width`` is the channels of a head, by whose root
    the aggregator divides; ``on_object`` is [B, n] bool, or None: then ``entropy`` alone is known; ``keep`` is K.

    Returns ``entropy`` of the softmax over log n, mean over queries; in percent, ``attention_on_object``, the mass of
    the softmax on the object's patches, ``object_share``, their share of the patches alive, and ``recall_*``, the share
    of them among the K of highest score; ``auc_*``, see ``auc``. ``sum`` adds the logits of the queries, as Cropr does;
    ``softmax`` adds after the softmax. NaN where an image lacks what it takes.
    """
    logits = logits.double()
    attention = (logits * width**-0.5).softmax(dim=-1).flatten(1, 2)  # [B, H Q, n]
    found = {"entropy": torch.special.entr(attention).sum(dim=-1).mean(dim=1) / math.log(logits.shape[-1])}
    if on_object is None:
        return found
    weight = on_object.double()
    found["attention_on_object"] = 100 * (attention.mean(dim=1) * weight).sum(dim=1)
    found["object_share"] = 100 * weight.mean(dim=1)
    for name, score in (("sum", logits.sum(dim=(1, 2))), ("softmax", attention.sum(dim=1))):
        kept = torch.zeros_like(weight).scatter(1, score.topk(keep, dim=1).indices, 1.0)
        found[f"auc_{name}"] = auc(score, on_object)
        found[f"recall_{name}"] = 100 * (kept * weight).sum(dim=1) / weight.sum(dim=1)
    return found


def auc(score: Tensor, on_object: Tensor) -> Tensor:
    """[B], of [B, n]: probability that a patch on the object scores higher than one off it, ties counting half."""
    higher = ((score[:, :, None] - score[:, None, :]).sign() + 1) / 2
    on, off = on_object.to(higher), (~on_object).to(higher)
    return torch.einsum("bi,bij,bj->b", on, higher, off) / (on.sum(dim=1) * off.sum(dim=1))
