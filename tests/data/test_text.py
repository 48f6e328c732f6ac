"""Text data: sources, columns, pairs, few shots, rows in order; what is refused."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")

from lightning_faast.data import TextDataModule  # noqa: E402
from lightning_faast.data.labels import choose_per_class  # noqa: E402
from tests.text_models import make_reviews, write_reviews  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def reviews(tmp_path):
    return write_reviews(tmp_path / "reviews")


def make(path, **options):
    module = TextDataModule(str(path), **options)
    module.prepare_data()
    module.setup()
    return module


def read(loader):
    batches = list(loader)
    assert all(isinstance(batch, tuple) for batch in batches)
    return [text for texts, _ in batches for text in texts], torch.cat([labels for _, labels in batches])


def write(path, rows, columns=("text", "label")):
    """A file of any kind; rows are tuples."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    else:
        content = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        datasets.Dataset.from_dict(content).to_parquet(path)
    return path


ROWS = [("a, b", "x"), ("null", "y"), ('say "no"', "x"), ("NA", "y")]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_every_kind_of_file(tmp_path, suffix, in_folder):
    file = write(tmp_path / f"train.{suffix}", ROWS)
    module = make(tmp_path if in_folder else file, test_split=None)
    texts, labels = read(module.train_dataloader())
    assert texts == [text for text, _ in ROWS]
    assert labels.tolist() == [0, 1, 0, 1]
    assert labels.dtype == torch.int64
    assert module.class_names == ["x", "y"]


def test_folder_of_splits(reviews):
    module = make(reviews, batch_size=7)
    texts, labels = read(module.train_dataloader())
    assert texts == make_reviews(24)[0]
    assert labels.tolist() == [0, 1] * 12
    assert module.class_names == ["negative", "positive"]
    assert len(module.test_dataloader().dataset) == 12
    assert module.has_test
    assert module.val_dataloader() == []
    assert read(module.ordered_loader("test"))[0] == make_reviews(12, 1)[0]
    assert module.labels("test").tolist() == [0, 1] * 6
    sliced = make(reviews, train_split="train[:50%]", val_split="train[50%:]")
    assert [len(sliced.labels(stage)) for stage in ("train", "val")] == [12, 12]


def test_declared_classes_keep_their_names_and_order(tmp_path):
    rows = datasets.Dataset.from_dict({"utterance": ["a", "b"], "intent": [1, 0], "number": [1, 2]})
    rows = rows.cast_column("intent", datasets.ClassLabel(names=["z", "y", "unused"]))
    rows.to_parquet(tmp_path / "train.parquet")
    module = make(tmp_path, test_split=None)
    assert module.class_names == ["z", "y"]
    assert module.labels("train").tolist() == [1, 0]


class TestColumns:
    def test_pairs(self, tmp_path):
        write(tmp_path / "train.csv", [("p", "h", 0), ("q", "i", 1)], ("premise", "hypothesis", "label"))
        module = make(tmp_path, test_split=None)
        assert read(module.train_dataloader())[0] == [("p", "h"), ("q", "i")]
        one = make(tmp_path, test_split=None, text_column="hypothesis")
        assert read(one.train_dataloader())[0] == ["h", "i"]
        turned = make(tmp_path, test_split=None, text_column="hypothesis", pair_column="premise")
        assert read(turned.train_dataloader())[0] == [("h", "p"), ("i", "q")]
        assert len({m.fingerprint("train") for m in (module, one, turned)}) == 3

    def test_only_column_of_strings(self, tmp_path):
        write(tmp_path / "train.csv", [(1, "a", "x"), (2, "b", "y")], ("id", "said", "label"))
        assert read(make(tmp_path, test_split=None).train_dataloader())[0] == ["a", "b"]

    def test_ambiguous(self, tmp_path):
        write(tmp_path / "train.csv", [("a", "b", 0), ("c", "d", 1)], ("title", "said", "label"))
        with pytest.raises(ValueError, match=r"title and said could all be meant: set text_column.*label \(int64\)"):
            make(tmp_path, test_split=None)
        assert make(tmp_path, test_split=None, text_column="said").num_classes == 2

    def test_wrong(self, reviews):
        with pytest.raises(ValueError, match=r"text_column='x' is no column.*text \((large_)?string\)"):
            make(reviews, text_column="x")
        with pytest.raises(ValueError, match="pair_column='text' is the second of two texts"):
            make(reviews, pair_column="text")
        with pytest.raises(ValueError, match="label_column='x' is no column"):
            make(reviews, label_column="x")

    def test_column_that_is_no_text(self, tmp_path):
        write(tmp_path / "train.csv", [("a", 1, 0), ("b", 2, 1)], ("text", "size", "label"))
        with pytest.raises(ValueError, match=r"Column 'size' holds int64, expected text"):
            make(tmp_path, test_split=None, text_column="size")


class TestRefusals:
    def test_missing(self, tmp_path):
        write(tmp_path / "train.jsonl", [("a", "x"), (None, "y")])
        with pytest.raises(ValueError, match="1 of 2 rows have no text in column 'text'"):
            make(tmp_path, test_split=None)
        write(tmp_path / "train.jsonl", [("a", "x"), ("b", None)])
        with pytest.raises(ValueError, match="1 of 2 rows have no label"):
            make(tmp_path, test_split=None)
        (tmp_path / "train.jsonl").unlink()
        write(tmp_path / "train.csv", [("a", "x"), ("b", "")])
        with pytest.raises(ValueError, match="1 of 2 rows have no label"):
            make(tmp_path, test_split=None)

    def test_paths(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match=r"holds no files that end in \.parquet, .* or \.json"):
            make(tmp_path)
        with pytest.raises(FileNotFoundError, match="is not there"):
            make("./no/such/folder")
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match=r"expected one that ends in \.parquet or \.csv"):
            make(tmp_path / "a.txt")
        file = write(tmp_path / "a.csv", ROWS)
        with pytest.raises(ValueError, match="name='plus' means nothing"):
            make(file, name="plus")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match=r"--data\.path=DIR"):
            make("no-such-user/no-such-texts")

    def test_splits(self, reviews):
        with pytest.raises(ValueError, match=r"no split 'dev'. Its splits: (train, test|test, train)"):
            make(reviews, val_split="dev")
        with pytest.raises(ValueError, match=r"val_split=None: name the split to validate on"):
            make(reviews).labels("val")
        with pytest.raises(RuntimeError, match=r"prepare_data\(\) and setup\(\)"):
            TextDataModule(str(reviews)).labels("train")

    def test_unlabelled_split(self, tmp_path):
        names = datasets.ClassLabel(names=["a", "b"])
        for split, labels in (("train", [0, 1]), ("test", [-1, -1])):
            rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": labels}).cast_column("label", names)
            rows.to_parquet(tmp_path / f"{split}.parquet")
        with pytest.raises(ValueError, match="-1 means unlabeled"):
            make(tmp_path)


def test_few_shots_are_those_of_the_labels_alone(reviews):
    module = make(reviews, limit_per_class=3, seed=2)
    chosen, _ = choose_per_class(np.array([0, 1] * 12), 2, 3, 2)
    texts, labels = read(module.train_dataloader())
    assert texts == [make_reviews(24)[0][row] for row in chosen]
    assert labels.bincount().tolist() == [3, 3]
    assert len(module.labels("train")) == 24
    assert len(read(module.ordered_loader("train"))[0]) == 24
    with pytest.warns(UserWarning, match=r"fewer rows.*negative \(12\), positive \(12\)"):
        make(reviews, limit_per_class=13)


def test_holdout(reviews):
    module = make(reviews, test_split=None, holdout=0.25)
    assert [len(module.labels(stage)) for stage in ("train", "test")] == [18, 6]
    train, test = (read(module.ordered_loader(stage))[0] for stage in ("train", "test"))
    assert sorted(train + test) == sorted(make_reviews(24)[0])


def test_shuffle(reviews):
    module = make(reviews, shuffle=True)
    loader = module.train_dataloader()
    (first, labels), (second, _) = read(loader), read(loader)
    assert first != second
    assert sorted(first) == sorted(make_reviews(24)[0])
    known = dict(zip(*make_reviews(24), strict=True))
    assert [known[text] for text in first] == [module.class_names[label] for label in labels]
    assert read(make(reviews, shuffle=True).train_dataloader())[0] == first
    assert read(module.ordered_loader("train"))[0] == make_reviews(24)[0]


def test_fingerprint_changes_with_the_files(reviews):
    first = make(reviews).fingerprint("train")
    assert make(reviews, batch_size=3, limit_per_class=2).fingerprint("train") == first
    assert make(reviews).fingerprint("test") != first
    write(reviews / "train.csv", [*zip(*make_reviews(24, 5), strict=True)], ("text", "sentiment"))
    assert make(reviews).fingerprint("train") != first


def test_bad_options():
    for options, message in (
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"holdout": 0.5}, "names others"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            TextDataModule("a/b", **options)


@pytest.mark.parametrize(
    ("name", "rows", "classes", "column"),
    [("sst2", (6920, 1821), 2, "sentence"), ("clinc150", (15100, 5500), 151, "text")],
)
def test_real_data(shared, name, rows, classes, column):
    path = shared / "data" / name
    if not path.is_dir():
        pytest.skip(f"no {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module = make(path, val_split="validation")
    assert (len(module.labels("train")), len(module.labels("test"))) == rows
    assert module.num_classes == classes
    assert module._rows["train"].columns == (column,)
