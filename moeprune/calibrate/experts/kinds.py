"""Which kind of experts a module holds."""

from __future__ import annotations

from torch import nn

from moeprune.calibrate.experts.children import CHILDREN
from moeprune.calibrate.experts.dense import DENSE
from moeprune.calibrate.experts.interface import INTERFACE
from moeprune.calibrate.experts.loop import LOOP
from moeprune.calibrate.experts.projections import PROJECTIONS
from moeprune.calibrate.experts.seen import Kind
from moeprune.calibrate.stats import EXPERT_SUMS
from moeprune.errors import UnsupportedModelError

KINDS = (INTERFACE, CHILDREN, PROJECTIONS, LOOP, DENSE)


def kind_of(module: nn.Module) -> Kind:
    """The kind of an experts module, by its interface; the weights may be on the meta device.

    Raises:
        UnsupportedModelError: If its experts cannot be observed, naming class and reason.
    """
    kind = next((kind for kind in KINDS if kind.matches(module)), None)
    name = type(module).__name__
    if kind is None:
        known = "; ".join(kind.name for kind in KINDS)
        raise UnsupportedModelError(f"{name} cannot be observed: it holds experts in none of the known ways ({known}).")
    reason = kind.refusal(module)
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot be observed: {reason}.")
    return kind


def observable(module: nn.Module) -> tuple[bool, str]:
    """Whether the experts of ``module`` can be observed, without running it; it may be on the meta device.

    Returns:
        True and the names of the sums that calibration gives, with commas; or False and the reason.
    """
    try:
        kind = kind_of(module)
    except UnsupportedModelError as error:
        return False, str(error)
    return True, ", ".join(name for name in EXPERT_SUMS if name in kind.quantities)
