"""Folders of safetensors as named byte ranges. Opening one reads headers only."""
