"""Drive a recipe through all stages, and redo only what changed."""
