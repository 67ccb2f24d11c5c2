"""Specifications of microbenchmarks, without torch. Defaults measure the paper's ViT-L/16 with Cropr at R=8."""

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from cropr.bench.specs import UNPRUNED, Attention, Distinct, Positive, Precision, Rounds
from cropr.specs import ModelSpec, PruneSpec, Spec


def _cropr(rate: int) -> dict[str, PruneSpec]:
    cropr = PruneSpec(reducer="cropr", schedule={"constant": {"rate": rate}})
    return {"cropr": cropr, "cropr_llf": cropr.model_copy(update={"fusion": "llf"})}


class MicrobenchSpec(Spec):
    """Fields of all microbenchmarks. ``cells`` is the ``module:function`` that measures; ``measure`` has no default, so
    that it enters the digest."""

    cells: ClassVar[str]
    measure: str
    model: ModelSpec = ModelSpec(name="vit_large_patch16_224", args={"global_pool": "avg"})
    image_size: int = Field(224, ge=16)

    def places(self) -> list[dict[str, Any]]:
        """How each cell of the record is run."""
        axes = {key: [getattr(self, key, "auto")] for key in ("batch_size", "precision", "attention")} | self._axes()
        return [dict(zip(axes, place, strict=True)) for place in product(*axes.values())]

    def _axes(self) -> dict[str, Sequence[Any]]:
        """By what the cells differ."""
        raise NotImplementedError


class OneSettingSpec(MicrobenchSpec):
    """A measurement with one batch size, precision and attention kernel."""

    batch_size: Positive = 4
    precision: Precision = "fp32"
    attention: Attention = "auto"


class VariantsSpec(MicrobenchSpec):
    """A measurement of the unpruned model and of variants that prune it."""

    variants: dict[str, PruneSpec] = Field(_cropr(8), min_length=1)
    """By name; ``unpruned`` is always measured beside them."""

    def _axes(self) -> dict[str, Sequence[Any]]:
        return {"variant": (UNPRUNED, *self.variants)}

    @field_validator("variants")
    @classmethod
    def _named(cls, value: dict[str, PruneSpec]) -> dict[str, PruneSpec]:
        if UNPRUNED in value:
            raise ValueError(f"{UNPRUNED!r} is measured in any case; give the variant another name")
        return value


class SweepSpec(VariantsSpec):
    """Throughput of all variants in every precision with every attention kernel, for every batch size."""

    cells: ClassVar[str] = "workflow.paper.microbench.sweep:sweep_cells"
    measure: Literal["sweep"]
    batch_sizes: Annotated[list[Positive], Distinct] = Field([4], min_length=1)
    precisions: Annotated[list[Precision], Distinct] = Field(["fp32"], min_length=1)
    attentions: Annotated[list[Attention], Distinct] = Field(["auto"], min_length=1)
    channels_last: bool = False
    rounds: Rounds = 3
    warmup: Positive = 1

    def _axes(self) -> dict[str, Sequence[Any]]:
        settings: dict[str, Any] = {"precision": self.precisions, "attention": self.attentions}
        return {"batch_size": self.batch_sizes, **settings, **super()._axes()}


class BlocksSpec(OneSettingSpec):
    """Latency of one block over token counts."""

    cells: ClassVar[str] = "workflow.paper.microbench.time_blocks:block_cells"
    measure: Literal["blocks"]
    tokens: Annotated[list[Annotated[int, Field(ge=2)]], Distinct] = Field(
        [n for m in (64, 128, 192) for n in range(m - 8, m + 9)], min_length=4
    )
    """Counts with prefix. The default surrounds multiples of 64; 197, ViT's at 224 px, is among them."""
    batch_size: Positive = 2
    rounds: Rounds = 5

    def _axes(self) -> dict[str, Sequence[Any]]:
        return {"tokens": sorted(self.tokens)}


class ProfileSpec(VariantsSpec, OneSettingSpec):
    """Time of a forward pass by part."""

    cells: ClassVar[str] = "workflow.paper.microbench.profiling:profile_cells"
    measure: Literal["profile"]
    passes: Positive = 3


class ScoringSpec(OneSettingSpec):
    """Scoring with one vector, against scoring with all queries and summing; by default of the paper's segmenter."""

    cells: ClassVar[str] = "workflow.paper.microbench.scoring:scoring_cells"
    measure: Literal["scoring"]
    model: ModelSpec = ModelSpec(name="eva02_large_patch14_224", args={"patch_size": 16})
    image_size: int = Field(512, ge=16)
    prune: PruneSpec = PruneSpec(reducer="cropr", schedule={"constant": {"rate": 40}}, fusion="llf")
    queries: Positive | None = None
    """Of every module; None for one a patch, as in segmentation."""
    batch_size: Positive = 1
    precision: Precision = "bf16"
    rounds: Rounds = 5
    warmup: Positive = 1

    def _axes(self) -> dict[str, Sequence[Any]]:
        return {"variant": (UNPRUNED, "one_vector", "all_queries")}

    @field_validator("prune")
    @classmethod
    def _learned(cls, value: PruneSpec) -> PruneSpec:
        if value.reducer != "cropr" or value.options:
            raise ValueError("queries are Cropr's: name reducer 'cropr', without options")
        return value


class TrainingSpec(VariantsSpec):
    """Time and peak memory of a training step, and peak memory of a forward pass for inference. By default of a ViT-S:
    all variants are in memory at once, and a ViT-L takes 5 GB with gradients and AdamW's moments."""

    cells: ClassVar[str] = "workflow.paper.microbench.training_step:training_cells"
    measure: Literal["training"]
    model: ModelSpec = ModelSpec(name="vit_small_patch16_224", args={"global_pool": "avg"})
    variants: dict[str, PruneSpec] = Field(_cropr(16), min_length=1)
    batch_size: Positive = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """As a recipe's: bf16 and fp16 are autocast."""
    rounds: Rounds = 3


MEASURES: dict[str, type[MicrobenchSpec]] = {
    str(get_args(kind.model_fields["measure"].annotation)[0]): kind
    for kind in (SweepSpec, BlocksSpec, ProfileSpec, ScoringSpec, TrainingSpec)
}
"""Kinds of measurement by name."""
