r"""Smallest and largest eigenpair of every block of a block-diagonal symmetric operator.

Knows no networks: a solver sees a product ``matvec`` that maps, for every group at once, the rows
of an ``(N, D)`` tensor to ``S_n @ v_n``, and returns one :class:`Eigenpairs` per group. All neurons
of all groups advance together, so the cost is counted in products, whatever the number of neurons.

Shapes: ``N`` neurons of a group, ``D`` incoming weights of one neuron.
"""

from lightning_split.eigen.base import Eigenpairs, EigenSolver
from lightning_split.eigen.descent import RayleighDescent
from lightning_split.eigen.exact import Exact
from lightning_split.eigen.lanczos import Lanczos

__all__ = ["EigenSolver", "Eigenpairs", "Exact", "Lanczos", "RayleighDescent"]
