import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_faast.language import (
    FastWeightLM,
    dynamic_evaluation,
    evaluate,
    labelled_windows,
    learn_while_reading,
    perplexity,
)
from tests.language.models import V, gpt2, llama, text


def tokens(n: int = 200) -> Tensor:
    return text(1, n)[0]


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_same(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert torch.equal(after[name], t), name


def log_likelihoods(scores: Any) -> Tensor:
    return torch.cat([part.log_likelihood for part in scores])


def test_windows_score_every_token_once_with_its_context() -> None:
    model, ids = llama(), tokens(100)
    windows = labelled_windows(ids, window=16, stride=5)
    scores = list(evaluate(model, windows))
    labels = torch.cat([part.label for part in scores])
    assert labels.tolist() == ids[1:].tolist()
    with torch.no_grad():
        logits = model(ids[None, 5:21]).logits[0].log_softmax(-1)
    expected = logits[10:15].gather(1, ids[16:21, None])[:, 0]  # the second window scores its last five
    torch.testing.assert_close(scores[1].log_likelihood, expected)
    mean = -float(log_likelihoods(scores).double().mean())
    assert perplexity(scores) == pytest.approx(math.exp(mean))
    with pytest.raises(ValueError, match="No token"):
        perplexity([])
    with pytest.raises(ValueError, match="at least two"):
        labelled_windows(ids[None], window=16)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_without_a_step_it_is_plain_evaluation(make: Any, rule: Any) -> None:
    model, windows = make().train(), labelled_windows(tokens(), window=32, stride=16)
    before = state(model)
    statistics = windows[:2] if rule == "rms" else None
    still = list(dynamic_evaluation(model, windows, learning_rate=0.0, rule=rule, statistics=statistics))
    assert torch.equal(log_likelihoods(still), log_likelihoods(evaluate(model, windows)))
    assert_same(model, before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_steps_are_those_of_the_formulas() -> None:
    windows = labelled_windows(tokens(96), window=33, stride=32)
    model = llama()
    start = [p.detach().clone() for p in model.parameters()]

    def gradients(batch: dict[str, Tensor]) -> list[Tensor]:
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return list(torch.autograd.grad(loss, list(model.parameters())))

    squares = [sum(g**2 for g in both) / 2 for both in zip(*map(gradients, windows[:2]), strict=True)]
    rms = [s.sqrt() for s in squares]
    mean = torch.cat([r.flatten() for r in rms]).mean()
    for rule, rate in (("sgd", 0.1), ("rms", 0.003)):
        dynamic = dynamic_evaluation(
            model, windows, learning_rate=rate, rule=rule, decay=0.3, statistics=windows[:2] if rule == "rms" else None
        )
        found = [part.log_likelihood for part in dynamic]
        for number, batch in enumerate(windows):
            (expected,) = evaluate(model, [batch])
            torch.testing.assert_close(found[number], expected.log_likelihood, rtol=1e-4, atol=1e-5)
            steps = gradients(batch)
            with torch.no_grad():
                for p, g, first, r in zip(model.parameters(), steps, start, rms, strict=True):
                    if rule == "sgd":
                        p += 0.3 * (first - p) - rate * g
                    else:
                        p += (0.3 * r / mean).clamp_max(1) * (first - p) - rate * g / (r + 0.1 * mean)
        with torch.no_grad():
            for p, first in zip(model.parameters(), start, strict=True):
                p.copy_(first)


def test_it_learns_and_leaves_no_trace() -> None:
    model = llama()
    windows = labelled_windows(torch.arange(2, 12).repeat(60), window=40, stride=20)  # few tokens, always the same
    before = state(model)
    scores = dynamic_evaluation(model, windows, learning_rate=0.5)
    first = next(scores)
    torch.testing.assert_close(first.log_likelihood, next(evaluate(llama_like(model, before), windows)).log_likelihood)
    assert perplexity([first, *scores]) < perplexity(evaluate(model, windows))
    assert_same(model, before)
    unfinished = dynamic_evaluation(model, windows, learning_rate=0.5)
    next(unfinished)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    unfinished.close()
    assert_same(model, before)
    with pytest.raises(IndexError):  # a token that the model does not have, in the middle
        list(dynamic_evaluation(model, [*windows[:2], _bad(windows[2])], learning_rate=0.5))
    assert_same(model, before)
    with pytest.raises(RuntimeError, match="smaller learning_rate"):
        list(dynamic_evaluation(model, windows, learning_rate=1e30))
    assert_same(model, before)


def llama_like(model: Any, weights: dict[str, Tensor]) -> Any:
    other = llama()
    other.load_state_dict(weights)
    return other


def _bad(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "input_ids": torch.full_like(batch["input_ids"], V)}


def test_frozen_parameters_stay_frozen() -> None:
    model = llama()
    for p in model.model.layers.parameters():
        p.requires_grad_(False)
    windows = labelled_windows(tokens(), window=40)
    dynamic = dynamic_evaluation(model, windows, learning_rate=0.5)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    next(dynamic), next(dynamic)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    dynamic.close()
    with torch.inference_mode():
        assert math.isfinite(perplexity(dynamic_evaluation(model, windows, learning_rate=0.5)))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        dynamic_evaluation(model, windows, learning_rate=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": 1.0, "decay": 2.0}, "decay"),
        ({"learning_rate": 1.0, "rule": "adam"}, "rule must"),
        ({"learning_rate": 1.0, "rule": "rms"}, "needs statistics"),
        ({"learning_rate": 1.0, "statistics": []}, "needs statistics"),
        ({"learning_rate": 1.0, "epsilon": 0.0}, "epsilon"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_evaluation(llama(), [], **options)
    with FastWeightLM(llama()) as lm, pytest.raises(ValueError, match="learn_while_reading"):
        dynamic_evaluation(lm, [], learning_rate=0.1)


MODES = [
    {},
    {"key_layers": [0], "passes": 2},
    {"mode": "embedding", "mix": 0.1},
    {"mode": "chunked", "mix": 0.1},
    {"layer": "middle"},
    {"mode": "knn_lm", "k": 4, "temperature": 1.0, "interpolation": 0.3},
]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_fast_weights_predict_then_learn(options: dict[str, Any], every: int) -> None:
    windows = labelled_windows(tokens(200), window=40, stride=20)
    lm = FastWeightLM(llama(), **options)
    if "layer" in options:  # slow weights that pass on what was learned
        torch.nn.init.normal_(lm.learner.out_proj.weight)
    lm.learn(text(4, 30, seed=1)).solve()
    before, learned = state(lm), lm.learner.learned_state()
    found = [part.log_likelihood for part in learn_while_reading(lm, windows, every=every)]
    assert_same(lm, before)
    for name, t in lm.learner.learned_state().items():
        assert torch.equal(t, learned[name])
    tokens_before = lm.tokens
    for number, batch in enumerate(windows):
        if number and number % every == 0:
            for past in windows[number - every : number]:
                lm.learn(past["input_ids"], labels=past["labels"])
        (expected,) = evaluate(lm, [batch])
        torch.testing.assert_close(found[number], expected.log_likelihood, rtol=1e-4, atol=1e-4)
    assert lm.tokens > tokens_before


def test_fast_weights_leave_no_trace_of_an_error() -> None:
    lm = FastWeightLM(llama())
    windows = labelled_windows(tokens(), window=40, stride=20)
    before = state(lm)
    with pytest.raises(IndexError):
        list(learn_while_reading(lm, [*windows[:2], _bad(windows[2])]))
    assert_same(lm, before)
    assert lm.tokens == 0
    scores = list(learn_while_reading(lm, labelled_windows(tokens(800), window=40, stride=20)))
    assert perplexity(scores) < perplexity(evaluate(lm, labelled_windows(tokens(800), window=40, stride=20)))
    with pytest.raises(ValueError, match="every"):
        learn_while_reading(lm, windows, every=0)
