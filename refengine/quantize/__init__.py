"""Quantizing a checkpoint into packed weights, in the layout that NVIDIA releases.

recipes  the format of each weight
write    the new directory, in strips of rows, so that memory does not depend on the size of the model
"""

from refengine.quantize.recipes import FORMATS, RECIPES, Recipe, recipe_of
from refengine.quantize.write import quantize

__all__ = ["FORMATS", "RECIPES", "Recipe", "quantize", "recipe_of"]
