"""Routers that cannot be run by themselves, and weigh experts in a way that depends on those that are dropped.

Both take a softmax over all their rows and hand the probability of the chosen expert on as it is, so that it grows when
rows go. Zaya's router needs the state of the router before it; Switch's answers with a mask instead of ids.
"""

from __future__ import annotations

from moeprune.facts import Routing

READ_IN_CODE = {
    "switch_transformers": Routing(scoring="softmax", renormalised=False, scale=1.0),
    "zaya": Routing(scoring="softmax", renormalised=False, scale=1.0, bias="correction"),
}


def routing_as_read(model_type: str, probed: Routing) -> Routing:
    """What was found by running the router, else what its code says."""
    return probed if probed.scoring != "unknown" else READ_IN_CODE.get(model_type, probed)
