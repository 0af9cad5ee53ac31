"""Splitting schemes: weights of the offspring, and where they go along the two extreme eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Scheme", "schemes"]


@dataclass(frozen=True)
class Scheme:
    r"""Offspring weights :math:`w`, and displacements :math:`\delta_i = a_i v_- + b_i v_+`.

    The loss changes by :math:`\varepsilon^2/2\,(\alpha \lambda_- + \beta \lambda_+)` with
    :math:`\alpha = \sum w_i a_i^2` and :math:`\beta = \sum w_i b_i^2`.
    """

    name: str
    weights: tuple[float, ...]  # (m,)
    along: tuple[tuple[float, float], ...]  # (m, 2): a_i, b_i

    @property
    def coefficients(self) -> tuple[float, float]:
        """α and β: how the two extreme eigenvalues enter the change of the loss."""
        pairs = list(zip(self.weights, self.along, strict=True))
        return sum(w * a * a for w, (a, _) in pairs), sum(w * b * b for w, (_, b) in pairs)


def schemes(max_offspring: int, c: float, *, signed: bool = True) -> list[Scheme]:
    r"""The splitting schemes with at most ``max_offspring`` offspring and :math:`\sum|w_i| \le c`.

    All satisfy :math:`\sum w_i = 1`, :math:`\sum w_i\delta_i = 0` and :math:`\|\delta_i\| \le 1`. The mixed
    triplet beats both pure ones where :math:`\lambda_- < 0 < \lambda_+` are of like size. No others with
    as many offspring reach a lower value than the best of these (docs, theory).

    Source: S2D (Liu, Wu, Wang 2019), Theorem 2.3, for the positive binary scheme; S3D (Wu et al. 2020) for
    the signed ones.
    """
    found = [Scheme("positive binary", (0.5, 0.5), ((1.0, 0.0), (-1.0, 0.0)))]
    if not signed or c <= 1:
        return found
    ratio = (c - 1) / (c + 1)
    up, down = (c + 1) / 4, -(c - 1) / 4
    found.append(Scheme("negative binary", (2 * down, 2 * up), ((0.0, 1.0), (0.0, ratio))))
    if max_offspring >= 3:
        a = (1 - ratio**2) ** 0.5
        found += [
            Scheme("positive triplet", (up, up, 2 * down), ((1.0, 0.0), (-1.0, 0.0), (0.0, 0.0))),
            Scheme("negative triplet", (down, down, 2 * up), ((0.0, 1.0), (0.0, -1.0), (0.0, 0.0))),
            Scheme("mixed triplet", (up, up, 2 * down), ((a, ratio), (-a, ratio), (0.0, 1.0))),
        ]
    if max_offspring >= 4:
        along = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
        found.append(Scheme("quartet", (up, up, down, down), along))
    return found
