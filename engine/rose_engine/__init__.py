"""ROSE: edit facts inside causal language models, keep them when asked, take them back bit for bit."""

from rose_engine.delta import Delta, DeltaError
from rose_engine.editor import Editor, Result
from rose_engine.edits import Edit, EditError, read_edits
from rose_engine.recipe import ROSE, Recipe

__all__ = ["ROSE", "Delta", "DeltaError", "Edit", "EditError", "Editor", "Recipe", "Result", "read_edits"]
