"""Every way of choosing the regularization, against brute force and scikit-learn."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from lightning_faast.associative import (
    GCV,
    Automatic,
    Choice,
    FastWeights,
    LeaveOneOut,
    PaperRule,
    Ridge,
    Spectrum,
    Truncation,
    calibration,
)
from lightning_faast.associative.regularization import gcv_scores, residual_sum_of_squares, ridge_grid
from tests.associative.oracles import (
    blobs,
    hat_matrix_gcv,
    one_hot,
    relative,
    ridge_solution,
    spectrum_of,
    svd_solution,
)


def regression_data(n, d, *, noise=1.0, seed=0, columns=2):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(d, columns, generator=generator, dtype=torch.float64)
    return keys, keys @ weight + 3 + noise * torch.randn(n, columns, generator=generator, dtype=torch.float64)


def synthetic(n: float, d: int, *, decay: float, noise: float, centered=True, seed=0) -> Spectrum:
    """What n rows of d features would leave, without the rows."""
    rank = int(min(d, n - centered))
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = n * torch.logspace(0, -decay, rank, dtype=torch.float64)
    signal = torch.randn(rank, 3, generator=generator, dtype=torch.float64) * eigenvalues[:, None] / d**0.5
    projected = (
        signal + noise * torch.randn(rank, 3, generator=generator, dtype=torch.float64) * eigenvalues.sqrt()[:, None]
    )
    explained = float((projected.square().sum(1) / eigenvalues).sum())
    floor = max(d, 4 * math.sqrt(n)) * 2**-53 * (float(eigenvalues[0]) if rank else 1.0)
    kept = eigenvalues > floor
    return Spectrum(
        torch.empty(d, int(kept.sum())), eigenvalues[kept], projected[kept], torch.zeros(d), torch.zeros(3), float(n),
        explained + 3 * noise**2 * max(0.0, n - rank), floor, 0.0, centered,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(60, 7), (9, 30)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mu", [0.01, 5.0])
def test_ridge_is_scikit_learns(shape, bias, weighted, mu):
    keys, values = regression_data(*shape)
    weights = torch.rand(len(keys)).double() + 0.1 if weighted else None
    model = FastWeights(regularization=Ridge(mu), readout="regression", bias=bias).double().fit(keys, values, weights)
    oracle = SklearnRidge(mu, fit_intercept=bias, solver="svd" if shape[0] > shape[1] else "cholesky")
    oracle.fit(keys.numpy(), values.numpy(), None if weights is None else weights.numpy())
    assert relative(model.weight, torch.from_numpy(oracle.coef_)) < 1e-10
    assert relative(model(keys), torch.from_numpy(oracle.predict(keys.numpy()))) < 1e-10
    if not weighted:
        assert model.score(keys, values) == pytest.approx(oracle.score(keys.numpy(), values.numpy()), rel=1e-10)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_gcv_is_the_hat_matrix_one(shape, bias, dual):
    keys, values = regression_data(*shape)
    spectrum = spectrum_of(keys, values, centered=bias, dual=dual)
    grid = torch.logspace(-2, 4, 25, dtype=torch.float64)
    expected = torch.tensor([hat_matrix_gcv(keys, values, float(mu), bias=bias) for mu in grid], dtype=torch.float64)
    assert relative(gcv_scores(spectrum, grid), expected) < 1e-9
    choice = GCV().choose(spectrum)
    assert choice.grid.numel() == choice.scores.numel()
    if not choice.at_edge:
        brute = torch.tensor([hat_matrix_gcv(keys, values, float(mu), bias=bias) for mu in choice.grid[-100:]])
        assert float(choice.grid[-100:][int(brute.argmin())]) == choice.value


def test_the_textbook_residual_loses_its_digits_and_ours_does_not():
    keys, values = regression_data(12, 40, noise=0.1)
    spectrum = spectrum_of(keys, values)
    mu = torch.tensor([1e-9], dtype=torch.float64)
    filtered = 1 / (spectrum.eigenvalues + mu)
    b = spectrum.projected.square().sum(1)
    textbook = spectrum.value_trace - float((2 * b * filtered - b * spectrum.eigenvalues * filtered**2).sum())
    left = spectrum.coordinates(keys) @ (filtered[:, None] * spectrum.projected) + spectrum.value_mean - values
    stable = float(residual_sum_of_squares(spectrum, mu))
    dual = (
        (mu * torch.linalg.solve(_centred(keys) @ _centred(keys).T + mu * torch.eye(12), _centred(values)))
        .square()
        .sum()
    )
    assert stable == pytest.approx(float(dual), rel=1e-4)
    assert abs(textbook - stable) > 100 * stable
    assert float(left.square().sum()) < 1e-18


def _centred(rows):
    return rows - rows.mean(0)


@pytest.mark.parametrize("d", [2, 64, 1000, 8192])
@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**5, 10**7])
@pytest.mark.parametrize("decay", [1, 14])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_grid_serves_all_sizes(d, n, decay, noise):
    spectrum = synthetic(n, d, decay=decay, noise=noise)
    choice = GCV().choose(spectrum)
    assert math.isfinite(choice.value)
    assert choice.value > spectrum.floor
    if not spectrum.rank:
        assert choice.at_edge
        return
    grid = ridge_grid(spectrum)
    assert len(grid) < 300
    assert bool((grid.diff() > 0).all())
    assert float(grid[0]) >= 5 * spectrum.floor
    assert float(grid[-1]) == pytest.approx(100 * spectrum.largest)
    assert bool(choice.scores.isfinite().all())


def test_noise_free_data_takes_the_lowest_ridge():
    keys, values = regression_data(200, 6, noise=0.0)
    choice = GCV().choose(spectrum_of(keys, values))
    assert choice.at_edge
    assert choice.value == float(choice.grid[0])
    assert "grid edge" in str(choice)


@pytest.mark.parametrize("fallback", [1.0, 0.25])
@pytest.mark.parametrize("case", ["one shot", "no signal"])
def test_the_documented_fallback_at_an_edge(case, fallback):
    if case == "one shot":
        keys, values = torch.randn(10, 300, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    else:  # the values do not depend on the keys at all: by symmetry nothing can be explained
        keys = torch.tensor([[1.0], [-1], [1], [-1]]).repeat(5, 1)
        values = torch.tensor([[1.0], [1], [-1], [-1]]).repeat(5, 1)
    spectrum = spectrum_of(keys, values)
    choice = GCV(fallback).choose(spectrum)
    assert choice.at_edge
    if case == "one shot":
        assert choice.value == pytest.approx(fallback * float(spectrum.eigenvalues.mean()))


def test_a_fit_that_all_but_interpolates_falls_back():
    """N = r and the signal along the strongest direction: the lower, the better, down to no freedom left."""
    eigenvalues = torch.cat([torch.ones(1), torch.full((19,), 1e-4)]).double()
    projected = torch.eye(20, 1, dtype=torch.float64)
    zeros = torch.zeros(20).double()
    spectrum = Spectrum(torch.eye(20).double(), eigenvalues, projected, zeros, zeros[:1], 20.0, 1.0, 1e-14, 0.0, False)
    choice = GCV().choose(spectrum)
    assert choice.at_edge
    assert choice.value == pytest.approx(float(eigenvalues.mean()))


def test_identical_keys_leave_only_the_mean():
    choice = GCV().choose(spectrum_of(torch.ones(20, 3), torch.arange(20) % 2))
    assert choice.at_edge
    model = FastWeights().fit(torch.ones(20, 3), torch.arange(20) % 4 // 3)
    assert model.predict_proba(torch.randn(5, 3))[:, 1].tolist() == pytest.approx([0.25] * 5)


@pytest.mark.parametrize("n", [1, 5])
def test_weights_that_do_not_count_rows_are_refused(n):
    keys, values = regression_data(40, 8)
    with pytest.raises(ValueError, match="weights sum to"):
        FastWeights(readout="regression").fit(keys, values, torch.full((40,), n / 40))


@pytest.mark.parametrize("shape", [(300, 20), (20, 60)])
@pytest.mark.parametrize("rule", [PaperRule(), PaperRule(0.5), Truncation(0.2), Truncation(0.0)])
def test_truncation_is_the_pseudoinverse(shape, rule):
    keys, labels = blobs(*shape, 3)
    rtol = rule.rtol if isinstance(rule, Truncation) else len(keys) ** -rule.alpha
    model = FastWeights(regularization=rule, bias=False).double().fit(keys, labels)
    assert relative(model.weight, svd_solution(keys, one_hot(labels), rtol or 1e-10)) < 1e-9
    kept = torch.linalg.svdvals(keys)
    assert model.solution.effective_rank == pytest.approx(int((kept > rtol * kept[0]).sum()))
    assert model.solution.regularization.value == rtol
    assert model.solution.readout == "regression"


def test_the_papers_rule_has_no_bias():
    keys, labels = blobs(50, 5, 3)
    model = FastWeights(regularization=PaperRule()).double().fit(keys, labels)
    assert not model.has_bias
    assert float(model.bias.abs().max()) == 0
    assert FastWeights(regularization=Truncation(0.1)).fit(keys, labels).has_bias


def test_a_threshold_under_the_floor_is_reported():
    keys, values = regression_data(100, 5)
    assert FastWeights(regularization=Truncation(1e-9)).fit(keys, values).solution.below_floor
    assert not FastWeights(regularization=Truncation(1e-3)).fit(keys, values).solution.below_floor


def test_ridge_zero_on_singular_keys_is_refused():
    keys, values = regression_data(50, 4)
    exact = FastWeights(regularization=Ridge(0.0)).double().fit(keys, values)
    assert relative(exact.weight, ridge_solution(keys, values, 0.0, bias=True)[0]) < 1e-12
    for singular in (torch.cat([keys, keys], 1), keys[:3]):
        with pytest.raises(ValueError, match=r"Ridge\(0\) on keys of rank"):
            FastWeights(regularization=Ridge(0.0)).fit(singular, values[: len(singular)])


@pytest.mark.parametrize("multilabel", [False, True])
def test_automatic_takes_the_most_probable_ridge_where_every_row_is_held(multilabel):
    keys, labels = blobs(60, 20, 3, spread=0.4)
    values = one_hot(labels)[:, :2] if multilabel else labels
    found = FastWeights().double().fit(keys, values).solution.regularization
    mean = float(spectrum_of(keys, one_hot(labels)).eigenvalues.mean())
    decades = torch.linspace(-2, 2, 17, dtype=torch.float64)  # every quarter, by brute force

    def nats(decade):
        ridge = Ridge(mean * 10**decade)
        solution = FastWeights(regularization=ridge, correct=False).double().fit(keys, values).solution
        terms = values.numel()
        prior = calibration.temperature_penalty(solution.temperature, 3.0) + decade**2 / 2
        return solution.leave_one_out_loss * terms + prior

    expected = min(decades.tolist(), key=nats)
    assert found.value == pytest.approx(mean * 10**expected, rel=1e-6)
    assert float(found.scores.min()) == pytest.approx(nats(expected), rel=1e-9)
    assert not found.at_edge


@pytest.mark.parametrize(
    "options", [{"reservoir_size": 0}, {"reservoir_size": 29}, {"readout": "regression"}], ids=lambda o: str(o)
)
def test_automatic_is_gcv_elsewhere(options):
    keys, labels = blobs(60, 8, 3)
    automatic, gcv = (FastWeights(regularization=r, **options).double().fit(keys, labels) for r in (None, GCV()))
    assert automatic.solution.regularization == gcv.solution.regularization
    assert torch.equal(automatic.weight, gcv.weight)


def test_automatic_is_gcv_for_values_and_for_one_row_a_class():
    keys, values = regression_data(40, 6)
    cases = ((keys, values), (keys[:3], torch.arange(3)))
    for given_keys, given in cases:
        automatic, gcv = (FastWeights(regularization=r).fit(given_keys, given).solution for r in (None, GCV()))
        assert automatic.regularization == gcv.regularization


def test_automatic_goes_on_beyond_its_first_candidates():
    spectrum = spectrum_of(*regression_data(30, 4))
    mean = float(spectrum.eigenvalues.mean())

    def steep(choice: Choice) -> float:
        return 100 * abs(math.log10(choice.value / mean) - 2.25)

    assert Automatic().choose(spectrum, steep).value == pytest.approx(mean * 10**2.25)


@pytest.mark.parametrize("metric", ["log_loss", "error", "squared_error"])
@pytest.mark.parametrize("readout", ["discriminant", "regression"])
def test_leave_one_out_takes_the_candidate_of_lowest_loss(metric, readout):
    keys, labels = blobs(80, 30, 3, spread=0.4)
    model = FastWeights(regularization=LeaveOneOut(metric, candidates=9), readout=readout).double().fit(keys, labels)
    choice = model.solution.regularization
    assert choice.grid.numel() == choice.scores.numel() == 9
    assert float(choice.scores[choice.grid == choice.value]) == float(choice.scores.min())
    for mu, score in zip(choice.grid.tolist(), choice.scores.tolist(), strict=True):
        fixed = (
            FastWeights(regularization=Ridge(mu), readout=readout, shrink_means=True)
            .double()
            .fit(keys, labels)
            .solution
        )
        if metric == "log_loss":
            assert score == pytest.approx(fixed.leave_one_out_loss, rel=1e-9)
        elif metric == "error":
            assert score == pytest.approx(1 - fixed.leave_one_out_accuracy, abs=1e-12)


def test_leave_one_out_squared_error_is_the_press_statistic():
    keys, values = regression_data(40, 6)
    model = FastWeights(regularization=LeaveOneOut("squared_error", candidates=5)).double().fit(keys, values)
    for mu, score in zip(
        *(t.tolist() for t in (model.solution.regularization.grid, model.solution.regularization.scores)), strict=True
    ):
        errors = []
        for i in range(40):
            rest = torch.arange(40) != i
            without = FastWeights(regularization=Ridge(mu)).double().fit(keys[rest], values[rest])
            errors.append((without(keys[i : i + 1]) - values[i]).square().mean())
        assert score == pytest.approx(float(torch.stack(errors).mean()), rel=1e-8)


def test_leave_one_out_with_a_metric_of_ones_own():
    keys, labels = blobs(60, 10, 3)
    seen = []

    def metric(predictions, targets):
        seen.append((predictions.shape, targets.shape))
        return float(len(seen) != 3)  # only the third candidate is good

    model = FastWeights(regularization=LeaveOneOut(metric, candidates=5)).fit(keys, labels)
    choice = model.solution.regularization
    assert choice.value == float(choice.grid[2])
    assert not choice.at_edge
    assert seen == [((60, 3), (60,))] * 5


def test_plateaus_are_cut_in_their_middle():
    spectrum = spectrum_of(*regression_data(30, 4))
    losses = iter([5.0, 1, 1, 1, 7, 1, 9])
    choice = LeaveOneOut("error", candidates=7).choose(spectrum, lambda _: next(losses))
    assert choice.value == float(choice.grid[2])
    with pytest.raises(ValueError, match="not finite at any ridge"):
        LeaveOneOut().choose(spectrum, lambda _: float("nan"))
    with pytest.raises(ValueError, match="needs a reservoir"):
        LeaveOneOut().choose(spectrum)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge(-1), "mu must be"), (lambda: Ridge(float("nan")), "mu must be"),
        (lambda: Ridge(float("inf")), "mu must be"), (lambda: Truncation(1.0), "rtol must be"),
        (lambda: Truncation(float("nan")), "rtol must be"), (lambda: PaperRule(0), "alpha must be"),
        (lambda: GCV(0), "fallback must be"), (lambda: LeaveOneOut("accuracy"), "metric must be"),
        (lambda: LeaveOneOut(candidates=1), "candidates must be"),
        (lambda: FastWeights(regularization=LeaveOneOut(), reservoir_size=0), "needs a reservoir"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
