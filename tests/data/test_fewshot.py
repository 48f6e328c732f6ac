import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_faast.data.fewshot import EpisodeSampler


def same(first, second):
    return all(torch.equal(value, getattr(second, name)) for name, value in vars(first).items())


@given(
    counts=st.lists(st.integers(5, 9), min_size=3, max_size=7),
    ways=st.none() | st.integers(2, 3),
    shots=st.integers(1, 3),
    queries=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_episodes_are_tasks(counts, ways, shots, queries, seed):
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 3, counts)))
    sampler = EpisodeSampler(labels, ways, shots, queries, episodes=4, seed=seed)
    assert len(list(sampler)) == len(sampler) == 4
    for episode in sampler:
        rows = torch.cat([episode.support, episode.query])
        assert len(rows.unique()) == len(rows), "support and query are disjoint, each without repetition"
        assert len(episode.classes.unique()) == len(episode.classes) == (ways or len(counts))
        assert torch.equal(labels[episode.support], episode.classes[episode.support_labels])
        assert torch.equal(labels[episode.query], episode.classes[episode.query_labels])
        assert (episode.support_labels.bincount() == shots).all()
        assert (episode.query_labels.bincount() == queries).all()


class TestDeterminism:
    labels = torch.arange(6).repeat(20)

    def make(self, **options):
        return EpisodeSampler(self.labels, **{"ways": 4, "shots": 2, "queries": 3, "episodes": 8, **options})

    def test_an_episode_depends_on_its_number_alone(self):
        forward = list(self.make())
        sampler = self.make(episodes=20)
        for number in reversed(range(8)):
            assert same(sampler[number], forward[number])
        assert same(self.make()[-1], forward[7])
        assert all(same(*pair) for pair in zip(self.make()[2::3], forward[2::3], strict=True))

    def test_seed_and_number_change_it(self):
        assert not same(self.make()[0], self.make(seed=1)[0])
        assert not same(self.make()[0], self.make()[1])
        assert not same(self.make(seed=1)[0], self.make(seed=0)[1])

    def test_arrays_and_dtypes_are_alike(self):
        for labels in (self.labels.numpy(), self.labels.int(), self.labels.numpy().astype(np.uint8)):
            assert same(EpisodeSampler(labels, 4, 2, 3, episodes=8)[3], self.make()[3])

    def test_class_order_is_random(self):
        first = torch.stack([episode.classes for episode in self.make(ways=None, episodes=300)])[:, 0]
        assert (first.bincount(minlength=6) - 50).abs().max() < 5 * np.sqrt(300 / 6 * 5 / 6)

    def test_rows_are_drawn_alike(self):
        drawn = torch.cat([episode.support for episode in self.make(episodes=600)]).bincount(minlength=120)
        share = 4 * 2 / 120
        assert (drawn - 600 * share).abs().max() < 5 * np.sqrt(600 * share * (1 - share))

    def test_other_processes_make_the_same(self):
        code = (
            "import torch; from lightning_faast.data.fewshot import EpisodeSampler;"
            "s = EpisodeSampler(torch.arange(6).repeat(20), 4, 2, 3, episodes=8);"
            "print(s[5].classes.tolist(), s[5].support.tolist(), s[5].query.tolist(), s.fingerprint())"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": "7"},
        )
        episode = self.make()[5]
        expected = (episode.classes.tolist(), episode.support.tolist(), episode.query.tolist())
        assert result.stdout.strip() == " ".join(map(str, (*expected, self.make().fingerprint())))

    def test_fingerprint(self):
        options = [{}, {"ways": 3}, {"shots": 1}, {"queries": 4}, {"episodes": 9}, {"seed": 1}]
        prints = {self.make(**option).fingerprint() for option in options}
        prints.add(EpisodeSampler(self.labels.flip(0), 4, 2, 3, episodes=8).fingerprint())
        assert len(prints) == 7
        assert self.make().fingerprint() == self.make().fingerprint()
        assert self.make(ways=None).fingerprint() == self.make(ways=6).fingerprint()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ways": 1}, "ways=1 must be at least 2"),
            ({"shots": 0}, "shots=0 must be at least 1"),
            ({"queries": 0}, "queries=0 must be at least 1"),
            ({"episodes": 1}, "episodes=1 must be at least 2"),
            ({"seed": -1}, "seed=-1 must be at least 0"),
            ({"ways": 4}, r"ways=4, and the rows have 3 classes"),
            ({"shots": 4}, r"need 6 rows of every class, and 3 of 3 classes have fewer: class 0 has 5"),
            ({"labels": torch.zeros(9, dtype=torch.int64), "ways": None}, "ways=None, and the rows have 1 classes"),
            ({"labels": torch.arange(0), "ways": None}, "the rows have 0 classes"),
            ({"labels": torch.tensor([0, 1, -1])}, "labels hold -1"),
        ],
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            EpisodeSampler(**{"labels": torch.arange(3).repeat(5), "ways": 2, "shots": 1, "queries": 2, **options})

    def test_the_smallest_class_is_named(self):
        with pytest.raises(ValueError, match="1 of 2 classes have fewer: class 7 has 2"):
            EpisodeSampler([3, 3, 3, 3, 7, 7], 2, 1, 2)

    @pytest.mark.parametrize("labels", [torch.rand(6), torch.zeros(6, 1, dtype=torch.int64), ["a", "b"]])
    def test_types(self, labels):
        with pytest.raises(TypeError, match=r"must be integers \[N\]"):
            EpisodeSampler(labels, 2, 1, 1)

    def test_number_outside(self):
        sampler = EpisodeSampler(torch.arange(3).repeat(5), 2, 1, 1, episodes=4)
        with pytest.raises(IndexError):
            sampler[4]
