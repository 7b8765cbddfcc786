"""What the shapes of a model do not show: one small file for each such thing."""
