"""Quantize a checkpoint into packed weights, in the layout of NVIDIA's releases.

recipes   the format of each weight
calibrate the scales of inputs and of a cache
write     the new directory, in strips of rows, so that memory does not depend on the size of the model
evaluate  the distance between the distributions of a copy and of the original
"""

from refengine.quantize.evaluate import can_evaluate, evaluate
from refengine.quantize.recipes import FORMATS, RECIPES, Recipe, recipe_of
from refengine.quantize.write import quantize

__all__ = ["FORMATS", "RECIPES", "Recipe", "can_evaluate", "evaluate", "quantize", "recipe_of"]
