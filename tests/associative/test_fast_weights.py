"""FastWeights as an estimator and as a layer."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import r2_score
from torch import nn
from torchmetrics.classification import BinaryAccuracy, MultilabelAccuracy

from lightning_faast.associative import GCV, FastWeights, LeaveOneOut, PaperRule, Ridge, SufficientStatistics
from tests.associative.oracles import (
    GOLDEN,
    blobs,
    multi_hot,
    needs_golden,
    one_hot,
    relative,
    ridge_solution,
)


def regression(n=200, d=6, c=2):
    keys, _ = blobs(n, d, 3)
    return keys, keys @ torch.randn(d, c, dtype=torch.float64) + torch.randn(n, c, dtype=torch.float64)


def soft(n=200, d=6, c=3):
    keys, labels = blobs(n, d, c)
    return keys, 0.9 * one_hot(labels) + 0.1 / c


def embeddings(c=10, e=6):
    return torch.randn(c, e, generator=torch.Generator().manual_seed(5))


TASKS = {
    "classes": (lambda: blobs(200, 6, 3), {}),
    "one-hot": (lambda: (blobs(200, 6, 3)[0], one_hot(blobs(200, 6, 3)[1])), {}),
    "regression on classes": (lambda: blobs(200, 6, 3), {"readout": "regression"}),
    "multilabel": (lambda: multi_hot(200, 6, 3), {}),
    "multilabel regression": (lambda: multi_hot(200, 6, 3), {"readout": "regression"}),
    "binary": (lambda: (multi_hot(200, 6, 1)[0], multi_hot(200, 6, 1)[1][:, 0]), {"out_features": 1}),
    "regression": (regression, {}),
    "distribution": (soft, {}),
    "embeddings": (lambda: blobs(200, 6, 10), {"class_embeddings": embeddings()}),
    "identity": (
        lambda: blobs(200, 6, 10),
        {"class_embeddings": embeddings(), "zero_shot": "identity", "prior_count": 100.0},
    ),
    "zero shot": (lambda: blobs(200, 6, 3), {"zero_shot": torch.ones(3, 6), "prior_count": 50.0}),
    "normalized": (lambda: blobs(200, 6, 3), {"normalize": True}),
    "paper": (lambda: blobs(200, 6, 3), {"regularization": PaperRule()}),
}
each_task = pytest.mark.parametrize("task", TASKS)


def fitted(task, **options):
    make, own = TASKS[task]
    keys, values = make()
    return FastWeights(**{**own, **options}).double().fit(keys, values), keys, values


# ---------------------------------------------------------------------- estimator


@each_task
def test_fit_predict_score(task):
    model, keys, values = fitted(task)
    assert isinstance(model, FastWeights)
    predicted, score = model.predict(keys), model.score(keys, values)
    kind = model.solution.task
    if kind in ("regression", "distribution"):
        assert predicted.shape == values.shape
        assert score == pytest.approx(r2_score(values.numpy(), predicted.numpy()), rel=1e-12)
        with pytest.raises(RuntimeError, match="predict_proba needs class labels"):
            model.predict_proba(keys)
        return
    probabilities = model.predict_proba(keys)
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all())
    if kind == "classes":
        truth = values if values.ndim == 1 else values.argmax(-1)
        assert relative(probabilities.sum(-1), torch.ones(len(keys))) < 1e-12
        assert score == pytest.approx(float((predicted == truth).double().mean()))
        assert torch.equal(predicted, probabilities.argmax(-1))
        assert score > (0.15 if "embed" in task or task == "identity" else 0.6)
    else:
        assert torch.equal(predicted, (probabilities > 0.5).long().reshape(predicted.shape))
        assert predicted.shape == values.shape
        assert score > 0.5
    assert model.solution.leave_one_out_accuracy is not None


@each_task
def test_partial_fit_in_any_batches_is_fit(task):
    model, keys, values = fitted(task)
    own = TASKS[task][1]
    streamed = FastWeights(**own).double()
    for part in zip(keys.split(33), values.split(33), strict=True):
        assert streamed.partial_fit(*part) is streamed
    assert streamed.solution is None, "solved when first asked"
    assert relative(streamed.predict(keys).double(), model.predict(keys).double()) < 1e-10
    assert relative(streamed.weight, model.weight) < 1e-9
    assert float(streamed.temperature) == pytest.approx(float(model.temperature), rel=1e-6)
    streamed.partial_fit(keys[:5], values[:5])
    before = streamed.weight.clone()
    streamed.predict(keys)
    assert not torch.equal(before, streamed.weight), "new rows, new weights"


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression", "regression on classes", "normalized"])
def test_dual_form_is_the_primal_one(task):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(20, 50, generator=generator, dtype=torch.float64) + 1
    _, own = TASKS[task]
    labels = torch.arange(20) % 3
    values = {"multilabel": one_hot(labels)[:, :2], "regression": torch.randn(20, 2).double()}.get(task, labels)
    own = {"regularization": GCV(), **own}  # the other sample holds some of the rows only
    dual = FastWeights(**own).double().fit(keys, values)
    primal = FastWeights(**own, reservoir_size=0 if task == "regression" else 5).double()
    primal.partial_fit(keys, values)
    primal.solve()
    assert relative(dual.weight, primal.weight) < 1e-8
    assert relative(dual.bias, primal.bias) < 1e-8
    assert dual.solution.rank == primal.solution.rank == 19
    assert dual.solution.regularization.value == pytest.approx(primal.solution.regularization.value, rel=1e-8)


def test_equal_weights_and_repeated_rows_are_one():
    keys, labels = blobs(60, 5, 3)
    weights = torch.randint(1, 4, (60,))
    one = FastWeights(reservoir_size=0).double().fit(keys, labels, weights)
    other = (
        FastWeights(reservoir_size=0)
        .double()
        .fit(keys.repeat_interleave(weights, 0), labels.repeat_interleave(weights))
    )
    assert relative(one.weight, other.weight) < 1e-9
    assert one.solution.regularization.value == pytest.approx(other.solution.regularization.value, rel=1e-9)


@pytest.mark.parametrize("values", ["one column of labels", "[N, 1] floats", "bools"])
def test_shapes_of_values(values):
    keys, labels = blobs(100, 5, 2)
    one = FastWeights().fit(keys, labels)
    if values == "one column of labels":
        model = FastWeights().fit(keys, labels[:, None])
        assert torch.equal(model.weight, one.weight)
        assert model.score(keys, labels[:, None]) == one.score(keys, labels)
        return
    model = FastWeights().fit(keys, labels.bool() if values == "bools" else labels[:, None].double())
    assert model.solution.task == "multilabel"
    assert model.predict(keys).shape == (100,)


def test_leading_dimensions():
    keys, labels = blobs(120, 5, 3)
    flat, deep = FastWeights().fit(keys, labels), FastWeights().fit(keys.view(4, 30, 5), labels.view(4, 30))
    assert torch.equal(flat.weight, deep.weight)
    assert deep(keys.view(4, 30, 5)).shape == (4, 30, 3)
    assert deep.score(keys.view(4, 30, 5), labels.view(4, 30)) == flat.score(keys, labels)
    model = FastWeights().fit(*(t.view(4, 30, -1) for t in regression(120)))
    assert model.score(*(t.view(4, 30, -1) for t in regression(120))) <= 1


def test_fitting_again_forgets_everything_that_was_not_declared():
    model = FastWeights().fit(*blobs(60, 5, 3))
    assert model.fit(*blobs(60, 7, 4))(torch.randn(2, 7)).shape == (2, 4)
    with pytest.raises(ValueError, match="width 5"):
        FastWeights(5, 3).fit(*blobs(60, 7, 3))


def test_new_classes_may_come_later():
    keys, labels = blobs(90, 5, 4)
    model = FastWeights().partial_fit(keys[labels < 3], labels[labels < 3])
    assert model.predict(keys).max() == 2
    model.partial_fit(keys[labels == 3], labels[labels == 3])
    assert model.predict(keys).max() == 3
    assert model.out_features == 4
    assert relative(model.weight, FastWeights().fit(keys, labels).weight) < 1e-6


# ---------------------------------------------------------------------- priors, empty classes, decisions


@pytest.mark.parametrize("prior", ["frequency", "uniform", [0.7, 0.2, 0.1], torch.tensor([0.7, 0.2, 0.1])])
def test_priors(prior):
    keys, labels = blobs(200, 5, 3)
    labels[:100] = 0
    model = FastWeights(prior=prior).double().fit(keys, labels)
    expected = {"frequency": labels.bincount() / 200, "uniform": torch.full((3,), 1 / 3)}
    wanted = expected[prior] if isinstance(prior, str) else torch.as_tensor(prior)
    assert relative(model.log_prior.exp(), wanted) < 1e-6
    assert torch.equal(model.weight, FastWeights().double().fit(keys, labels).weight)


@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.9, 0.3, 0.1], [1.2, -0.1, -0.1], [float("nan")] * 3])
def test_bad_priors_are_refused(prior):
    with pytest.raises(ValueError, match="prior must be 3 probabilities"):
        FastWeights(prior=prior).fit(*blobs(60, 5, 3))


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
def test_an_empty_class_is_refused_or_masked(readout):
    keys, labels = blobs(100, 5, 3)
    labels = torch.where(labels > 0, labels + 1, labels)
    with pytest.raises(ValueError, match=r"1 of 4 classes without a row: 1"):
        FastWeights(readout=readout).fit(keys, labels)
    model = FastWeights(readout=readout, empty_classes="mask").fit(keys, labels)
    assert float(model.predict_proba(100 * torch.randn(50, 5)).double()[:, 1].max()) == 0
    assert model.score(keys, labels) > 0.7
    dense = FastWeights(readout=readout).fit(keys, labels.unique(return_inverse=True)[1])
    assert float(model.temperature) == pytest.approx(float(dense.temperature), rel=0.02), "a mask is no class"
    with pytest.raises(ValueError, match="needs a bias"):
        FastWeights(readout="regression", bias=False, empty_classes="mask").fit(keys, labels)


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
@pytest.mark.parametrize("prior", ["frequency", "uniform"])
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_only_zeros_or_ones(readout, prior, weighted):
    keys, values = multi_hot(100, 5, 3)
    values[:, 0], values[:, 1] = 0, 1
    weights = torch.rand(100) if weighted else None
    with pytest.raises(ValueError, match="only zeros or only ones: 0, 1"):
        FastWeights(readout=readout).fit(keys, values, weights)
    model = FastWeights(readout=readout, prior=prior, empty_classes="mask").fit(keys, values, weights)
    probabilities = model.predict_proba(keys)
    assert float(probabilities[:, 0].max()) == 0
    assert float(probabilities[:, 1].min()) == 1
    assert 0.1 < float(probabilities[:, 2].mean()) < 0.9


def test_a_one_logit_head_is_the_difference_of_two_discriminants():
    keys, values = multi_hot(150, 5, 1)
    one = FastWeights(5, 1, regularization=Ridge(1.0)).double().fit(keys, values[:, 0])
    two = FastWeights(5, 2, regularization=Ridge(1.0), correct=False).double().fit(keys, values[:, 0])
    difference = (keys @ two.weight.T + two.bias + two.log_prior).diff(dim=1)
    assert relative(keys @ one.weight.T + one.bias + one.log_prior, difference) < 1e-10
    assert torch.equal(one.predict(keys), two.predict(keys))


@pytest.mark.parametrize("readout", ["discriminant", "regression"])
@pytest.mark.parametrize("columns", [1, 4])
def test_a_logit_above_zero_means_likelier_than_not_in_a_users_own_metric(readout, columns):
    keys, values = multi_hot(500, 6, columns)
    model = FastWeights(6, columns, readout=readout).double().fit(keys[:300], values[:300])
    logits, truth = model(keys[300:]), values[300:]
    metric = BinaryAccuracy() if columns == 1 else MultilabelAccuracy(columns, average="micro")
    accuracy = float(metric(logits, truth))
    assert accuracy == pytest.approx(float(((logits > 0) == (truth > 0)).double().mean()), abs=1e-6)
    assert accuracy == pytest.approx(float(metric(logits.sigmoid(), truth)), abs=1e-6)
    assert accuracy > 0.8
    assert model.solution.leave_one_out_accuracy == pytest.approx(accuracy, abs=0.06)


def test_regression_on_multi_hot_values_decides_at_one_half():
    keys, values = multi_hot(200, 6, 3)
    model = FastWeights(readout="regression", regularization=Ridge(1.0)).double().fit(keys, values)
    weight, bias = ridge_solution(keys, values.double(), 1.0, bias=True)
    assert torch.equal(model.predict(keys) > 0, keys @ weight.T + bias > 0.5)


# ---------------------------------------------------------------------- class embeddings and zero-shot weights


@needs_golden
def test_the_papers_own_numbers():
    golden = load_file(GOLDEN)
    keys, labels, queries, rows = (golden[name] for name in ("keys", "labels", "queries", "class_embeddings"))
    options = {"regularization": PaperRule(), "class_embeddings": rows, "reservoir_size": 0}
    model = FastWeights(**options)
    for part in zip(keys.split(64), labels.split(64), strict=True):
        model.partial_fit(*part)
    model.solve()
    assert relative(model.weight, golden["W_inverse"]) < 1e-5
    assert relative(queries @ model.weight.T, golden["pred_inverse"]) < 1e-5
    blended = FastWeights(zero_shot="identity", prior_count=400, **options).fit(keys, labels)
    assert relative(blended(queries), golden["logits_inverse_n0_400"]) < 1e-5
    values = FastWeights(regularization=PaperRule()).fit(keys, rows[labels])
    assert relative(values.weight, golden["W_inverse"]) < 1e-5, "embeddings given as plain regression targets"
    assert relative(values.predict(queries), golden["pred_inverse"]) < 1e-5


@pytest.mark.parametrize("kind", ["identity", "matrix", "plain"])
@pytest.mark.parametrize("prior_count", [0.0, 300.0])
def test_zero_shot_blend(kind, prior_count):
    keys, labels = blobs(100, 6, 10)
    rows = embeddings().double()
    matrix = {"identity": torch.eye(6), "matrix": torch.randn(6, 6), "plain": torch.randn(10, 6)}[kind].double()
    options = {} if kind == "plain" else {"class_embeddings": rows}
    options |= {"zero_shot": "identity" if kind == "identity" else matrix, "prior_count": prior_count}
    model = FastWeights(regularization=Ridge(1.0), readout="regression", bias=False, **options).double()

    def answer(weight, share):
        scores = (1 - share) * keys @ matrix.T + share * keys @ weight.T
        if kind == "plain":
            return scores / model.temperature
        return 100 * torch.cosine_similarity(scores[:, None], rows[None], -1) / model.temperature

    assert relative(model(keys), answer(torch.zeros_like(matrix), 0.0)) < 1e-10, "it predicts without any example"
    assert model.predict(keys).shape == (100,)
    model.fit(keys, labels)
    targets = one_hot(labels) if kind == "plain" else rows[labels]
    weight, _ = ridge_solution(keys, targets, 1.0, bias=False)
    assert relative(model(keys), answer(weight, 100 / (100 + prior_count))) < 1e-10


def test_leave_one_out_goes_through_the_whole_layer():
    keys, labels = blobs(60, 6, 10)
    options = {"class_embeddings": embeddings().double(), "zero_shot": "identity", "prior_count": 30.0}
    model = FastWeights(regularization=Ridge(1.0), **options).double().fit(keys, labels)
    right = 0
    for i in range(60):
        rest = torch.arange(60) != i
        # The blend is that of the fit: 60 rows.
        without = (
            FastWeights(regularization=Ridge(1.0), **{**options, "prior_count": 29.5})
            .double()
            .fit(keys[rest], labels[rest])
        )
        right += int(without(keys[i]).argmax() == labels[i])
    assert model.solution.leave_one_out_accuracy == pytest.approx(right / 60)


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "task", ["classes", "regression on classes", "multilabel", "binary", "regression", "zero shot", "paper"]
)
def test_linear_is_the_layer(task):
    model, keys, _ = fitted(task)
    weight, bias = model.linear()
    plain = nn.Linear(*weight.T.shape).double()
    plain.load_state_dict({"weight": weight, "bias": bias})
    assert relative(plain(keys), model(keys)) < 1e-14
    assert not list(model.parameters())
    raw = keys @ model.weight.T + model.bias
    if task != "zero shot":
        added = keys @ model.correction_weight.T + model.correction_bias
        assert relative(model(keys), raw / model.temperature + model.log_prior + added) < 1e-12


@pytest.mark.parametrize("task", ["embeddings", "normalized"])
def test_what_is_not_linear_says_so(task):
    with pytest.raises(RuntimeError, match="not linear in the key"):
        fitted(task)[0].linear()


def test_normalize_is_invariant_to_scale():
    keys, labels = blobs(200, 6, 3, dtype=torch.float32)
    scale = torch.logspace(-3, 3, 200)[:, None]
    model = FastWeights(normalize=True).fit(keys, labels)
    scaled = FastWeights(normalize=True).fit(keys * scale, labels)
    assert relative(model(keys), scaled(keys * 7)) < 1e-4
    unit = FastWeights().fit(torch.nn.functional.normalize(keys, dim=-1), labels)
    assert relative(model.weight, unit.weight) < 1e-4
    half = FastWeights(normalize=True).fit((keys * 2000).half(), labels)
    assert relative(half(keys), model(keys)) < 1e-2, "norms beyond float16's range"


@each_task
def test_state_dict_goes_into_an_unfitted_layer(task):
    model, keys, values = fitted(task)
    options = {
        k: v
        for k, v in TASKS[task][1].items()
        if k not in ("class_embeddings", "zero_shot", "prior_count", "out_features")
    }
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = FastWeights(**options).double()
    result = loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(loaded(keys), model(keys))
    assert torch.equal(loaded.predict(keys), model.predict(keys)), "the task comes with the state"
    assert loaded.score(keys, values) == model.score(keys, values)
    assert (loaded.in_features, loaded.out_features) == (model.in_features, model.out_features)


def test_a_state_of_other_sizes_is_refused():
    state = FastWeights().fit(*blobs(60, 5, 3)).state_dict()
    for wrong in (FastWeights(3, 5), FastWeights(5, 4), FastWeights(4), FastWeights(out_features=4)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            wrong.load_state_dict(state)
    for right in (FastWeights(5, 3), FastWeights(5), FastWeights(out_features=3)):
        right.load_state_dict(state)
    with pytest.raises(ValueError, match="width 5"):
        right.partial_fit(torch.randn(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_learn_on_by_themselves(copying):
    model, keys, labels = fitted("classes")
    twin = copying(model)
    assert torch.equal(twin(keys), model(keys))
    twin.partial_fit(keys[:50] + 1, labels[:50]).predict(keys)
    assert not torch.equal(twin.weight, model.weight)
    assert model.statistics.rows == 200
    assert twin.solution.regularization.grid is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_of_inputs_and_of_the_layer(dtype):
    keys, labels = blobs(200, 6, 3, dtype=dtype)
    model = FastWeights().fit(keys, labels)
    exact = FastWeights().double().fit(keys.double(), labels)
    assert relative(model.weight, exact.weight) < 1e-6, "sums and solve are float64 whatever comes in"
    layer = copy.deepcopy(exact).to(dtype)
    assert layer(keys).dtype == layer.weight.dtype == dtype
    assert relative(layer(keys), exact(keys)) < {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    assert float((layer.predict(keys) == exact.predict(keys)).double().mean()) > 0.97


def test_autocast_changes_predictions_a_little_and_the_fit_not_at_all():
    keys, labels = blobs(200, 6, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = FastWeights().fit(keys, labels)
        assert model(keys).dtype == torch.bfloat16
        assert FastWeights(normalize=True).fit(keys, labels).score(keys, labels) > 0.6
    assert torch.equal(model.weight, FastWeights().fit(keys, labels).weight)


def test_fitting_under_inference_mode_leaves_an_ordinary_layer():
    keys, labels = blobs(200, 6, 3, dtype=torch.float32)
    with torch.inference_mode():
        model = FastWeights().fit(keys, labels)
    model.partial_fit(keys, labels).predict(keys)
    leaf = keys.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None


def test_an_unfitted_layer_runs_only_where_its_sizes_are_known():
    assert FastWeights(4, 3)(torch.randn(2, 4)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="not fitted"):
        FastWeights()(torch.randn(2, 4))
    for method in ("predict", "predict_proba"):
        with pytest.raises(RuntimeError, match="not fitted"):
            getattr(FastWeights(4, 3), method)(torch.randn(2, 4))


def test_bytes():
    model, *_ = fitted("classes")
    assert model.bytes_to_predict == 8 * (18 + 3)
    assert model.bytes_to_update == model.statistics.num_bytes + 200 * 8 * (6 + 1 + 1 + 1)
    assert "in_features=6, out_features=3, Automatic" in repr(model)


# ---------------------------------------------------------------------- what the solution says


def test_r_squared_is_scikit_learns():
    keys, values = regression()
    model = FastWeights(regularization=Ridge(5.0)).double().fit(keys, values)
    expected = r2_score(values.numpy(), model(keys).numpy(), multioutput="variance_weighted")
    assert model.solution.r_squared == pytest.approx(expected, rel=1e-10)
    constant = FastWeights(regularization=Ridge(5.0)).double().fit(keys, values * 0 + 3)
    assert constant.solution.r_squared != constant.solution.r_squared
    assert constant.score(keys, values * 0 + 3) == r2_score(values.numpy() * 0 + 3, constant.predict(keys).numpy())


@pytest.mark.parametrize("bias", [False, True])
def test_effective_rank_is_the_trace_of_the_hat_matrix(bias):
    keys, values = regression()
    solution = (
        FastWeights(regularization=Ridge(50.0), bias=bias, readout="regression").double().fit(keys, values).solution
    )
    centred = keys - bias * keys.mean(0)
    hat = centred @ torch.linalg.solve(centred.T @ centred + 50 * torch.eye(6), centred.T)
    assert solution.effective_rank == pytest.approx(float(hat.trace()), rel=1e-10)
    assert solution.rank == 6
    assert solution.rounding_floor > 0


def test_the_solution_carries_the_path():
    model, *_ = fitted("classes")
    choice = model.solution.regularization
    assert choice.value in choice.grid.tolist()
    assert choice.scores.argmin() == choice.grid.tolist().index(choice.value)
    assert not choice.at_edge
    assert model.solution.readout == "discriminant"
    assert model.solution.seconds > 0


def test_few_examples_of_a_class_are_helped_by_shrunken_means():
    """Long-tailed classes whose means differ little: the rare ones gain, as NUMERICS.md measured on images."""
    generator = torch.Generator().manual_seed(2)
    means = 0.3 * torch.randn(8, 40, generator=generator, dtype=torch.float64)
    counts = torch.tensor([300, 150, 80, 40, 20, 10, 6, 4])
    labels = torch.repeat_interleave(torch.arange(8), counts)
    keys = means[labels] + torch.randn(len(labels), 40, generator=generator, dtype=torch.float64)
    test_labels = torch.arange(4000) % 8
    test = means[test_labels] + torch.randn(4000, 40, generator=generator, dtype=torch.float64)
    plain, shrunk = (
        FastWeights(prior="uniform", shrink_means=shrink).double().fit(keys, labels).score(test, test_labels)
        for shrink in (False, True)
    )
    print(f"plain {plain:.3f}, shrunk {shrunk:.3f}")
    assert shrunk > plain + 0.01


# ---------------------------------------------------------------------- learning on, over processes


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression", "embeddings"])
def test_learned_state_learns_on(task):
    make, own = TASKS[task]
    keys, values = make()
    whole = FastWeights(**own).double().fit(keys, values)
    first = FastWeights(**own).double().fit(keys[:90], values[:90])
    second = FastWeights(**own).double()
    second.load_learned_state(first.learned_state())
    second.partial_fit(keys[90:], values[90:])
    assert relative(second.predict(keys).double(), whole.predict(keys).double()) < 1e-9
    assert float(second.temperature) == pytest.approx(float(whole.temperature), rel=1e-9)


class Group:
    """Processes as threads: every call meets at a barrier and leaves with everybody's tensor."""

    def __init__(self, size):
        self.barrier = Barrier(size, timeout=30)
        self.slots = [None] * size

    def gather(self, rank):
        def gather(tensor):
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            result = list(self.slots)
            self.barrier.wait()
            assert len({(t.shape, t.dtype) for t in result}) == 1, "all processes send equal shapes"
            return result

        return gather

    def run(self, models):
        def reduce(rank):
            gather = self.gather(rank)
            models[rank].reduce(lambda tensor: torch.stack(gather(tensor)).sum(0), gather)

        with ThreadPoolExecutor(len(models)) as pool:
            return [pool.submit(reduce, rank) for rank in range(len(models))]


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression", "embeddings", "normalized"])
@pytest.mark.parametrize("cuts", [(90, 200), (0, 200), (200, 200), (1, 150)])
@pytest.mark.parametrize("size", [0, 50, 1000])
def test_processes_learn_what_one_would(task, cuts, size):
    make, own = TASKS[task]
    keys, values = make()
    positions = torch.arange(200)
    one = FastWeights(**own, reservoir_size=size).double()
    one.update(keys, values, positions=positions)
    models = [FastWeights(**own, reservoir_size=size).double() for _ in range(3)]
    for model, i, j in zip(models, (0, *cuts), (*cuts, 200), strict=True):
        if i < j:
            model.update(keys[i:j], values[i:j], positions=positions[i:j])
    for future in Group(3).run(models):
        future.result()
    for model in models:
        model.solve()
        one.solve()
        assert model.statistics.rows == 200
        assert relative(model.statistics.gram, one.statistics.gram) < 1e-13
        assert relative(model.statistics.cross, one.statistics.cross) < 1e-13
        assert relative(model.weight, one.weight) < 1e-8
        assert len(model.reservoir) == len(one.reservoir)
        assert torch.equal(model.temperature, models[0].temperature)
        assert float(model.temperature) == pytest.approx(float(one.temperature), rel=1e-6)


def test_processes_that_saw_nothing_at_all():
    models = [FastWeights(5, 3), FastWeights(5, 3)]
    for future in Group(2).run(models):
        future.result()
    with pytest.raises(RuntimeError, match="No rows were seen"):
        models[0].solve()


def test_processes_that_saw_different_classes():
    keys, labels = blobs(100, 5, 4)
    models = [
        FastWeights().partial_fit(keys[labels < 2], labels[labels < 2]),
        FastWeights(),
        FastWeights().partial_fit(keys, labels),
    ]
    for future in Group(3).run(models):
        future.result()
    assert [model.statistics.class_counts.tolist() for model in models] == [
        models[0].statistics.class_counts.tolist()
    ] * 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((torch.randn(5, 4), torch.arange(5) % 3), "different kinds"),
        ((torch.randn(5, 5), torch.randn(5, 3)), "different kinds"),
    ],
)
def test_all_processes_hear_of_what_is_wrong_with_one(other, message):
    models = [FastWeights().partial_fit(*blobs(30, 5, 3)), FastWeights().partial_fit(*other)]
    for future in Group(2).run(models):
        with pytest.raises(ValueError, match=message):
            future.result()


def test_all_processes_hear_of_bad_rows(monkeypatch):
    monkeypatch.setattr("lightning_faast.associative.statistics._flags_are_free", lambda device: False)
    models = [FastWeights(3, 2), FastWeights(3, 2)]
    models[0].update(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    models[1].update(torch.full((4, 3), float("nan")), torch.tensor([0, 1, 0, 1]))
    futures = Group(2).run(models)
    for future, message in zip(futures, ("Another process", "Batch 0"), strict=True):
        with pytest.raises(ValueError, match=message):
            future.result()


# ---------------------------------------------------------------------- bad input


KEYS, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def spoiled(value):
    keys = KEYS.clone()
    keys[3] = value
    return keys


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, (spoiled(float("nan")), LABELS), ValueError, "Batch 0 .*keys hold NaN"),
        ({}, (spoiled(float("inf")), LABELS), ValueError, "Batch 0 .*keys hold NaN"),
        ({"normalize": True}, (spoiled(0.0), LABELS), ValueError, "Batch 0 .*normalize=True.*zeros only"),
        ({}, (KEYS, LABELS - 1), ValueError, "a label is outside"),
        ({"out_features": 2}, (KEYS, LABELS), ValueError, r"outside \[0, 2\)"),
        ({"class_embeddings": torch.randn(2, 4)}, (KEYS, LABELS), ValueError, r"outside \[0, 2\)"),
        ({}, (KEYS, LABELS * 10**12), ValueError, "would make"),
        ({}, (KEYS, LABELS[:4]), ValueError, "same rows"),
        ({}, (KEYS, LABELS.repeat(2)), ValueError, "same rows"),
        ({}, (KEYS, LABELS.view(2, 3)), ValueError, "same rows"),
        ({}, (KEYS, torch.randn(12)), ValueError, "same rows"),
        ({}, (KEYS.view(2, 3, 4), LABELS), ValueError, "same rows"),
        ({"out_features": 3}, (KEYS, torch.randn(6, 2)), ValueError, "3 columns|value"),
        ({"in_features": 3}, (KEYS, LABELS), ValueError, "width 3"),
        ({}, (KEYS.long(), LABELS), ValueError, "floating point"),
        ({}, (KEYS[0], LABELS[0]), ValueError, "floating point of shape"),
        ({}, (KEYS.numpy(), LABELS), TypeError, "torch.as_tensor"),
        ({}, (KEYS, LABELS.tolist()), TypeError, "torch.as_tensor"),
        ({}, (KEYS[:0], LABELS[:0]), RuntimeError, "No rows were seen"),
        ({}, (KEYS[:0], torch.randn(0, 3)), RuntimeError, "No rows were seen"),
        ({"out_features": 3}, (KEYS[:0], torch.randn(0, 3)), RuntimeError, "No rows were seen"),
        ({}, (KEYS, LABELS, torch.zeros(6)), RuntimeError, "weight 0"),
        ({}, (KEYS, LABELS, -torch.ones(6)), ValueError, "not negative"),
        ({}, (KEYS, LABELS, torch.ones(5)), ValueError, "weights must be"),
        ({"readout": "discriminant"}, (KEYS, torch.randn(6, 2)), ValueError, "needs class labels"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(options, arguments, error, message):
    with pytest.raises(error, match=message):
        FastWeights(**options).fit(*arguments)


def test_labels_and_values_cannot_be_mixed():
    model = FastWeights().partial_fit(KEYS, LABELS)
    with pytest.raises(ValueError, match="cannot be mixed"):
        model.partial_fit(KEYS, torch.randn(6, 3))
    assert len(model.reservoir) == model.statistics.rows == 6
    assert model.partial_fit(KEYS[:0], LABELS[:0]).predict(KEYS).shape == (6,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regularization": 1.0}, TypeError, "must be a Regularization"),
        ({"regularization": GCV}, TypeError, "must be a Regularization"),
        ({"readout": "lda"}, ValueError, "readout must be one of"),
        ({"empty_classes": "ignore"}, ValueError, "empty_classes must be one of"),
        ({"prior": "balanced"}, ValueError, "prior must be one of"),
        ({"prior_count": -1.0}, ValueError, "not be negative"),
        ({"prior_count": 5.0}, ValueError, "give zero_shot"),
        ({"zero_shot": "identity"}, ValueError, "beside class_embeddings"),
        ({"zero_shot": torch.ones(4), "prior_count": 1.0}, ValueError, "must be a matrix"),
        ({"zero_shot": torch.ones(3, 4), "in_features": 5}, ValueError, "in_features is 5"),
        ({"zero_shot": torch.ones(3, 4), "class_embeddings": torch.ones(9, 5)}, ValueError, "class_embeddings is 5"),
        ({"class_embeddings": torch.ones(3)}, ValueError, "must be \\[c, e\\]"),
        ({"class_embeddings": torch.ones(3, 4), "out_features": 5}, ValueError, "out_features is 5"),
        ({"class_embeddings": torch.ones(3, 4), "readout": "discriminant"}, ValueError, "values to regress on"),
        ({"readout": "discriminant", "bias": False}, ValueError, "needs a bias"),
        ({"readout": "discriminant", "regularization": PaperRule()}, ValueError, "needs a ridge"),
        ({"in_features": 0}, ValueError, "at least 1"), ({"out_features": -2}, ValueError, "at least 1"),
        ({"reservoir_size": -1}, ValueError, "must not be negative"),
        ({"regularization": LeaveOneOut(), "reservoir_size": 0}, ValueError, "needs a reservoir"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        FastWeights(**options)


def test_scoring_against_values_of_another_length_is_refused():
    model = FastWeights().fit(KEYS, LABELS)
    for values in (LABELS[:3], LABELS[:0]):
        with pytest.raises(ValueError, match="values for"):
            model.score(KEYS, values)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 10)),
    classes=st.integers(1, 4),
    kind=st.sampled_from(["plain", "duplicated", "constant", "zero", "tiny", "huge"]),
    readout=st.sampled_from(["auto", "regression"]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_odd_data_gives_finite_answers(shape, classes, kind, readout, bias, seed):
    """One row, one class, N < d, duplicates, constants, extreme scales."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(*shape, generator=generator)
    labels = torch.randint(classes, shape[:1], generator=generator)
    if kind == "duplicated":
        keys = keys[torch.randint(len(keys), shape[:1], generator=generator)]
    elif kind == "constant":
        keys[:, 0] = 0.1
    keys = keys * {"zero": 0.0, "tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    empty = len(labels.unique()) < classes and classes > 1
    options = {"readout": readout, "bias": bias, "empty_classes": "mask" if bias else "error"}
    models = [FastWeights(None, classes if classes > 1 else None, **options).double() for _ in range(2)]
    if empty and not bias:
        with pytest.raises(ValueError, match="without a row"):
            models[0].fit(keys, labels)
        return
    models[0].fit(keys, labels)
    models[1].partial_fit(keys, labels)
    for model in models:
        logits = model.predict_proba(keys).log()
        present = labels.bincount(minlength=logits.shape[1]) > 0
        assert not bool(logits.isnan().any())
        assert bool(model(keys).isfinite().all())
        assert bool(present[model.predict(keys)].all()), "an empty class is never predicted"


def test_statistics_can_be_taken_over():
    """A data set that has to be forgotten is subtracted."""
    keys, labels = blobs(100, 5, 3)
    model = FastWeights(reservoir_size=0).double().fit(keys, labels)
    model.statistics = model.statistics - SufficientStatistics(num_classes=None).update(keys[60:], labels[60:])
    model.solve()
    assert relative(model.weight, FastWeights(reservoir_size=0).double().fit(keys[:60], labels[:60]).weight) < 1e-9
