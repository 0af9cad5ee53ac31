"""The eigensolvers against dense eigen-decompositions of plain matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.eigen import Eigenpairs, EigenSolver, Exact, Lanczos, RayleighDescent
from lightning_split.krylov import KrylovSpace, pieces, random_vectors, unit
from torch import Tensor
from torch.testing import assert_close

SPECTRA: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "random": lambda n, d, g: torch.randn(n, d, dtype=torch.float64, generator=g),
    "clustered": lambda n, d, g: torch.randint(-1, 2, (n, d), generator=g).double(),
    "zero": lambda n, d, g: torch.zeros(n, d, dtype=torch.float64),
    "identity": lambda n, d, g: torch.ones(n, d, dtype=torch.float64),
    "rank one": lambda n, d, g: torch.eye(1, d, dtype=torch.float64).repeat(n, 1),
    "negative rank one": lambda n, d, g: -torch.eye(1, d, dtype=torch.float64).repeat(n, 1),
}


class Matrices:
    """Symmetric matrices of every group as a counted, batched product."""

    def __init__(self, matrices: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.matrices = {name: matrix.to(dtype) for name, matrix in matrices.items()}
        self.dtype = dtype
        self.shapes = {name: (m.shape[0], m.shape[-1]) for name, m in self.matrices.items()}
        self.num_products = 0

    def __call__(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.num_products += 1
        assert vectors.keys() == self.matrices.keys()
        assert all(v.dtype == self.dtype for v in vectors.values())
        return {name: (self.matrices[name] @ v.unsqueeze(-1)).squeeze(-1) for name, v in vectors.items()}

    def solve(self, solver: EigenSolver, seed: int = 0) -> dict[str, Eigenpairs]:
        return solver.solve(self, self.shapes, dtype=self.dtype, device="cpu", seed=seed)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Matrices (N, D, D) with the given eigenvalues (N, D) in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n, d = eigenvalues.shape
    q = torch.linalg.qr(torch.randn(n, d, d, dtype=torch.float64, generator=generator)).Q
    return (q * eigenvalues.unsqueeze(1)) @ q.mT


def spectrum(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    return symmetric(SPECTRA[kind](n, d, torch.Generator().manual_seed(seed)), seed)


def krylov(
    matrices: Matrices, num_products: int, basis_size: int, seed: int
) -> tuple[Eigenpairs, KrylovSpace]:
    """The Krylov space of one group, also where the solver would do without, and what it answers."""
    space = KrylovSpace(
        "g",
        matrices.shapes["g"],
        num_products,
        basis_size,
        dtype=matrices.dtype,
        device="cpu",
        seed=seed,
    )
    for _ in range(num_products):
        space.extend(matrices({"g": space.last()})["g"])
    basis = [q.clone() for q in space.basis]  # which finding the extremes uses up
    values, vectors, residuals = space.extremes()
    space.basis = basis
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    scale = values.abs().amax(-1, keepdim=True)
    return Eigenpairs(values, unit, residuals, residuals <= 1e-2 * scale + 1e-30), space


def check_pairs(pairs: Eigenpairs, matrices: Tensor, rtol: float) -> None:
    """Unit vectors, true residuals within ``rtol`` of the scale, and the extremes of ``eigh``."""
    matrices = matrices.double()
    values, vectors = pairs.values.double(), pairs.vectors.double()
    expected = torch.linalg.eigvalsh(matrices)[:, [0, -1]]
    scale = expected.abs().amax(-1, keepdim=True)
    assert_close(vectors.norm(dim=-1), torch.ones_like(values), rtol=0, atol=1e-5)
    zero = torch.zeros_like(values)
    unit = torch.where(scale > 0, scale, torch.ones_like(scale))
    assert_close((values - expected) / unit, zero, rtol=0, atol=rtol)
    true_residuals = (vectors @ matrices - values.unsqueeze(-1) * vectors).norm(dim=-1)
    assert_close(true_residuals / unit, zero, rtol=0, atol=rtol)
    assert_close(pairs.residuals.double() / unit, true_residuals / unit, rtol=0, atol=rtol)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(SPECTRA)),
    n=st.integers(1, 4),
    d=st.integers(1, 12),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_a_full_krylov_space_equals_eigh(
    kind: str, n: int, d: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """With as many products as dimensions, Lanczos equals eigh on every spectrum and scale.

    Both by a Krylov space and, as the solver chooses for so few dimensions, column by column.
    """
    matrices = Matrices({"g": scale * spectrum(kind, n, d, seed)}, dtype)
    for pairs in (krylov(matrices, d, d, seed)[0], matrices.solve(Lanczos(d), seed=seed)["g"]):
        check_pairs(pairs, matrices.matrices["g"], rtol=2e-5 if dtype == torch.float32 else 1e-11)
        assert pairs.values.dtype == pairs.vectors.dtype == pairs.residuals.dtype == dtype
        assert bool(pairs.converged.all())


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(sorted(SPECTRA)),
    n=st.integers(1, 3),
    d=st.integers(5, 14),
    basis_size=st.integers(4, 7),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_restarts_lose_nothing_but_time(
    kind: str, n: int, d: int, basis_size: int, scale: float, dtype: torch.dtype
) -> None:
    """A small basis reaches eigh with more products, on every spectrum; it stays orthonormal throughout.

    Where two eigenvalues at an end are close, four or five vectors take long to tell their vectors apart.
    """
    matrices = Matrices({"g": scale * spectrum(kind, n, d)}, dtype)
    pairs, space = krylov(matrices, 150, basis_size, 0)
    check_pairs(pairs, matrices.matrices["g"], rtol=3e-3)
    assert bool(pairs.converged.all())
    basis = torch.stack(space.basis, dim=1).double()
    assert basis.shape[1] <= basis_size
    identity = torch.eye(basis.shape[1], dtype=torch.float64).expand(n, -1, -1)
    assert_close(basis @ basis.mT, identity, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("d", [50, 200])
def test_five_vectors_are_nearly_as_good_as_sixteen(d: int) -> None:
    """On random matrices, whose ends are dense, the values fall short by half a percent of the scale."""
    dense = spectrum("random", 40, d)
    short, full = (Matrices({"g": dense}).solve(Lanczos(16, basis_size=b))["g"].values for b in (5, 16))
    scale = torch.linalg.eigvalsh(dense).abs().amax(-1, keepdim=True)
    difference = (full - short) * torch.tensor([-1.0, 1.0], dtype=torch.float64) / scale
    assert abs(float(difference.mean())) < 5e-3
    assert float(difference.max()) < 5e-2


def test_neurons_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a piece: start vectors of their own, restarts, exhausted spaces."""
    dense = torch.cat([spectrum(kind, 2, 12, seed=3) for kind in sorted(SPECTRA)])
    for numbers in (1, 25, 60):
        monkeypatch.setattr("lightning_split.krylov._PIECE", numbers)
        assert [s.stop - s.start for s in pieces((5, 12))] == {1: [1] * 5, 25: [2, 2, 1], 60: [5]}[numbers]
        start = random_vectors((12, 12), 0, "g", 0, dtype=torch.float64, device="cpu")
        some = random_vectors((12, 12), 0, "g", 0, dtype=torch.float64, device="cpu", rows=slice(3, 8))
        assert torch.equal(some, start[3:8])
        assert float((unit(start) @ unit(start).mT).fill_diagonal_(0).abs().max()) < 0.95
        pairs, _ = krylov(Matrices({"g": dense}), 12, 12, 0)
        check_pairs(pairs, dense, rtol=1e-11)
        check_pairs(krylov(Matrices({"g": dense}), 150, 7, 0)[0], dense, rtol=3e-3)


def test_residuals_bound_the_true_ones_after_restarts() -> None:
    """Nearly equal for symmetric products, and still a bound for one that is not symmetric."""
    generator = torch.Generator().manual_seed(0)
    for symmetric_part in (True, False):
        dense = torch.randn(5, 40, 40, dtype=torch.float64, generator=generator)
        dense = dense + dense.mT if symmetric_part else dense
        pairs = Matrices({"g": dense}).solve(Lanczos(15))["g"]
        product = (dense.unsqueeze(1) @ pairs.vectors.unsqueeze(-1)).squeeze(-1)
        true = (product - pairs.values.unsqueeze(-1) * pairs.vectors).norm(dim=-1)
        assert bool((pairs.residuals >= true * (1 - 1e-9)).all())
        if symmetric_part:
            assert_close(pairs.residuals, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["clustered", "zero", "identity", "rank one", "negative rank one"])
def test_few_products_suffice_for_few_distinct_eigenvalues(kind: str, dtype: torch.dtype) -> None:
    """An exhausted Krylov space holds the exact extremes and gains no spurious ones."""
    matrices = Matrices({"g": spectrum(kind, 6, 40)}, dtype)
    pairs = matrices.solve(Lanczos(8))["g"]
    check_pairs(pairs, matrices.matrices["g"], rtol=2e-5 if dtype == torch.float32 else 1e-11)


def test_neurons_of_one_group_may_be_exhausted_at_different_steps() -> None:
    """Zero, rank-one and generic neurons in one group are all solved."""
    kinds = ["zero", "rank one", "random", "identity", "negative rank one", "clustered"]
    dense = torch.cat([spectrum(kind, 1, 9, seed=3) for kind in kinds])
    check_pairs(Matrices({"g": dense}).solve(Lanczos(9))["g"], dense, rtol=1e-11)


def test_ends_agree_where_there_is_one_eigenvalue_only() -> None:
    """A single weight, or a single product, gives the same pair at both ends."""
    one_weight = Matrices({"g": torch.tensor([[[-3.0]], [[0.0]]], dtype=torch.float64)})
    pairs = one_weight.solve(Lanczos(16))["g"]
    assert_close(pairs.values, torch.tensor([[-3.0, -3.0], [0.0, 0.0]], dtype=torch.float64))
    assert_close(pairs.vectors, torch.ones(2, 2, 1, dtype=torch.float64))
    one_product = Matrices({"g": spectrum("random", 2, 5)}).solve(Lanczos(1))["g"]
    assert_close(one_product.values[:, 0], one_product.values[:, 1])
    assert not bool(one_product.converged.any())


@settings(deadline=None, max_examples=30)
@given(
    dims=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    num_products=st.integers(1, 16),
)
def test_products_are_counted(dims: list[int], num_products: int) -> None:
    """Lanczos takes min(num_products, largest D) products for all groups together."""
    matrices = Matrices({f"g{i}": spectrum("random", 2, d) for i, d in enumerate(dims)})
    matrices.solve(Lanczos(num_products))
    assert matrices.num_products == min(num_products, max(dims))
    matrices.num_products = 0
    pairs = matrices.solve(Lanczos(num_products, exact_dim=10))
    exact = {n: d for n, (_, d) in matrices.shapes.items() if d <= max(10, num_products)}
    assert matrices.num_products == max([*exact.values(), num_products * (len(exact) < len(dims))])
    for name in exact:
        check_pairs(pairs[name], matrices.matrices[name], rtol=1e-11)


def test_other_solvers_count_their_products() -> None:
    """RayleighDescent takes two runs of num_steps products, Exact as many as the largest D."""
    matrices = Matrices({"a": spectrum("random", 2, 3), "b": spectrum("random", 1, 7)})
    matrices.solve(RayleighDescent(5))
    assert matrices.num_products == 10
    matrices.solve(Exact())
    assert matrices.num_products == 17


def test_sixteen_products_converge_on_a_decaying_spectrum() -> None:
    """Values, vectors and certificates are right at D = 100 with separated ends."""
    values = torch.cat(
        [torch.tensor([-3.0, 4.0], dtype=torch.float64), torch.linspace(-1, 1, 98).double()]
    ).repeat(5, 1)
    dense = symmetric(values)
    pairs = Matrices({"g": dense}).solve(Lanczos(16))["g"]
    assert bool(pairs.converged.all())
    check_pairs(pairs, dense, rtol=1e-2)
    assert_close(pairs.values, values[:, :2], rtol=1e-5, atol=0)


def test_a_neuron_that_did_not_converge_is_reported() -> None:
    """Converged is exactly the comparison of the residual with tol, neuron by neuron."""
    easy, hard = spectrum("rank one", 1, 60), spectrum("random", 1, 60)
    dense = torch.cat([easy, hard])
    pairs = Matrices({"g": dense}).solve(Lanczos(4))["g"]
    assert pairs.converged.tolist() == [[True, True], [False, False]]
    true = (pairs.vectors @ dense - pairs.values.unsqueeze(-1) * pairs.vectors).norm(dim=-1)
    assert_close(pairs.residuals, true, rtol=1e-9, atol=1e-12)
    loose = Matrices({"g": dense}).solve(Lanczos(4, tol=10.0))["g"]
    assert bool(loose.converged.all())


def test_residuals_are_true_for_a_product_that_is_not_symmetric() -> None:
    """The certificate does not rest on symmetry, so that it shows a wrong operator."""
    generator = torch.Generator().manual_seed(0)
    skewed = torch.randn(3, 6, 6, dtype=torch.float64, generator=generator)
    pairs = Matrices({"g": skewed}).solve(Lanczos(6))["g"]
    product = (skewed.unsqueeze(1) @ pairs.vectors.unsqueeze(-1)).squeeze(-1)
    true = (product - pairs.values.unsqueeze(-1) * pairs.vectors).norm(dim=-1)
    assert_close(pairs.residuals, true, rtol=1e-9, atol=1e-9)
    assert not bool(pairs.converged.any())


@pytest.mark.parametrize("solver", [Lanczos(6), RayleighDescent(30), Exact()], ids=repr)
def test_runs_are_repeatable_and_groups_independent(solver: EigenSolver) -> None:
    """Bit-identical results whatever other groups exist and in whatever order."""
    dense = {"a": spectrum("random", 3, 10), "b": spectrum("rank one", 4, 5, seed=1)}
    together = Matrices(dense).solve(solver, seed=7)
    reverse = Matrices(dict(reversed(dense.items()))).solve(solver, seed=7)
    for name, matrix in dense.items():
        alone = Matrices({name: matrix}).solve(solver, seed=7)[name]
        for field in ("values", "vectors", "residuals", "converged"):
            expected = getattr(together[name], field)
            assert torch.equal(getattr(alone, field), expected)
            assert torch.equal(getattr(reverse[name], field), expected)


def test_start_vectors_depend_on_seed_and_name_only() -> None:
    """Another seed or another name starts elsewhere; the global random state is not touched."""
    starts = []
    state = torch.get_rng_state()
    for name, seed in [("a", 0), ("b", 0), ("a", 1)]:
        matrices = Matrices({name: spectrum("random", 2, 30)})
        starts.append(matrices.solve(Lanczos(1), seed=seed)[name].vectors[:, 0])
    assert torch.equal(torch.get_rng_state(), state)
    cosines = [(starts[i] * starts[j]).sum(-1).abs().max() for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert max(cosines) < 0.8


@pytest.mark.parametrize("exponent", [-80, -20, 20, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_the_operator_scales_the_values_only(exponent: int, dtype: torch.dtype) -> None:
    """Bit-identical vectors for S and 2^k S, also where squares would leave the range."""
    dense = spectrum("random", 3, 20)
    reference = Matrices({"g": dense}, dtype).solve(Lanczos(8))["g"]
    scaled = Matrices({"g": 2.0**exponent * dense}, dtype).solve(Lanczos(8))["g"]
    assert torch.equal(scaled.values, 2.0**exponent * reference.values)
    assert torch.equal(scaled.vectors, reference.vectors)
    assert torch.equal(scaled.residuals, 2.0**exponent * reference.residuals)
    assert torch.equal(scaled.converged, reference.converged)


@pytest.mark.parametrize("kind", ["graded", "rank one"])
def test_the_basis_stays_orthonormal(kind: str) -> None:
    """The vectors given to the product are orthonormal although the ends converge at once."""
    graded = 10.0 ** -torch.arange(30, dtype=torch.float64)
    dense = symmetric(graded.repeat(4, 1)) if kind == "graded" else spectrum(kind, 4, 30)
    matrices = Matrices({"g": dense}, torch.float32)
    seen: list[Tensor] = []

    def product(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(vectors["g"].double())
        return matrices(vectors)

    space = KrylovSpace("g", matrices.shapes["g"], 30, 30, dtype=torch.float32, device="cpu", seed=0)
    for _ in range(30):
        space.extend(product({"g": space.last()})["g"])
    basis = torch.stack(seen, dim=1)
    gram = basis @ basis.mT
    assert_close(gram, torch.eye(30, dtype=torch.float64).expand(4, -1, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", [Lanczos(12), RayleighDescent(50), Exact()], ids=repr)
def test_the_sign_of_an_eigenvector_is_fixed(solver: EigenSolver) -> None:
    """The entry of largest magnitude is positive."""
    vectors = Matrices({"g": spectrum("random", 8, 12)}).solve(solver)["g"].vectors
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rayleigh_descent_reaches_an_easy_spectrum(scale: float, dtype: torch.dtype) -> None:
    """The recipe of the paper comes near both extremes where they are well separated."""
    values = torch.cat(
        [torch.tensor([-3.0, 4.0], dtype=torch.float64), torch.linspace(-1, 1, 18).double()]
    ).repeat(4, 1)
    matrices = Matrices({"g": scale * symmetric(values)}, dtype)
    pairs = matrices.solve(RayleighDescent(400))["g"]
    check_pairs(pairs, matrices.matrices["g"], rtol=2e-2)
    assert_close(pairs.values.double() / scale, values[:, :2], rtol=1e-3, atol=0)
    assert bool(pairs.converged.all())


def test_rayleigh_descent_reports_what_it_did_not_reach() -> None:
    """After a handful of steps nothing has converged, and the residuals say how far it is."""
    dense = spectrum("random", 3, 30)
    pairs = Matrices({"g": dense}).solve(RayleighDescent(3))["g"]
    assert not bool(pairs.converged.any())
    true = (pairs.vectors @ dense - pairs.values.unsqueeze(-1) * pairs.vectors).norm(dim=-1)
    assert_close(pairs.residuals, true, rtol=1e-9, atol=0)


def test_rayleigh_descent_leaves_a_zero_matrix_at_zero() -> None:
    """A linear neuron has zero eigenvalues and unit vectors, not NaN."""
    pairs = Matrices({"g": spectrum("zero", 2, 4)}).solve(RayleighDescent(10))["g"]
    check_pairs(pairs, spectrum("zero", 2, 4), rtol=1e-12)


@pytest.mark.parametrize("kind", sorted(SPECTRA))
@pytest.mark.parametrize("d", [1, 2, 7])
def test_exact_equals_eigh(kind: str, d: int) -> None:
    """Exact gives the ends of eigh, from products and from the dense matrices alike."""
    dense = {"a": spectrum(kind, 3, d), "b": spectrum("random", 2, 4)}
    matrices = Matrices(dense)
    built = matrices.solve(Exact())
    given_ = Exact().solve(
        lambda vectors: pytest.fail("no product is needed"),
        matrices.shapes,
        dtype=torch.float64,
        device="cpu",
        dense=dense.__getitem__,
    )
    for name, matrix in dense.items():
        check_pairs(built[name], matrix, rtol=1e-12)
        assert_close(given_[name].values, built[name].values, rtol=1e-12, atol=1e-12)
        assert bool(built[name].converged.all())


def test_lanczos_does_not_suffer_from_autocast() -> None:
    """The basis stays orthogonal in a mixed-precision region."""
    dense = spectrum("random", 3, 24)
    matrices = Matrices({"g": dense}, torch.float32)

    def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast("cpu", enabled=False):
            return matrices(vectors)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = Lanczos(24).solve(product, matrices.shapes, dtype=torch.float32, device="cpu")["g"]
    check_pairs(pairs, matrices.matrices["g"], rtol=2e-5)


def test_products_with_a_graph_leave_none_behind() -> None:
    """The results need no gradient even if the product was differentiable."""
    weight = spectrum("random", 2, 4).requires_grad_()
    pairs = Lanczos(4).solve(
        lambda V: {"g": (weight @ V["g"].unsqueeze(-1)).squeeze(-1)},
        {"g": (2, 4)},
        dtype=torch.float64,
        device="cpu",
    )["g"]
    assert not pairs.values.requires_grad
    assert not pairs.vectors.requires_grad
    assert weight.grad is None


SOLVERS = [Lanczos(4), RayleighDescent(4), Exact()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_names_group_and_count(solver: EigenSolver, bad: float) -> None:
    """The message says which group and how many of its neurons."""
    dense = {"fine": spectrum("random", 2, 4), "layer3.conv": spectrum("random", 5, 4)}
    dense["layer3.conv"][[0, 3]] = bad
    with pytest.raises(ValueError, match=r"'layer3\.conv' is not finite for 2 of 5 neurons"):
        Matrices(dense).solve(solver)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_wrong_problems_are_refused(solver: EigenSolver) -> None:
    """Missing groups, wrong shapes, empty groups and half precision are one sentence each."""
    float64 = {"dtype": torch.float64, "device": "cpu"}
    with pytest.raises(ValueError, match="no product for group 'b'"):
        solver.solve(lambda V: {"a": V["a"]}, {"a": (1, 2), "b": (1, 2)}, **float64)
    with pytest.raises(ValueError, match=r"'a' has shape \(2, 1\), expected \(1, 2\)"):
        solver.solve(lambda V: {"a": V["a"].mT}, {"a": (1, 2)}, **float64)
    for shape in [(0, 3), (3, 0)]:
        with pytest.raises(ValueError, match=r"'a' has shape .* leave out groups"):
            solver.solve(dict, {"a": shape}, **float64)
    with pytest.raises(ValueError, match=r"float32 or torch\.float64, got torch\.bfloat16"):
        solver.solve(dict, {"a": (1, 2)}, dtype=torch.bfloat16, device="cpu")
    assert solver.solve(dict, {}, **float64) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lanczos(8, basis_size=3), "basis_size >= 4, got 3"),
        (lambda: Lanczos(8, exact_dim=-1), "exact_dim >= 0, got -1"),
        (lambda: Lanczos(0), "Lanczos needs num_products >= 1, got 0"),
        (lambda: Lanczos(4, tol=-1.0), "Lanczos needs tol >= 0, got -1.0"),
        (lambda: Lanczos(4, tol=math.nan), "Lanczos needs tol >= 0, got nan"),
        (lambda: RayleighDescent(0), "RayleighDescent needs num_steps >= 1"),
        (lambda: RayleighDescent(lr=-1.0), "needs lr between 0 and 1"),
        (lambda: RayleighDescent(average=0.0), "needs average between 0 and 1"),
        (lambda: RayleighDescent(momentum=1.5), "needs momentum between 0 and 1"),
        (lambda: RayleighDescent(num_decays=-1), "needs num_decays >= 0"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], EigenSolver], message: str) -> None:
    """Options out of range are refused when the solver is made."""
    with pytest.raises(ValueError, match=message):
        make()


def test_solvers_are_values() -> None:
    """The first argument is positional, repr is the log line, equal settings are equal."""
    assert Lanczos(16) == Lanczos(num_products=16, tol=1e-2)
    assert repr(Lanczos(16)) == "Lanczos(num_products=16, tol=0.01, basis_size=5, exact_dim=0)"
    assert RayleighDescent(100).num_steps == 100
    assert repr(Exact()) == "Exact()"
