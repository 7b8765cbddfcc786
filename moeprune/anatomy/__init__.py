"""Where a model keeps its routers and experts: derived from the model class, not tabulated."""
