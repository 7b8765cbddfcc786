"""Calibration of models that do not fit into memory: one decoder layer's weights at a time."""
