"""What a measurement of the laboratory is told. Defaults measure the paper's ViT-L/16 with Cropr at R=8.

Pure Python and pydantic, no torch: the workflow and the command line read and write these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from cropr.specs import Attention, ModelSpec, Precision, PruneSpec, Spec

_LARGE = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg"})


def _cropr(rate: int) -> dict[str, PruneSpec]:
    """Cropr without and with LLF."""
    schedule = {"constant": {"rate": rate}}
    return {
        "cropr": PruneSpec(reducer="cropr", schedule=schedule),
        "cropr_llf": PruneSpec(reducer="cropr", schedule=schedule, fusion="llf"),
    }


class LabSpec(Spec):
    """What all measurements share. ``measure`` has no default, so that it enters the digest."""

    measure: str
    model: ModelSpec = _LARGE
    image_size: int = Field(224, ge=16)


class VariantsSpec(LabSpec):
    """A measurement of the unpruned model and of variants that prune it."""

    variants: dict[str, PruneSpec] = Field(_cropr(8), min_length=1)
    """By name; ``unpruned`` is always measured beside them."""

    @field_validator("variants")
    @classmethod
    def _named(cls, value: dict[str, PruneSpec]) -> dict[str, PruneSpec]:
        if "unpruned" in value:
            raise ValueError("'unpruned' is measured in any case; give the variant another name")
        return value


class SweepSpec(VariantsSpec):
    """Throughput of all variants in every precision with every attention kernel, for every batch size.

    For one batch size everything takes turns in one process, so that any two of its cells can be compared.
    """

    measure: Literal["sweep"]
    batch_sizes: list[int] = Field([4], min_length=1)
    precisions: list[Precision] = Field(["fp32"], min_length=1)
    attentions: list[Attention] = Field(["auto"], min_length=1)
    channels_last: bool = False
    rounds: int = Field(3, ge=3)
    warmup: int = Field(1, ge=1)

    @field_validator("batch_sizes", "precisions", "attentions")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        return _distinct(value, least=1)


def around(multiples: tuple[int, ...], reach: int) -> list[int]:
    """All counts at most ``reach`` away from one of the ``multiples``."""
    return sorted({count for middle in multiples for count in range(middle - reach, middle + reach + 1)})


class BlocksSpec(LabSpec):
    """Latency of one block over token counts."""

    measure: Literal["blocks"]
    tokens: list[int] = Field(around((64, 128, 192), 8), min_length=4)
    """Counts with prefix. The default surrounds multiples of 64; 197, ViT's at 224 px, is among them."""
    batch_size: int = Field(2, ge=1)
    precision: Precision = "fp32"
    attention: Attention = "auto"
    rounds: int = Field(5, ge=3)

    @field_validator("tokens")
    @classmethod
    def _once(cls, value: list[int]) -> list[int]:
        return _distinct(value, least=2)


class ProfileSpec(VariantsSpec):
    """Where the time of a forward pass goes."""

    measure: Literal["profile"]
    batch_size: int = Field(4, ge=1)
    precision: Precision = "fp32"
    attention: Attention = "auto"
    passes: int = Field(3, ge=1)


class ScoringSpec(LabSpec):
    """Scoring with one vector, against scoring with all queries and summing.

    The paper's segmenter unless told otherwise: EVA-02-L at 512 px, R=40, Last Layer Fusion.
    """

    measure: Literal["scoring"]
    model: ModelSpec = ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16})
    image_size: int = Field(512, ge=16)
    prune: PruneSpec = PruneSpec(reducer="cropr", schedule={"constant": {"rate": 40}}, fusion="llf")
    queries: int | None = Field(None, ge=1)
    """Of every module; None for one a patch, as in segmentation."""
    batch_size: int = Field(1, ge=1)
    precision: Precision = "bf16"
    attention: Attention = "auto"
    rounds: int = Field(5, ge=3)
    warmup: int = Field(1, ge=1)

    @field_validator("prune")
    @classmethod
    def _learned(cls, value: PruneSpec) -> PruneSpec:
        if value.reducer != "cropr" or value.options:
            raise ValueError("queries are Cropr's: name reducer 'cropr', without options")
        return value


class TrainingSpec(VariantsSpec):
    """Time and peak memory of a training step, and peak memory of a forward pass for inference.

    A ViT-S unless told otherwise: all variants are in memory at once, and a ViT-L takes 5 GB with its gradients and
    AdamW's moments. It prunes 16 tokens a block: at 8, its 12 blocks would keep more than half.
    """

    measure: Literal["training"]
    model: ModelSpec = ModelSpec(name="vit_small_patch16_224", args={"global_pool": "avg"})
    variants: dict[str, PruneSpec] = Field(_cropr(16), min_length=1)
    batch_size: int = Field(8, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """As a recipe's: bf16 and fp16 are autocast."""
    rounds: int = Field(3, ge=3)


MEASURES: dict[str, type[LabSpec]] = {
    "sweep": SweepSpec,
    "blocks": BlocksSpec,
    "profile": ProfileSpec,
    "scoring": ScoringSpec,
    "training": TrainingSpec,
}
"""Kinds of measurement by name."""


def _distinct(value: list[Any], least: int) -> list[Any]:
    """The list as it is, checked.

    Raises:
        ValueError: a value twice, or a number below ``least``.
    """
    if len(set(value)) < len(value):
        raise ValueError("give every value once")
    if small := [number for number in value if isinstance(number, int) and number < least]:
        raise ValueError(f"{small[0]} must be {least} or more")
    return value
