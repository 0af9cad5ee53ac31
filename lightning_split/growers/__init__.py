"""Growers: how new neurons are proposed."""

from lightning_split.growers.base import Draft, Grower, NotApplicableError, PredictingGrower, Proposal
from lightning_split.growers.baselines import Net2Net, RandomSplit
from lightning_split.growers.confirming import rayleigh_quotients
from lightning_split.growers.folding import Folding
from lightning_split.growers.gradmax import GradMax
from lightning_split.growers.mixed import Mixed
from lightning_split.growers.newneurons import NewNeurons
from lightning_split.growers.schemes import Scheme, schemes
from lightning_split.growers.steepest import SteepestSplitting

__all__ = [
    "Draft",
    "Folding",
    "GradMax",
    "Grower",
    "Mixed",
    "Net2Net",
    "NewNeurons",
    "NotApplicableError",
    "PredictingGrower",
    "Proposal",
    "RandomSplit",
    "Scheme",
    "SteepestSplitting",
    "rayleigh_quotients",
    "schemes",
]
