"""How to see the experts of a module: one file for each way in which transformers holds experts."""

from moeprune.calibrate.experts.kinds import kind_of, observable

__all__ = ["kind_of", "observable"]
