"""A plan on a checkpoint on disk: bytes are copied, the model is never loaded."""
