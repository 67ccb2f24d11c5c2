"""The pruning rate over a run: a curriculum from none to the whole schedule.

The authors' segmentation prunes R_e = floor(R e / (E / 2 - 1)) tokens a module in epoch e of E, and R from the middle
on. Like a learning rate, the share of the schedule is a function of the step alone, so that a run which is resumed goes
on with the right one; the step is in every checkpoint. Evaluation prunes by the whole schedule at any time: what is
measured during a run is what would be deployed.

At rate 0 ours prunes nothing, where the authors' first module still removes its extra token: the first epoch trains
the unpruned model itself, which can be tested, and the queries all the same.
"""

from __future__ import annotations

from fractions import Fraction

from cropr.pruning.schedule import ramp
from cropr.specs import RecipeSpec
from cropr.training.optim import total_steps


def pruning_share(recipe: RecipeSpec, step: int, steps_per_epoch: int) -> Fraction:
    """Share of the schedule in force at an optimizer step, which counts from 0; 1 without a curriculum.

    It rises with each epoch, as the authors' does. Runs of part epochs, and those of less than three, for which the
    authors' formula has no ramp, rise with each step instead.
    """
    if not recipe.curriculum:
        return Fraction(1)
    if recipe.epochs >= 3 and recipe.epochs == int(recipe.epochs):
        return ramp(step // steps_per_epoch, int(recipe.epochs))
    return ramp(step, total_steps(recipe, steps_per_epoch))
