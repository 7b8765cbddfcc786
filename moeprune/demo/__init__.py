"""A small trained Mixture-of-Experts model that ships with moeprune, with calibration text to prune it.

Importing this module loads no torch. The model card is `model/README.md`.
"""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = _HERE / "model"
"""Folder of the embedded checkpoint: 5 layers of 64 experts, 8 active; loads with `from_pretrained`, offline."""

CALIBRATION = {
    domain: _HERE / "calibration" / f"{domain}.jsonl"
    for domain in ("python", "english", "json", "scripture", "c", "german", "web", "arithmetic")
}
"""Calibration text by domain: JSON lines `{"text": ...}`, disjoint from training and evaluation text."""
