"""Ways to spend less on language models, measured side by side on recorded tables.

A policy answers a query with one call or several (`Policy`); what each would have cost, how long it
would have taken and how good its answers are follows from what models answered before (`Recorded`).
"""

from __future__ import annotations

from routellm.policies.hull import aiq, hull
from routellm.policies.measure import Measured, budget, measure
from routellm.policies.policy import Point, Policy, answerable, answered, fitted
from routellm.policies.recorded import Recorded, Split, load_recorded

__all__ = [
    "Measured",
    "Point",
    "Policy",
    "Recorded",
    "Split",
    "aiq",
    "answerable",
    "answered",
    "budget",
    "fitted",
    "hull",
    "load_recorded",
    "measure",
]
