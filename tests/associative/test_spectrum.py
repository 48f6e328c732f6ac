"""The eigendecomposition: primal and dual forms are one, and W is within its bound of a float64 SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_faast.associative import Choice, Regression, Spectrum, SufficientStatistics
from lightning_faast.associative.spectrum import as_dense
from tests.associative.oracles import (
    SHAPES,
    blobs,
    relative,
    ridge_solution,
    spectrum_of,
    statistics_of,
    svd_solution,
    with_spectrum,
)


def solution(spectrum, kind, value):
    readout = Regression(spectrum, Choice(kind, value))
    return readout.linear(), readout.error_bound


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_dual_and_primal_forms_are_one(centered, weighted):
    keys, labels = blobs(12, 40, 3)
    weights = torch.rand(12).double() + 0.2 if weighted else None
    primal, dual = (spectrum_of(keys, labels, weights, centered=centered, dual=dual) for dual in (False, True))
    assert primal.rank == dual.rank == 12 - centered
    if not weighted:
        assert primal.interpolates
        assert primal.full
    assert relative(dual.eigenvalues, primal.eigenvalues) < 1e-12
    assert relative(dual.basis.T @ dual.basis, torch.eye(dual.rank)) < 1e-12
    assert primal.value_trace == pytest.approx(dual.value_trace, rel=1e-12)
    for kind, value in (("ridge", 0.3), ("truncation", 0.3)):
        found, expected = solution(dual, kind, value)[0], solution(primal, kind, value)[0]
        assert relative(found.weight, expected.weight) < 1e-10
        assert relative(found.bias, expected.bias) < 1e-10


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.booleans(), st.sampled_from(["plain", "duplicated", "constant", "far"]), st.integers(0, 1000))
def test_ridge_is_least_squares_on_the_rows(shape, bias, kind, seed):
    n, d = shape
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "duplicated":
        keys = keys[torch.randint(n, (n,), generator=generator)]
    if kind == "constant":
        keys[:, 0] = 0.1
    if kind == "far":
        keys += 100
    values = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for dual in (False, True):
        found, bound = solution(spectrum_of(keys, values, centered=bias, dual=dual), "ridge", 0.5)
        weight, offset = ridge_solution(keys, values, 0.5, bias=bias)
        assert float((found.weight - weight).norm()) <= max(bound, 1e-12) * max(float(weight.norm()), 1e-6)
        assert float((found.bias - offset).norm()) <= 1e-8 * (1 + float(offset.norm()))


CASES = [(c, a) for c in (1e2, 1e4, 1e6) for a in (0.5, 0.8, 1.0, 1.2)]


@pytest.mark.parametrize(("condition", "alpha"), CASES)
@pytest.mark.parametrize("signal", [True, False], ids=["signal", "noise"])
def test_truncated_solution_against_a_float64_svd(condition, alpha, signal):
    n, d = 1500, 64
    keys = with_spectrum(n, d, condition)
    values = torch.randn(n, 3, dtype=torch.float64)
    if signal:
        values = keys @ torch.randn(d, 3, dtype=torch.float64) + 0.1 * values
    rtol = n**-alpha
    found, bound = solution(spectrum_of(keys, values, centered=False), "truncation", rtol)
    error = relative(found.weight, svd_solution(keys, values, rtol))
    print(f"condition {condition:.0e} rtol {rtol:.1e}: error {error:.1e}, bound {bound:.1e}")
    if rtol**2 >= 1e-7:
        assert error <= 1e-8
    assert error <= bound
    assert bound < 1e-2, "useful where the threshold is this far above the floor"


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7, 1e-9, 0.0])
def test_the_bound_is_a_bound(condition, rtol):
    keys = with_spectrum(400, 30, condition, seed=3)
    values = torch.randn(400, 2, dtype=torch.float64)
    found, bound = solution(spectrum_of(keys, values, centered=False), "truncation", rtol)
    assert relative(found.weight, svd_solution(keys, values, rtol)) <= bound


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("mu", [1e-12, 1e-8, 1e-3, 10.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bound_of_a_ridge_is_a_bound(condition, mu, bias):
    keys = with_spectrum(400, 30, condition, seed=4) + 0.1 * bias
    values = torch.randn(400, 2, dtype=torch.float64)
    found, bound = solution(spectrum_of(keys, values, centered=bias), "ridge", mu)
    error = relative(found.weight, ridge_solution(keys, values, mu, bias=bias)[0])
    assert error <= bound
    if mu >= 1e-3:
        assert bound < 1e-3


def test_a_bound_that_cannot_be_known_is_infinite():
    keys = with_spectrum(400, 30, 1e9)
    assert solution(spectrum_of(keys, torch.randn(400, 2), centered=False), "truncation", 0.0)[1] == float("inf")


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 50_000])
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_what_is_no_direction_of_the_data_is_under_the_floor(n, d):
    """Constant and collinear columns: the noise they leave after centring must not pass for an eigenvalue."""
    generator = torch.Generator().manual_seed(n + d)
    line = torch.randn(1, d, generator=generator, dtype=torch.float64)
    constant = torch.rand(1, d, generator=generator, dtype=torch.float64).repeat(n, 1)
    along = 100 + torch.randn(n, 1, generator=generator, dtype=torch.float64) @ line
    labels = torch.zeros(n, dtype=torch.long)
    assert spectrum_of(constant, labels).rank == 0
    assert spectrum_of(along, labels).rank == (1 if n > 1 else 0)
    assert spectrum_of(constant, labels, centered=False).rank == 1


def test_ranks_and_trace():
    keys, labels = blobs(60, 8, 3)
    found = spectrum_of(keys, labels)
    assert (found.rank, found.full, found.interpolates) == (8, True, False)
    centred = as_dense(labels, 3) - as_dense(labels, 3).mean(0)
    assert found.value_trace == pytest.approx(float(centred.square().sum()), rel=1e-12)
    doubled = spectrum_of(torch.cat([keys, keys], 1), labels)
    assert (doubled.rank, doubled.full) == (8, False)


@pytest.mark.parametrize("keys", [torch.zeros(5, 3), torch.full((5, 3), 1e-170, dtype=torch.float64)])
def test_keys_without_any_scale(keys):
    found = spectrum_of(keys, torch.zeros(5, dtype=torch.long), centered=False)
    assert found.rank == 0
    assert float(solution(found, "ridge", 1.0)[0].weight.abs().max()) == 0


def test_sums_that_overflowed_and_sums_without_rows_are_refused():
    sums = SufficientStatistics()
    sums.allocate(3, 2)
    with pytest.raises(RuntimeError, match="No rows were seen"):
        Spectrum.from_statistics(sums, centered=True)
    sums = statistics_of(torch.full((2, 3), 1e153, dtype=torch.float64), torch.tensor([0, 1]))
    sums = sums.mapped(lambda tensor: tensor * 1e10)
    with pytest.raises(ValueError, match="overflowed"):
        Spectrum.from_statistics(sums, centered=False)
