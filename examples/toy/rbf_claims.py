"""What the papers say of the RBF regression, and what is wanted of Mixed, against the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from toy.report import Claim, quartiles

if TYPE_CHECKING:
    from rbf import Probe, Run

S2D, S3D = "S2D", "S3D m=2 c=3"


def claims(runs: dict[str, Run], power: Tensor, tried: Probe) -> list[Claim]:
    """All claims; power (S,) is the variance of each target."""
    return [*of_theory(tried), *of_methods(runs, power), *of_mixed(runs, power)]


def of_theory(tried: Probe) -> list[Claim]:
    """Eigenvalues and directions."""
    pairs = torch.stack([tried.eigenvalues.flatten(), tried.at_once.flatten()])
    linear = float(torch.corrcoef(pairs)[0, 1])
    order = quartiles(rank_correlations(tried.eigenvalues, tried.trained))[1]
    at_once, later = (_off(tried.angles, t) for t in (tried.turned, tried.turned_trained))
    exact, close, count = int((at_once == 0).sum()), int((later <= 15).sum()), len(at_once)
    return [
        Claim(
            "S2D, figure 1b",
            "eigenvalue and decrease of the loss are linearly related",
            linear > 0.99,
            f"correlation {linear:.4f} at once; after training the median rank correlation is {order:.2f}",
        ),
        Claim(
            "S2D, figure 1c",
            "the loss falls most along the splitting gradient",
            exact == count,
            f"at once in {exact} of {count} networks; after training the best angle is within 15 degrees "
            f"in {close}",
        ),
    ]


def of_methods(runs: dict[str, Run], power: Tensor) -> list[Claim]:
    """S2D, S3D and their rivals."""
    middle = _medians(runs)
    stuck = {name: int(runs[name].stuck(power).sum()) for name in (S2D, S3D)}
    rivals = ("random split", "new initialisation", "gradient boosting", "from scratch")
    sweep = [S2D, *(name for name in runs if name.startswith("S3D m=2"))]
    wider = ("S3D m=3 c=3", "S3D m=4 c=3")
    return [
        Claim(
            "S2D, figure 1d",
            "S2D ends lowest of its rivals",
            all(middle[S2D] <= middle[r] for r in rivals),
            "medians " + _ranking(middle, S2D, *rivals),
        ),
        Claim(
            "S3D, figure 2a",
            "S2D gets stuck where S3D escapes",
            stuck[S3D] < stuck[S2D],
            f"S2D is stuck on {stuck[S2D]} targets, S3D (m = 2, c = 3) on {stuck[S3D]}",
        ),
        Claim(
            "target",
            "S3D (m = 2, c = 3) ends at 1/10 of S2D's loss or lower",
            middle[S3D] <= middle[S2D] / 10,
            f"1/{middle[S2D] / middle[S3D]:.0f}",
        ),
        Claim(
            "S3D, section 3",
            "two offspring are as good as three or four at equal width",
            middle[S3D] <= min(middle[name] for name in wider),
            "medians " + _ranking(middle, S3D, *wider),
        ),
        Claim(
            "S3D, figure 2b",
            "every c above 1 beats c = 1, which is S2D",
            all(middle[name] < middle[S2D] for name in sweep[1:]),
            "medians " + _ranking(middle, *sweep),
        ),
    ]


def of_mixed(runs: dict[str, Run], power: Tensor) -> list[Claim]:
    """Mixed against every single way to grow, also against stronger ones than the papers have."""
    middle = _medians(runs)
    single = [name for name in runs if not name.startswith(("Mixed", "best"))]
    best = min(single, key=middle.__getitem__)
    stuck = {name: run.stuck(power) for name, run in runs.items()}
    escapes = torch.stack([~stuck[name] for name in runs if not name.startswith("Mixed")]).any(0)
    caught = (stuck["Mixed"] & escapes).nonzero().flatten().tolist()
    loose = int(runs["Mixed"].unsettled(power).sum())
    strong = [name for name in runs if name.startswith("best")]
    wins = int((runs["Mixed"].final <= runs["best of 100 new"].final).sum())
    return [
        Claim(
            "target",
            "Mixed is as good as the best single method",
            middle["Mixed"] <= middle[best],
            f"Mixed {middle['Mixed']:.2g}, {best} {middle[best]:.2g}",
        ),
        Claim(
            "target",
            "Mixed is never stuck where another method escapes",
            not caught,
            f"in {len(caught)} cases{_ranges(runs['Mixed'], power, caught)}, and unsettled on {loose} "
            f"targets; S2D is stuck on {int(stuck[S2D].sum())}",
        ),
        Claim(
            "target",
            "Mixed beats stronger baselines of ours: the best of 100 new neurons, also with a trial",
            all(middle["Mixed"] <= middle[name] for name in strong),
            f"medians {_ranking(middle, 'Mixed', 'Mixed, trial', *strong)}; lower than the best of 100 on "
            f"{wins} of {len(power)} targets",
        ),
    ]


def _ranges(run: Run, power: Tensor, targets: list[int]) -> str:
    """Between which losses the last stage goes on some targets: the same ones in a minimum."""
    last = run.history[:, -(run.history.shape[1] // run.losses.shape[1]) :]
    found = [
        f"target {i}: the loss of the last stage between {float(run.lowest[i]):.2g} and "
        f"{float(last[i].max()):.2g}, variance {float(power[i]):.2g}"
        for i in targets
    ]
    return f" ({'; '.join(found)})" if found else ""


def rank_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's ρ of each row."""
    ranks = [x.argsort(1).argsort(1).double() for x in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))


def _off(angles: Tensor, decreases: Tensor) -> Tensor:
    """How many degrees the best angle (of a line, so 180 is 0) lies off the splitting gradient."""
    best = angles[decreases.argmax(1)]
    return torch.minimum(best, 180 - best)


def _medians(runs: dict[str, Run]) -> dict[str, float]:
    return {name: quartiles(run.final)[1] for name, run in runs.items()}


def _ranking(middle: dict[str, float], *names: str) -> str:
    return ", ".join(f"{name} {middle[name]:.2g}" for name in sorted(names, key=middle.__getitem__))
