"""Which part of the demo corpus a document belongs to, by a hash of its name: stable whatever else is added."""

import hashlib

SPLITS = ("train", "heldout", "calibration")
HELDOUT_PERCENT = 14
CALIBRATION_PERCENT = 6


def stable_hash(name):
    """A 64-bit integer that depends on the text `name` alone (unlike `hash`, which is salted in each process)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name):
    """The split ("train", "heldout" or "calibration") of the document called `name`."""
    percent = stable_hash(name) % 100
    if percent < HELDOUT_PERCENT:
        return "heldout"
    return "calibration" if percent < HELDOUT_PERCENT + CALIBRATION_PERCENT else "train"
