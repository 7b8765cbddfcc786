"""Calibration text: where it comes from, how rows of data become token ids, how these are packed and kept."""
