"""A plan on a model in memory."""
