"""The typed recipe: its sections, overrides, validation and explanation."""

from . import explain as explain
from . import facts as facts
from . import sections as sections
from .facts import with_absolute_paths as with_absolute_paths
from .recipe import Recipe as Recipe
from .recipe import RecipeError as RecipeError
from .recipe import load_recipe as load_recipe
from .recipe import validate_recipe as validate_recipe

__all__ = [
    "Recipe",
    "RecipeError",
    "explain",
    "facts",
    "load_recipe",
    "sections",
    "validate_recipe",
    "with_absolute_paths",
]
