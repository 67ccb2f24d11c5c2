"""When tokens go: how many patch tokens live after each block.

Pure Python, no torch: Snakemake builds its DAG from this file. Source: paper, section 3 (constant, early), Table 1
(stages); the squares of the detector are reconstructed (docs/detection.md).

A schedule is written once, without a model, and resolved against one::

    Schedule.constant(rate=8).resolve(num_patches=196, depth=24, fusion=True, prefix=1)
    # (187, 179, ..., 19, 19, 196): after block 1, 2, ..., 22, 23, 24

Blocks count from 1, as in the paper; ``num_patches`` and all counts leave prefix tokens (CLS, registers) out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from itertools import groupby
from math import floor
from numbers import Real
from typing import Any, Literal

from cropr.pruning.methods import FUSIONS, choose

Rule = Literal["constant", "stages", "fraction", "kept"]
MOST = 10**9
"""Largest number of a schedule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A pruning schedule. Make one with the constructors below, not directly."""

    rule: Rule
    """How the numbers are read."""
    rate: int = 0
    """Constant rule: patch tokens pruned after every block."""
    first_extra: int = 0
    """Constant rule: tokens that the first module prunes on top, so that counts with CLS step evenly."""
    at: tuple[tuple[int, float], ...] = ()
    """Other rules: (block, number), sorted by block."""
    align: int = 1
    """Round the count, prefix included, up to a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("rate", "first_extra", "align"):
            object.__setattr__(self, name, _number(getattr(self, name), name))
        if len({block for block, _ in self.at}) < len(self.at):
            raise ValueError(f"{self.rule} at {[block for block, _ in self.at]}: name each block once")
        if self.rate < 0 or self.first_extra < 0:
            both = f"rate={self.rate}, first_extra={self.first_extra}: both must be 0 or more"
            raise ValueError(f"{both}; rate 0 prunes nothing")
        if self.align < 1:
            raise ValueError(f"align={self.align} must be 1 (off) or more, for example 8")
        for block, number in self.at:
            if block < 1:
                raise ValueError(f"block {block}: blocks count from 1, the first place to prune is after block 1")
            if self.rule == "fraction" and not 0 <= number < 1:
                raise ValueError(f"share {number} after block {block} must be at least 0 and below 1 (0.8 prunes 80 %)")
            if self.rule == "stages" and number < 0:
                raise ValueError(f"{number} tokens to prune after block {block}: must be 0 or more")
            if self.rule == "kept" and number < 1:
                raise ValueError(f"{number} tokens to keep after block {block}: must be 1 or more")

    @classmethod
    def constant(cls, rate: int, first_extra: int = 1, align: int = 1) -> Schedule:
        """Prune ``rate`` tokens after every block; the first module ``first_extra`` more (paper, section 4.1). Rate 0
        is the unpruned model: the extra token is then left in place."""
        return cls(rule="constant", rate=rate, first_extra=first_extra if rate else 0, align=align)

    @classmethod
    def stages(cls, pruned: Mapping[int, int], align: int = 1) -> Schedule:
        """Prune ``pruned[block]`` tokens after these blocks: ``{6: 50, 12: 50, 18: 50}`` (paper, Table 1)."""
        return cls(rule="stages", at=_sorted(pruned), align=align)

    @classmethod
    def fraction(cls, share: Mapping[int, float], align: int = 1) -> Schedule:
        """Prune this share of the tokens then alive: ``{3: 0.8}`` is the paper's early schedule."""
        return cls(rule="fraction", at=_sorted(share, whole=False), align=align)

    @classmethod
    def kept(cls, count: Mapping[int, int], align: int = 1) -> Schedule:
        """Keep ``count[block]`` tokens after these blocks."""
        return cls(rule="kept", at=_sorted(count), align=align)

    @classmethod
    def squares(cls, side: Mapping[int, int]) -> Schedule:
        """Keep ``side[block] ** 2`` tokens, so that survivors fill whole windows (docs/detection.md)."""
        return cls.kept({block: edge**2 for block, edge in _sorted(side)})

    @classmethod
    def for_speedup(cls, speedup: float, model: Any, *, fusion: str = "none", align: int = 1) -> Schedule:
        """The schedule that divides a model's multiply-adds by ``speedup`` or more and prunes the fewest tokens: the
        smallest constant rate, or, if none reaches it, the smallest share that goes at once after block 3 (the paper's
        early schedule). Counted is the deployed model with Cropr's scorers. Time does not follow multiply-adds exactly:
        ``python -m cropr plan --verify`` measures and corrects.

        Args:
            speedup: unpruned over pruned multiply-adds, 1 or more.
            model: a model of a host library, its adapter, or ``cropr.pruning.flops.Cost``, which saves counting again.
            fusion: one that brings pruned tokens back before the last block, or ``none``.

        Raises ValueError for a speed-up out of reach, with the limit, TypeError for a model without adapter.
        """
        place = choose(FUSIONS, "fusion", fusion).place
        if not 1 <= speedup < float("inf"):
            raise ValueError(f"speed-up {speedup:g} must be 1 or more: unpruned over pruned multiply-adds")
        if place not in (None, "before_last_block"):
            raise ValueError(f"fusion {fusion!r} computes by itself, which is not counted here; use 'llf' or 'none'")
        # Found by name: training does not depend on how multiply-adds are counted.
        cost = model if hasattr(model, "total") else import_module("cropr.pruning.flops").Cost(model)
        patches, depth, prefix = cost.backbone.num_patches, cost.backbone.depth, cost.backbone.prefix
        fused = place is not None
        last = depth - 2 if fused else depth - 1

        def ratio(schedule: Schedule) -> float:
            alive = schedule.resolve(patches, depth, fused, prefix)
            return cost.total((patches,) * depth, fused) / cost.total(alive, fused)

        room = last > 0 and patches > 2
        early = min(3, last)
        families: list[tuple[Callable[[int], Schedule], int]] = [
            (lambda rate: cls.constant(rate, align=align), (patches - 2) // last if room else 0),
            (lambda gone: cls.fraction({early: round(gone / patches, 6)}, align), patches - 1 if room else -1),
        ]
        for make, largest in families:
            number = bisect_left(range(largest + 1), True, key=lambda n: ratio(make(n)) >= speedup)
            if number <= largest:
                return make(number)
        limit = max(ratio(make(largest)) for make, largest in families if largest >= 0)
        raise ValueError(f"speed-up {speedup:g} is out of reach: multiply-adds shrink {limit:.3f} times at most here")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read ``{"constant": {"rate": 8}}`` or ``{"stages": {"at": {6: 50}}}``, as the YAML files write it. Raises
        ValueError for an unknown rule or argument, with the ones that exist."""
        allowed_for: dict[str, tuple[str, ...]] = dict.fromkeys(("fraction", "kept", "stages"), ("at", "align"))
        allowed_for |= {"constant": ("rate", "first_extra", "align"), "squares": ("at",)}
        if not isinstance(config, Mapping) or len(config) != 1 or (rule := next(iter(config))) not in allowed_for:
            raise ValueError(f"schedule {config}: name exactly one rule of {sorted(allowed_for)}")
        first, allowed, given = allowed_for[rule][0], sorted(allowed_for[rule]), config[rule] or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"schedule {rule}: {given!r} is not a mapping; allowed: {allowed}")
        if unknown := sorted(map(str, set(given) - set(allowed))):
            raise ValueError(f"schedule {rule}: unknown {unknown}; allowed: {allowed}")
        if first not in given:
            raise ValueError(f"schedule {rule}: {[first]} is missing; allowed: {allowed}")
        return getattr(cls, rule)(given[first], **{key: value for key, value in given.items() if key != first})

    def to_config(self) -> dict[str, Any]:
        """The inverse of ``from_config``, with plain JSON types."""
        if self.rule == "constant":
            return {"constant": {"rate": self.rate, "first_extra": self.first_extra, "align": self.align}}
        return {self.rule: {"at": {str(block): number for block, number in self.at}, "align": self.align}}

    def describe(self) -> str:
        """As the paper writes it: ``R=8``, ``R=50 @ 6,12,18``, ``80% @ 3``; ``K=`` before counts that are kept. In
        ``R=8 +5 @ 1`` the first module prunes 5 more. Three or more blocks in a row are a range, ``R=9 @ 1-6``."""
        if self.rule == "constant":
            extra = f" +{self.first_extra} @ 1" if self.first_extra > 1 else ""
            return f"R={self.rate}{extra}" if self.rate else "none"
        blocks = _ranges([block for block, _ in self.at])
        numbers = [f"{number:.0%}" if self.rule == "fraction" else f"{number:g}" for _, number in self.at]
        text = numbers[0] if len(set(numbers)) == 1 else ",".join(numbers)
        return {"stages": "R=", "fraction": "", "kept": "K="}[self.rule] + f"{text} @ {blocks}"

    def resolve(
        self, num_patches: int, depth: int, fusion: bool = False, prefix: int = 0, share: Fraction = Fraction(1)
    ) -> tuple[int, ...]:
        """Patch tokens alive after each block and its reducer.

        Args:
            num_patches: patch tokens that enter block 1.
            depth: blocks of the model.
            fusion: pruned tokens come back before the last block, so that pruning stops one block earlier.
            prefix: tokens that are never pruned; counted by ``align`` only.
            share: how much of the schedule is in force (see ``ramp``); numbers to prune are scaled by it and rounded
                down, and share 0 prunes nothing.

        Raises ValueError if nothing would be left or a block is out of range, with the limit.
        """
        if num_patches < 1 or depth < 1:
            raise ValueError(f"{num_patches} patch tokens, {depth} blocks: a model has 1 or more of both")
        last = depth - 2 if fusion else depth - 1
        wanted = self._wanted(num_patches, max(last, 0), share)
        counts, alive = [], num_patches
        for block in range(1, depth + 1):
            if block in wanted:
                alive = min(alive, -(-(wanted[block] + prefix) // self.align) * self.align - prefix)
            counts.append(alive)
        if fusion:
            counts[-1] = num_patches
        return tuple(counts)

    def sites(self, depth: int, fusion: bool = False) -> tuple[int, ...]:
        """Blocks (from 1) that are followed by a reducer, whatever the image size."""
        if self.rule == "constant":
            return tuple(range(1, (depth - 2 if fusion else depth - 1) + 1)) if self.rate else ()
        return tuple(block for block, _ in self.at)

    def _wanted(self, num_patches: int, last: int, share: Fraction) -> dict[int, int]:
        """Counts to reach, per block that prunes, before alignment; checked."""
        if self.rule == "constant":
            if not self.rate:
                return {}
            total = self.rate * last + self.first_extra
            if total >= num_patches:
                fix = (num_patches - 1 - self.first_extra) // last if last else 0
                pruned = f"rate {self.rate} prunes {total} of {num_patches} patch tokens over {last} blocks"
                raise ValueError(f"{pruned}; at least 1 must stay: lower the rate to {fix} or less")
            if not (rate := floor(self.rate * share)):
                return {}
            return {b: num_patches - self.first_extra - rate * b for b in range(1, last + 1)}
        wanted, alive = {}, num_patches
        for block, number in self.at:
            if block > last:
                reason = f"the last block to prune after is {last} here (one block must follow, two with fusion)"
                raise ValueError(f"prune after block {block}: {reason}")
            before, left = alive, {"fraction": alive * (1 - number), "stages": alive - number, "kept": number}
            alive = round(left[self.rule])
            if not 1 <= alive <= before:
                found = f"{self.rule} {number:g} after block {block} would leave {alive} of {before} patch tokens"
                raise ValueError(f"{found}; it must leave 1 to {before}")
            wanted[block] = alive
        return {block: num_patches - floor((num_patches - count) * share) for block, count in wanted.items()}


def ramp(position: int, length: int) -> Fraction:
    """Share of the schedule in force at ``position`` (from 0) of a training run of ``length``: the curriculum.

    It rises linearly over the first half and is 1 from there: min(1, position / (length / 2 - 1)), odd lengths too.
    In epochs and times R, this is the authors' floor(R e / (E / 2 - 1)). Runs of less than 3 have no ramp.
    """
    return Fraction(1) if length < 3 else min(Fraction(2 * position, length - 2), Fraction(1))


def trace(counts: tuple[int, ...], num_patches: int, prefix: int = 0) -> tuple[int, ...]:
    """Tokens at the input and after every block, prefix included: 197, 188, 180, ... (paper's way to write it)."""
    return tuple(count + prefix for count in (num_patches, *counts))


def attended(counts: tuple[int, ...], num_patches: int, fusion: bool, prefix: int = 0) -> tuple[int, ...]:
    """Tokens that every block computes on, prefix included; with fusion the last one sees all."""
    before = [num_patches, *counts[:-1]]
    if fusion:
        before[-1] = num_patches
    return tuple(count + prefix for count in before)


def _ranges(blocks: list[int]) -> str:
    """``1-6`` for blocks in a row, ``6,12,18`` for others."""
    found = groupby(enumerate(blocks), lambda item: item[1] - item[0])
    runs = [[block for _, block in run] for _, run in found]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _sorted(at: Mapping[int, float], whole: bool = True) -> tuple[tuple[int, Any], ...]:
    """Blocks, which JSON has as text, and numbers. ValueError: not numbers."""
    if not isinstance(at, Mapping):
        raise ValueError(f"at {at!r}: must be a mapping of block to number, such as {{6: 50}}")
    blocks = [int(block) if isinstance(block, str) and block.isdecimal() else block for block in at]
    pairs = zip(blocks, at.values(), strict=True)
    return tuple(sorted((_number(block, "block"), _number(number, "number", whole)) for block, number in pairs))


def _number(value: Any, what: str, whole: bool = True) -> Any:
    """A finite number, as int if it must be ``whole``. ValueError: it is none."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and -MOST <= value <= MOST) or (whole and value != int(value)):
        raise ValueError(f"{what} {value!r}: must be a {'whole ' * whole}number up to {MOST}")
    return int(value) if whole else value
