import doctest
import importlib
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from sklearn.neighbors import NearestCentroid

from lightning_faast.associative import FastWeights, Learner
from lightning_faast.data.fewshot import EpisodeSampler
from lightning_faast.evaluation.fewshot import Interval, compare_episodes, evaluate_episodes, run


def problem(noise, classes=8, rows=20, width=16, seed=0):
    """Keys around one direction a class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(rows)
    centers = torch.eye(classes, width)
    return centers[labels] + noise * torch.randn(len(labels), width, generator=generator), labels


class Centroids(Learner):
    """Scikit-learn's nearest centroid, which notes what it was given."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.seen = []

    def fit(self, keys, values):
        self.seen.append(keys.clone())
        self.model = NearestCentroid().fit(keys.double().numpy(), values.numpy())
        return self

    def forward(self, keys):
        predicted = torch.from_numpy(self.model.predict(keys.double().numpy()))
        return torch.nn.functional.one_hot(predicted, self.out_features).float()

    reset = update = reduce = solve = learned_state = load_learned_state = figures = summary = None
    rows = bytes_to_predict = bytes_to_update = num_solved = None


class TestInterval:
    def test_is_the_fields_formula(self):
        values = torch.rand(600, dtype=torch.float64)
        interval = Interval.of(values)
        assert interval.mean == pytest.approx(np.mean(values.numpy()))
        assert interval.half_width == pytest.approx(1.96 * stats.sem(values.numpy()))
        assert str(Interval(0.47781, 0.0075)) == "47.78 ± 0.75"

    def test_covers_the_true_mean(self):
        draws = torch.from_numpy(np.random.default_rng(0).binomial(75, 0.6, (400, 100)) / 75)
        inside = [abs(interval.mean - 0.6) <= interval.half_width for interval in map(Interval.of, draws)]
        assert 0.91 < np.mean(inside) < 0.99

    @pytest.mark.parametrize("values", [torch.rand(1), torch.rand(0), torch.rand(3, 2)])
    def test_needs_two_values(self, values):
        with pytest.raises(ValueError, match="two episodes"):
            Interval.of(values)


class TestEvaluate:
    def test_separable_classes_are_all_told_apart(self):
        keys, labels = problem(noise=0.001)
        result = evaluate_episodes(FastWeights, keys, EpisodeSampler(labels, 5, 1, 5, episodes=20))
        assert result.accuracies.tolist() == [1.0] * 20
        assert result.accuracy == Interval(1.0, 0.0)

    def test_keys_without_information_give_chance(self):
        keys, labels = torch.randn(400, 8), torch.arange(8).repeat(50)
        result = evaluate_episodes(FastWeights, keys, EpisodeSampler(labels, 4, 5, 15, episodes=100))
        assert abs(result.accuracy.mean - 0.25) < 3 * result.accuracy.half_width

    def test_agrees_with_scikit_learn(self):
        keys, labels = problem(noise=0.4)
        sampler = EpisodeSampler(labels, 5, 3, 5, episodes=10, seed=3)
        result = evaluate_episodes(Centroids, keys, sampler)
        for episode, accuracy in zip(sampler, result.accuracies, strict=True):
            model = NearestCentroid().fit(keys[episode.support].double().numpy(), episode.support_labels.numpy())
            assert accuracy == model.score(keys[episode.query].double().numpy(), episode.query_labels.numpy())
        assert 0.3 < result.accuracy.mean < 1

    def test_an_episode_leaves_no_trace_in_the_next(self):
        keys, labels = problem(noise=0.5)
        sampler = EpisodeSampler(labels, 4, 2, 8, episodes=12)
        accuracies = evaluate_episodes(FastWeights, keys, sampler).accuracies
        alone = [
            FastWeights(16, 4)
            .fit(keys[episode.support], episode.support_labels)
            .score(keys[episode.query], episode.query_labels)
            for episode in sampler
        ]
        assert accuracies.tolist() == alone
        assert len(set(alone)) > 3

    def test_threads_are_given_back(self):
        keys, labels = problem(noise=0.1)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            evaluate_episodes(FastWeights, keys, EpisodeSampler(labels, 3, 1, 1, episodes=2))
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)

    def test_keys_mapped_from_disk(self, tmp_path):
        keys, labels = problem(noise=0.4)
        np.save(tmp_path / "keys.npy", keys.numpy())
        mapped = torch.from_numpy(np.load(tmp_path / "keys.npy", mmap_mode="r+"))
        sampler = EpisodeSampler(labels, 5, 1, 5, episodes=5)
        expected = evaluate_episodes(FastWeights, keys, sampler).accuracies
        assert torch.equal(evaluate_episodes(FastWeights, mapped, sampler).accuracies, expected)

    def test_errors(self):
        keys, labels = problem(noise=0.1)
        sampler = EpisodeSampler(labels, 3, 1, 1, episodes=2)
        for wrong in (keys[:-1], keys[0]):
            with pytest.raises(ValueError, match=r"\[N, d\] with the N=160 rows"):
                evaluate_episodes(FastWeights, wrong, sampler)
        with pytest.raises(TypeError, match="made a Linear, which cannot be fitted"):
            evaluate_episodes(torch.nn.Linear, keys, sampler)


class TestCompare:
    def test_all_methods_see_the_very_same_rows(self):
        keys, labels = problem(noise=0.4)
        heads = {name: Centroids(16, 5) for name in ("a", "b")}
        sampler = EpisodeSampler(labels, 5, 2, 4, episodes=6)
        results = compare_episodes({name: lambda d, c, head=head: head for name, head in heads.items()}, keys, sampler)
        assert all(torch.equal(*pair) for pair in zip(heads["a"].seen, heads["b"].seen, strict=True))
        assert results["a"].minus(results["b"]) == Interval(0.0, 0.0)

    def test_paired_difference(self):
        keys, labels = problem(noise=0.5)
        sampler = EpisodeSampler(labels, 5, 2, 8, episodes=60)
        results = compare_episodes({"ours": FastWeights, "centroids": Centroids}, keys, sampler)
        ours, theirs = (results[name].accuracies.numpy() for name in ("ours", "centroids"))
        difference = results["ours"].minus(results["centroids"])
        assert difference.mean == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
        assert difference.half_width == pytest.approx(1.96 * stats.sem(ours - theirs))
        unpaired = math.hypot(results["ours"].accuracy.half_width, results["centroids"].accuracy.half_width)
        assert 0 < difference.half_width < unpaired

    def test_other_episodes_are_refused(self):
        keys, labels = problem(noise=0.5)
        first, second = (
            evaluate_episodes(FastWeights, keys, EpisodeSampler(labels, 3, 1, 2, episodes=4, seed=seed))
            for seed in (0, 1)
        )
        with pytest.raises(ValueError, match="the same sampler"):
            first.minus(second)


class TestReport:
    @pytest.fixture
    def report(self):
        keys, labels = problem(noise=0.4)
        methods = {
            "faast": FastWeights,
            "paper": partial(FastWeights, readout="regression"),
            "impossible": torch.nn.Linear,
        }
        told = []
        report = run(
            methods, keys, labels, shots=[1, 3], queries=4, episodes=10, advance=lambda *done: told.append(done)
        )
        assert told == [(name, shots) for shots in (1, 3) for name in methods]
        return report

    def test_rows(self, report):
        keys, labels = problem(noise=0.4)
        assert [(row.method, row.shots) for row in report.rows] == [
            (name, shots) for shots in (1, 3) for name in ("faast", "paper", "impossible")
        ]
        faast, paper, impossible = report.rows[3:]
        sampler = EpisodeSampler(labels, 5, 3, 4, episodes=10)
        expected = evaluate_episodes(FastWeights, keys, sampler)
        assert (faast.accuracy, faast.half_width) == (expected.accuracy.mean, expected.accuracy.half_width)
        assert torch.equal(report.accuracies["faast/3"], expected.accuracies)
        assert faast.difference is None
        assert paper.difference == pytest.approx(paper.accuracy - faast.accuracy)
        assert impossible.accuracy is None
        assert "made a Linear" in impossible.reason

    def test_files(self, report, tmp_path):
        report.save(tmp_path / "new" / "folder")
        folder = tmp_path / "new" / "folder"
        content = json.loads((folder / "fewshot.json").read_text())
        assert content["ways"] == 5
        assert content["reference"] == "faast"
        assert content["rows"][0]["accuracy"] == report.rows[0].accuracy
        assert set(load_file(folder / "fewshot.safetensors")) == {"faast/1", "paper/1", "faast/3", "paper/3"}
        lines = (folder / "fewshot.md").read_text().splitlines()
        assert lines[0].startswith("5-way, 4 queries a class, 10 episodes (seed 0)")
        assert len({line.count("|") for line in lines[2:]}) == 1
        assert lines[4].startswith(f"| faast | 1 | {100 * report.rows[0].accuracy:.2f} ± ")

    def test_all_classes(self):
        keys, labels = problem(noise=0.001)
        report = run({"faast": FastWeights}, keys, labels, ways=None, shots=[1], queries=2, episodes=3)
        assert report.ways == 8
        assert report.rows[0].accuracy == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": {}}, "at least one method"),
            ({"shots": []}, "one number of shots"),
            ({"reference": "knn"}, "must be one of the methods: faast"),
            ({"shots": [1, 16]}, "need 31 rows of every class"),
        ],
    )
    def test_errors(self, options, message):
        keys, labels = problem(noise=0.1)
        with pytest.raises(ValueError, match=message):
            run(**{"methods": {"faast": FastWeights}, "keys": keys, "labels": labels, **options})


@pytest.mark.parametrize("name", ["lightning_faast.data.fewshot", "lightning_faast.evaluation.fewshot"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_example_of_the_documentation(capsys):
    text = (Path(__file__).parents[2] / "docs" / "fewshot.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    accuracy, difference = capsys.readouterr().out.splitlines()
    assert float(accuracy.split(" ± ")[0]) > 40
    assert " ± " in difference
