"""What a grower may look at: the network as it is, and the batches to judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_split.architecture import Architecture
from lightning_split.candidates import Candidate
from lightning_split.curvature import LossFn, SplittingOperator
from lightning_split.differences import SplittingDifferences
from lightning_split.ranks import Ranks
from lightning_split.sampling import ImportantSamples, Weigh, important_samples
from lightning_split.significance import FreshBatches, GainTest

__all__ = ["GrowthContext"]


@dataclass(frozen=True)
class GrowthContext:
    """One growth's view of the network. A grower measures with it and changes nothing."""

    model: nn.Module
    arch: Architecture  # the groups that may grow
    loss_fn: LossFn
    batches: Sequence[Any]  # what directions are found on
    fresh: FreshBatches | None = None  # what gains are measured again on; None: no confirmation
    test: GainTest | None = None  # says when the gains are known well enough
    all_schemes: bool = False  # whether the strategy wants every scheme of a neuron, or its best one
    surrogate_beta: float | None = 3.0
    train_mode: bool = False
    cache_bytes: int = 2**28
    seed: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    def operator(self, batches: Sequence[Any], weigh: Sequence[Weigh] | None = None) -> SplittingOperator:
        """The splitting matrices of all neurons, averaged over some batches."""
        return SplittingOperator(
            self.model,
            self.arch,
            batches,
            self.loss_fn,
            surrogate_beta=self.surrogate_beta,
            train=self.train_mode,
            cache_bytes=self.cache_bytes,
            seed=self.seed,
            weigh=weigh,
        )

    def important(self, share: float | None) -> ImportantSamples:
        """A share of the samples of the estimation batches; see :func:`.sampling.important_samples`."""
        return important_samples(
            self.model,
            self.arch,
            self.batches,
            self.loss_fn,
            share,
            train=self.train_mode,
            seed=self.seed,
        )

    def differences(self, batches: Sequence[Any]) -> SplittingDifferences:
        """What displacements of all neurons change, batch by batch."""
        return SplittingDifferences(
            self.model, self.arch, batches, self.loss_fn, train=self.train_mode, seed=self.seed
        )

    def settled(self, candidates: Sequence[Candidate], num_batches: int, alternatives: int = 1) -> bool:
        """Whether the gains, measured on so many fresh batches, are known well enough to choose.

        Args:
            candidates: With gains and standard errors as measured so far.
            num_batches: Of all processes together.
            alternatives: Each gain is the largest of so many that were measured.
        """
        known = self.test is not None and self.test.settled(candidates, num_batches, alternatives)
        return self.ranks.agree(known)
