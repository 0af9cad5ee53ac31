"""Growers: how new neurons are proposed."""

from lightning_split.growers.base import Grower, NotApplicableError, Proposal
from lightning_split.growers.schemes import Scheme, schemes
from lightning_split.growers.steepest import SteepestSplitting, rayleigh_quotients

__all__ = [
    "Grower",
    "NotApplicableError",
    "Proposal",
    "Scheme",
    "SteepestSplitting",
    "rayleigh_quotients",
    "schemes",
]
