# SPDX-License-Identifier: Apache-2.0
"""Recipes: what to prune, when, and how to train meanwhile, by name or from a YAML file."""

from obs_kernels.recipes.model import DistillationSettings, LayerDropSettings, Recipe, TrainingSettings
from obs_kernels.recipes.read import json_schema, recipe_from_dict
from obs_kernels.recipes.shipped import load_recipe, recipe_aliases, recipe_names

__all__ = [
    "DistillationSettings",
    "LayerDropSettings",
    "Recipe",
    "TrainingSettings",
    "json_schema",
    "load_recipe",
    "recipe_aliases",
    "recipe_from_dict",
    "recipe_names",
]
