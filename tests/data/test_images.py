import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from timm.data import create_transform

from lightning_faast.data import DigitsDataModule, ImageDataModule
from lightning_faast.data.labels import choose_per_class
from lightning_faast.data.sources import ArrayRows

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
CONFIG = {
    "input_size": (3, 24, 24),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
MODES = ("RGB", "L", "RGBA", "P", "LA", "1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_image(index, size=(16, 16), mode="RGB"):
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folders(tmp_path):
    """Root of split/class/image folders: PNG and JPEG, several modes, odd sizes."""
    root = tmp_path / "folders"
    index = 0
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                mode = MODES[index % len(MODES)]
                suffix = "jpg" if mode in ("RGB", "L") else "png"
                image = make_image(index, (20 + index % 7, 33 - index % 5), mode)
                image.save(root / split / name / f"{index}.{suffix}")
                index += 1
    return root


def write_layout(root, rows=20, size=(16, 16), image="img", label="label", names=("a", "b"), **columns):
    """A local folder in the hub's parquet layout; labels alternate."""
    label_type = datasets.ClassLabel(names=list(names)) if names else None
    for split, count, start in (("train", rows, 0), ("test", rows // 2, 1000)):
        content = {
            image: [make_image(start + i, size) for i in range(count)],
            label: [i % 2 for i in range(count)],
            **{key: values[:count] for key, values in columns.items()},
        }
        split_rows = datasets.Dataset.from_dict(content).cast_column(image, datasets.Image())
        if label_type:
            split_rows = split_rows.cast_column(label, label_type)
        (root / "data").mkdir(parents=True, exist_ok=True)
        split_rows.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def layout(tmp_path):
    return write_layout(tmp_path / "layout")


def make(path, **options):
    options.setdefault("data_config", CONFIG)
    module = ImageDataModule(str(path), **options)
    module.prepare_data()
    module.setup()
    return module


def read(module, loader):
    batches = [module.on_after_batch_transfer(batch, 0) for batch in loader]
    assert all(isinstance(batch, tuple) for batch in batches)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


class TestImageFolders:
    def test_all_modes_and_sizes_are_timms(self, folders):
        module = make(folders, val_split="val")
        assert module.class_names == ["cat", "dog"]
        assert module.num_classes == 2
        images, labels = read(module, module.train_dataloader())
        files = sorted((folders / "train" / "cat").iterdir()) + sorted((folders / "train" / "dog").iterdir())
        expected = torch.stack([create_transform(**CONFIG)(Image.open(file).convert("RGB")) for file in files])
        assert torch.equal(images, expected)
        assert labels.tolist() == [0] * 6 + [1] * 6
        assert labels.dtype == torch.int64
        assert len(read(module, module.val_dataloader())[0]) == 4
        assert len(read(module, module.test_dataloader())[0]) == 6

    def test_split_not_found(self, folders):
        with pytest.raises(ValueError, match=r"no split 'dev'.*test, train, val"):
            make(folders, test_split="dev")

    def test_class_unknown_to_the_training_split(self, folders):
        (folders / "test" / "emu").mkdir()
        make_image(0).save(folders / "test" / "emu" / "0.png")
        with pytest.raises(ValueError, match=r"do not occur in 'train': emu"):
            make(folders)

    def test_class_without_test_images(self, folders):
        for file in (folders / "test" / "cat").iterdir():
            file.unlink()
        (folders / "test" / "cat").rmdir()
        _, labels = read(module := make(folders), module.test_dataloader())
        assert labels.tolist() == [1, 1, 1]

    def test_no_class_folders(self, tmp_path):
        (tmp_path / "flat" / "train" / "cat").mkdir(parents=True)
        (tmp_path / "flat" / "test").mkdir()
        for split in ("train", "test"):
            with pytest.raises(ValueError, match="one folder of images a class"):
                make(tmp_path / "flat", train_split=split, test_split=None)

    def test_options_of_other_sources(self, folders):
        for option in ("name", "image_column", "label_column", "root"):
            with pytest.raises(ValueError, match=f"{option}='x' means nothing"):
                make(folders, **{option: "x"})

    def test_deep_images_are_refused(self, folders):
        Image.new("I;16", (20, 20)).save(folders / "train" / "cat" / "0000.png")
        module = make(folders)
        with pytest.raises(ValueError, match="more than 8 bits"):
            next(iter(module.train_dataloader()))


class TestParquet:
    def test_folder(self, layout):
        module = make(layout)
        images, labels = read(module, module.train_dataloader())
        expected = torch.stack([create_transform(**CONFIG)(make_image(i)) for i in range(20)])
        torch.testing.assert_close(images, expected)
        assert labels.tolist() == [0, 1] * 10
        assert module.class_names == ["a", "b"]
        assert len(module.test_dataloader().dataset) == 10

    def test_file_with_slices(self, layout):
        file = layout / "data" / "train-00000-of-00001.parquet"
        module = make(file, train_split="train[:80%]", val_split="train[80%:]", test_split=None)
        assert len(module.train_dataloader().dataset) == 16
        assert len(module.val_dataloader().dataset) == 4
        with pytest.raises(ValueError, match="test_split=None"):
            module.test_dataloader()

    def test_split_not_found(self, layout):
        with pytest.raises(ValueError, match=r"no split 'validation'. Its splits: (train, test|test, train)"):
            make(layout, val_split="validation")

    def test_malformed_slice_is_datasets_own_error(self, layout):
        with pytest.raises(ValueError, match="nrecognized"):
            make(layout, train_split="train[:80%")

    def test_file_without_the_hubs_metadata(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffers = []
        for i in range(4):
            make_image(i).save(tmp_path / "image.png")
            buffers.append((tmp_path / "image.png").read_bytes())
        table = pa.table({"image": [{"bytes": b, "path": None} for b in buffers], "label": ["x", "y", "x", "y"]})
        pq.write_table(table, tmp_path / "plain.parquet")
        module = make(tmp_path / "plain.parquet", test_split=None)
        images, labels = read(module, module.train_dataloader())
        torch.testing.assert_close(images[3], create_transform(**CONFIG)(make_image(3)))
        assert labels.tolist() == [0, 1, 0, 1]
        assert module.class_names == ["x", "y"]

    def test_plain_integers(self, tmp_path):
        module = make(write_layout(tmp_path / "ints", names=None))
        assert module.class_names == ["0", "1"]

    def test_fine_labels_of_cifar100(self, tmp_path):
        fine = [f"{i % 4}" for i in range(20)]
        root = write_layout(tmp_path / "c", label="coarse_label", names=("p", "q"), fine_label=fine)
        assert make(root).num_classes == 4
        assert make(root, label_column="coarse_label").class_names == ["p", "q"]

    def test_columns_by_type(self, tmp_path):
        assert make(write_layout(tmp_path / "c", image="scan", label="finding")).num_classes == 2

    def test_ambiguous_columns(self, tmp_path):
        root = write_layout(tmp_path / "c", labels=list(range(20)))
        with pytest.raises(ValueError, match=r"label and labels could all be meant: set label_column.*img \(Image\)"):
            make(root)
        assert make(root, label_column="label").num_classes == 2

    def test_column_not_found(self, layout):
        with pytest.raises(ValueError, match=r"label_column='y' is no column.*img \(Image\), label \(ClassLabel\)"):
            make(layout, label_column="y")
        with pytest.raises(ValueError, match="image_column='x' is no column"):
            make(layout, image_column="x")

    def test_column_of_another_type(self, tmp_path):
        root = write_layout(tmp_path / "c", weight=[0.5] * 20)
        with pytest.raises(ValueError, match="holds double, expected integers or strings"):
            make(root, label_column="weight")
        with pytest.raises(ValueError, match="cannot be read as images"):
            make(root, image_column="weight")

    def test_missing_label(self, tmp_path):
        root = write_layout(tmp_path / "c", names=None, kind=["x", None] * 10)
        with pytest.raises(ValueError, match="10 of 20 rows have no label"):
            make(root, label_column="kind")

    def test_rows_are_not_copied(self, layout):
        module = make(layout)
        assert module._rows["train"].images.cache_files  # memory-mapped
        assert len(pickle.dumps(module.train_dataloader().dataset)) < 20_000


class TestOtherPaths:
    def test_unreachable_hub(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match=r"--data\.path=DIR"):
            make("no-such-user/no-such-images")

    def test_no_such_folder(self):
        with pytest.raises(FileNotFoundError, match="is not there"):
            make("./no/such/folder")

    def test_file_of_an_unknown_kind(self, tmp_path):
        (tmp_path / "images.zip").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"ends in \.parquet"):
            make(tmp_path / "images.zip")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"neither \.parquet files nor folders"):
            make(tmp_path)

    def test_torchvision(self, tmp_path, monkeypatch):
        import hashlib

        from torchvision.datasets import CIFAR10

        folder = tmp_path / CIFAR10.base_folder
        folder.mkdir()
        rng = np.random.default_rng(0)

        def write(name, content):
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            return name, hashlib.md5(data).hexdigest()

        def rows(count):
            return {
                "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                "labels": [i % 3 for i in range(count)],
            }

        monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", rows(9))])
        monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", rows(6))])
        meta = write("batches.meta", {"label_names": ["a", "b", "c"]})
        monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})

        module = make("torchvision:CIFAR10", root=str(tmp_path))
        images, labels = read(module, module.train_dataloader())
        assert images.shape == (9, 3, 24, 24)
        assert labels.tolist() == [0, 1, 2] * 3
        assert module.class_names == ["a", "b", "c"]
        with pytest.raises(ValueError, match="no split 'val'"):
            make("torchvision:CIFAR10", root=str(tmp_path), val_split="val")
        module = ImageDataModule("torchvision:CIFAR10", root=str(tmp_path / "empty"), data_config=CONFIG)
        with pytest.raises(FileNotFoundError, match=r"prepare_data\(\)"):
            module.setup()

    def test_torchvision_needs_root_and_a_train_argument(self, tmp_path):
        with pytest.raises(ValueError, match=r"--data\.root=DIR"):
            make("torchvision:CIFAR10")
        for name in ("SVHN", "Nothing"):
            with pytest.raises(ValueError, match="CIFAR10, CIFAR100"):
                make(f"torchvision:{name}", root=str(tmp_path))


class TestDeviceTransform:
    def test_small_images_of_one_size_are_resized_on_the_device(self, layout):
        module = make(layout)
        images, _ = next(iter(module.train_dataloader()))
        assert images.dtype == torch.uint8
        assert images.shape == (20, 3, 16, 16)
        by_device, _ = read(module, module.train_dataloader())
        by_workers, _ = read(other := make(layout, device_transform=False), other.train_dataloader())
        assert next(iter(other.train_dataloader()))[0].dtype == torch.float32
        torch.testing.assert_close(by_device, by_workers)

    @pytest.mark.parametrize("options", [{"interpolation": "nearest"}, {"crop_pct": 1.5}])
    def test_automatic_leaves_the_rest_to_timm(self, layout, options):
        assert next(iter(make(layout, **options).train_dataloader()))[0].dtype == torch.float32

    def test_automatic_leaves_large_images_to_timm(self, tmp_path):
        root = write_layout(tmp_path / "large", size=(130, 40))
        assert next(iter(make(root).train_dataloader()))[0].dtype == torch.float32
        assert next(iter(make(root, device_transform=True).train_dataloader()))[0].dtype == torch.uint8

    def test_another_size_is_an_error(self, tmp_path):
        root = tmp_path / "mixed"
        (root / "train" / "cat").mkdir(parents=True)
        for i in range(200):
            make_image(0, (16, 17) if i == 100 else (16, 16)).save(root / "train" / "cat" / f"{i:03}.png")
        module = make(root, test_split=None)
        with pytest.raises(ValueError, match=r"16x17 pixels.*device_transform=False"):
            list(module.train_dataloader())

    def test_set_but_impossible(self, folders, layout):
        with pytest.raises(ValueError, match="needs images of one size, found"):
            make(folders, device_transform=True)
        with pytest.raises(ValueError, match="nearest"):
            make(layout, device_transform=True, interpolation="nearest")


class TestPlainImageFolder:
    """Torchvision's own layout: a root of class folders, without splits."""

    @pytest.fixture
    def plain(self, folders):
        return folders / "train"

    def test_is_the_training_split(self, plain):
        module = make(plain, test_split=None)
        assert module.class_names == ["cat", "dog"]
        assert module.labels("train").tolist() == [0] * 6 + [1] * 6
        assert not module.has_test

    def test_equals_the_split_of_a_root_of_splits(self, folders, plain):
        images, labels = read(module := make(plain, test_split=None), module.train_dataloader())
        expected = read(module := make(folders), module.train_dataloader())
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])

    def test_without_test_split_the_error_says_what_to_set(self, plain):
        with pytest.raises(ValueError, match=r"no split 'test'.*--data\.test_split=null --data\.holdout=0\.2"):
            make(plain)

    def test_holdout(self, plain):
        module = make(plain, test_split=None, holdout=0.2)
        assert np.bincount(module.labels("test")).tolist() == [1, 1]
        assert np.bincount(module.labels("train")).tolist() == [5, 5]

    def test_hidden_and_other_files_do_not_matter(self, plain, folders):
        for folder in (plain / ".ipynb_checkpoints", plain / "cat" / ".ipynb_checkpoints"):
            folder.mkdir()
            make_image(0).save(folder / "0.png")
        make_image(0).save(plain / "cat" / "._0.png")
        (plain / "README.txt").write_text("x")
        (folders / "test" / "labels.csv").write_text("x")
        module = make(plain, test_split=None)
        assert module.class_names == ["cat", "dog"]
        assert len(module.labels("train")) == 12
        assert make(folders).num_classes == 2

    def test_stray_image_beside_class_folders(self, folders):
        make_image(0).save(folders / "test" / "overview.png")
        with pytest.raises(ValueError, match=r"mixes layouts: test holds images, and test/cat does too"):
            make(folders)

    def test_a_class_without_images_of_its_own(self, plain):
        (plain / "emu" / "young").mkdir(parents=True)
        make_image(0).save(plain / "emu" / "young" / "0.png")
        with pytest.raises(ValueError, match=r"mixes layouts: cat holds images, and emu/young does too"):
            make(plain, test_split=None)

    def test_root_of_splits_without_the_test_split(self, folders):
        with pytest.raises(ValueError, match=r"Its splits: test, train, val\. To test on rows.*--data\.holdout=0\.2"):
            make(folders, test_split="dev")


class TestHoldout:
    def test_parts_the_training_split(self, layout):
        module = make(layout, test_split=None, holdout=0.3)
        train, test = (module._indices[stage] for stage in ("train", "test"))
        assert sorted([*train, *test]) == list(range(20))
        assert np.bincount(module.labels("test")).tolist() == [3, 3]
        images, labels = read(module, module.test_dataloader())
        whole, _ = read(other := make(layout), other.train_dataloader())
        assert torch.equal(images, whole[test])
        assert labels.tolist() == module.labels("test").tolist()
        images, _ = read(module, module.train_dataloader())
        assert torch.equal(images, whole[train])
        assert module.has_test

    def test_seed(self, layout):
        def rows(**options):
            return make(layout, test_split=None, holdout=0.5, **options)._indices["test"].tolist()

        assert rows() == rows(holdout_seed=42) == rows(seed=3, limit_per_class=1)
        assert rows() != rows(holdout_seed=1)

    def test_limit_chooses_among_the_training_rows(self, layout):
        module = make(layout, test_split=None, holdout=0.5, limit_per_class=2)
        chosen = module.train_dataloader().dataset.indices
        assert set(chosen) < set(module._indices["train"])
        assert len(module.labels("train")) == 10
        assert len(module.labels("test")) == 10

    def test_one_row_of_a_class(self, folders):
        (folders / "train" / "emu").mkdir()
        make_image(0).save(folders / "train" / "emu" / "0.png")
        with pytest.raises(ValueError, match=r"1 classes have one row only: emu"):
            make(folders, test_split=None, holdout=0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"holdout": 0.0, "test_split": None}, r"holdout=0\.0 must lie between 0 and 1"),
            ({"holdout": 1.0, "test_split": None}, "must lie between 0 and 1"),
            ({"holdout": float("nan"), "test_split": None}, "must lie between 0 and 1"),
            ({"holdout": 0.5}, r"test_split='test' names others.*--data\.test_split=null"),
            ({"holdout": 0.5, "test_split": None, "train_split": None, "val_split": "val"}, "train_split=None"),
            ({"holdout": 0.5, "test_split": None, "holdout_seed": -1}, "holdout_seed=-1"),
        ],
    )
    def test_impossible_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ImageDataModule("x", **options)


class TestForComparisons:
    """What a store of keys needs: rows in order, their labels, and what determines them."""

    def test_ordered_loader_is_whole_unshuffled_and_unaugmented(self, layout):
        expected = read(module := make(layout), module.train_dataloader())
        module = make(layout, limit_per_class=2, shuffle=True, augment={"scale": [0.2, 0.5]}, batch_size=3)
        images, labels = read(module, module.ordered_loader("train"))
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
        assert torch.equal(labels, torch.from_numpy(module.labels("train")))
        assert len(read(module, module.ordered_loader("test"))[0]) == 10

    @pytest.mark.parametrize("options", [{}, {"test_split": None, "holdout": 0.3}])
    def test_subsets_of_the_ordered_rows_are_those_of_limit_per_class(self, layout, options):
        module = make(layout, limit_per_class=3, seed=5, **options)
        keys, labels = read(module, module.ordered_loader("train"))
        chosen, _ = choose_per_class(module.labels("train"), module.num_classes, 3, 5)
        limited = read(module, module.train_dataloader())
        assert torch.equal(keys[chosen], limited[0])
        assert torch.equal(labels[chosen], limited[1])

    def test_fingerprint_says_which_rows(self, layout, folders):
        def fingerprint(stage="train", path=layout, **options):
            return make(path, **options).fingerprint(stage)

        first = fingerprint()
        assert first == fingerprint(limit_per_class=2, shuffle=True, batch_size=3, device_transform=False)
        others = [
            fingerprint("test"),
            fingerprint(train_split="train[:80%]"),
            fingerprint(test_split=None, holdout=0.5),
            fingerprint(test_split=None, holdout=0.5, holdout_seed=1),
            fingerprint("test", test_split=None, holdout=0.5),
            fingerprint(path=folders),
        ]
        assert len({first, *others}) == 7

    def test_fingerprint_follows_replaced_image_files(self, folders):
        module = make(folders)
        before, test = module.fingerprint("train"), module.fingerprint("test")
        file = next((folders / "train" / "cat").iterdir())
        status = file.stat()
        file.write_bytes(file.read_bytes() + b"\0")  # same time, another size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        longer = make(folders).fingerprint("train")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # same size, another time
        later = make(folders).fingerprint("train")
        file.rename(file.with_name("renamed" + file.suffix))
        assert len({before, longer, later, make(folders).fingerprint("train")}) == 4
        assert make(folders).fingerprint("test") == test

    def test_fingerprint_follows_replaced_parquet_files(self, layout):
        before = make(layout).fingerprint("train")
        file = layout / "data" / "train-00000-of-00001.parquet"
        os.utime(file, ns=(0, 1))
        assert make(layout).fingerprint("train") != before
        single = make(file, test_split=None).fingerprint("train")
        os.utime(file, ns=(0, 2))
        assert make(file, test_split=None).fingerprint("train") != single

    def test_fingerprint_survives_a_new_cache_and_another_place(self, layout, tmp_path, monkeypatch):
        before = make(layout).fingerprint("train")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "new")
        moved = layout.rename(tmp_path / "moved")
        assert make(moved).fingerprint("train") == before

    def test_fingerprint_of_labels_and_columns(self, tmp_path):
        root = write_layout(tmp_path / "c", names=None, other=[i % 3 for i in range(20)])
        by_label = make(root, label_column="label").fingerprint("train")
        assert make(root, label_column="other").fingerprint("train") != by_label

    def test_fingerprint_of_arrays_is_their_content(self):
        pixels = np.zeros((2, 3, 3), np.uint8)
        rows = ArrayRows(pixels, np.arange(2), None)
        assert rows.fingerprint() == ArrayRows(pixels.copy(), np.arange(2), None).fingerprint()
        assert rows.fingerprint() != ArrayRows(pixels.reshape(2, 1, 9), np.arange(2), None).fingerprint()
        other = pixels.copy()
        other[1, 2, 2] = 1
        assert rows.fingerprint() != ArrayRows(other, np.arange(2), None).fingerprint()

    def test_transform_description(self, layout):
        first = make(layout).transform_description
        assert first == make(layout, limit_per_class=2, augment={}).transform_description
        others = [{"interpolation": "bilinear"}, {"crop_pct": 1.0}, {"device_transform": False}]
        others.append({"data_config": {**CONFIG, "mean": (0.5, 0.5, 0.5)}})
        assert len({first, *(make(layout, **options).transform_description for options in others)}) == 5
        described = json.loads(first)
        assert described["device_transform"] is True
        assert described["input_size"] == [3, 24, 24]

    def test_stages(self, layout):
        module = make(layout)
        for method in (module.labels, module.fingerprint, module.ordered_loader):
            with pytest.raises(ValueError, match=r"val_split=None.*--data\.val_split=NAME"):
                method("val")
            with pytest.raises(ValueError, match="stage='fit' must be one of train, val, test"):
                method("fit")
        unopened = ImageDataModule(str(layout), data_config=CONFIG)
        for method in (unopened.labels, unopened.fingerprint, unopened.ordered_loader):
            with pytest.raises(RuntimeError, match=r"setup\(\)"):
                method("train")
        with pytest.raises(RuntimeError, match=r"setup\(\)"):
            _ = unopened.transform_description

    def test_declared_classes_without_rows_are_left_out(self, tmp_path):
        root = write_layout(tmp_path / "c", names=("a", "b", "unused"))
        assert make(root).class_names == ["a", "b"]
        assert make(root, train_split=None).class_names == ["a", "b", "unused"]


class TestFewShot:
    def test_limit_and_seed(self, layout):
        _, labels = read(module := make(layout, limit_per_class=3), module.train_dataloader())
        assert torch.bincount(labels).tolist() == [3, 3]
        same = make(layout, limit_per_class=3).train_dataloader().dataset.indices
        other = make(layout, limit_per_class=3, seed=1).train_dataloader().dataset.indices
        assert np.array_equal(module.train_dataloader().dataset.indices, same)
        assert not np.array_equal(same, other)
        assert len(module.test_dataloader().dataset) == 10

    def test_short_classes_are_named_once(self, layout):
        module = ImageDataModule(str(layout), limit_per_class=11, data_config=CONFIG)
        with pytest.warns(UserWarning, match=r"fewer rows.*a \(10\), b \(10\)"):
            module.setup("fit")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.setup("test")
        assert len(module.train_dataloader().dataset) == 20

    def test_enough_images_warn_of_nothing(self, layout):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            make(layout, limit_per_class=10)

    def test_chooses_without_decoding(self, layout, monkeypatch):
        monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
        assert len(make(layout, limit_per_class=2, device_transform=False).train_dataloader().dataset) == 4


class TestLoaders:
    def test_train_is_in_order_and_whole(self, layout):
        first, _ = read(module := make(layout, batch_size=8), module.train_dataloader())
        second, _ = read(module, module.train_dataloader())
        assert torch.equal(first, second)
        assert len(first) == 20

    def test_shuffle_is_seeded_and_for_train_only(self, layout):
        def order(**options):
            return read(module := make(layout, shuffle=True, **options), module.train_dataloader())[0]

        assert torch.equal(order(), order())
        assert not torch.equal(order(), order(seed=1))
        assert not torch.equal(order(), read(module := make(layout), module.train_dataloader())[0])
        module = make(layout, shuffle=True)
        loader = module.train_dataloader()
        assert not torch.equal(read(module, loader)[0], read(module, loader)[0])
        assert torch.equal(read(module, module.test_dataloader())[0], read(module, module.test_dataloader())[0])

    def test_augment_is_for_train_only(self, layout):
        module = make(layout, augment={"scale": [0.2, 0.5]})
        assert next(iter(module.train_dataloader()))[0].dtype == torch.float32
        assert not torch.equal(read(module, module.train_dataloader())[0], read(module, module.train_dataloader())[0])
        assert next(iter(module.test_dataloader()))[0].dtype == torch.uint8

    def test_batch_sizes(self, layout):
        module = make(layout, batch_size=6, eval_batch_size=10)
        assert [len(labels) for _, labels in module.train_dataloader()] == [6, 6, 6, 2]
        assert [len(labels) for _, labels in module.test_dataloader()] == [10]
        assert [len(labels) for _, labels in module.predict_dataloader()] == [10]
        assert len(list(make(layout, batch_size=4).test_dataloader())) == 3

    @pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
    def test_workers(self, layout, context, workers):
        expected = read(module := make(layout, batch_size=6), module.train_dataloader())
        module = make(layout, batch_size=6, num_workers=workers, persistent_workers=True)
        loader = module.train_dataloader()
        loader.multiprocessing_context = context
        for _ in range(2):
            given = read(module, loader)
            assert torch.equal(given[0], expected[0])
            assert torch.equal(given[1], expected[1])

    def test_no_validation(self, layout):
        assert make(layout).val_dataloader() == []

    def test_evaluation_only(self, layout):
        module = make(layout, train_split=None)
        assert len(module.test_dataloader().dataset) == 10
        with pytest.raises(ValueError, match="train_split=None"):
            module.train_dataloader()

    def test_before_setup(self, layout):
        module = ImageDataModule(str(layout), data_config=CONFIG)
        with pytest.raises(RuntimeError, match="setup"):
            module.train_dataloader()
        with pytest.raises(RuntimeError, match="setup"):
            _ = module.num_classes

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 0},
            {"eval_batch_size": 0},
            {"limit_per_class": 0},
            {"seed": -1},
            {"persistent_workers": True},
            {"train_split": None, "test_split": None},
        ],
    )
    def test_impossible_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            ImageDataModule("x", **options)


class Encoder(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.data_config = {**CONFIG, "input_size": (3, size, size)}


class Classifier(LightningModule):
    def __init__(self, size=24):
        super().__init__()
        self.encoder = Encoder(size)
        self.layer = torch.nn.LazyLinear(2)
        self.layer(torch.zeros(1, 3 * size * size))
        self.seen = []

    def training_step(self, batch):
        images, labels = batch
        self.seen.append(images.detach())
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    test_step = validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_trainer(tmp_path):
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


class TestTrainer:
    def test_takes_the_running_encoders_configuration(self, layout, tmp_path):
        data = ImageDataModule(str(layout), batch_size=8)
        for size in (24, 32):  # the second module is another one
            module = Classifier(size)
            trainer = make_trainer(tmp_path)
            trainer.fit(module, datamodule=data)
            trainer.test(module, datamodule=data, verbose=False)
            seen = torch.cat(module.seen)
            assert seen.shape == (30, 3, size, size)
            expected = create_transform(**module.encoder.data_config)(make_image(0))
            torch.testing.assert_close(seen[0], expected)

    def test_argument_wins(self, layout, tmp_path):
        module = Classifier(24)
        module.encoder.data_config = None
        make_trainer(tmp_path).fit(module, datamodule=ImageDataModule(str(layout), data_config=CONFIG))
        assert module.seen[0].shape[-1] == 24

    def test_no_configuration_at_all(self, layout, tmp_path):
        module = Classifier()
        del module.encoder
        with pytest.raises(ValueError, match="Pass data_config="):
            make_trainer(tmp_path).fit(module, datamodule=ImageDataModule(str(layout)))
        with pytest.raises(ValueError, match="Pass data_config="):
            make(layout, data_config=None)

    def test_logs_no_hyperparameters(self, layout):
        assert not ImageDataModule(str(layout)).hparams


class TestDigits:
    def test_splits_are_other_writers(self):
        from sklearn.datasets import load_digits

        data = DigitsDataModule(data_config=CONFIG, interpolation="bilinear", batch_size=256)
        data.setup()
        target = load_digits().target
        _, train = read(data, data.train_dataloader())
        images, test = read(data, data.test_dataloader())
        assert train.tolist() == target[:-500].tolist()
        assert test.tolist() == target[-500:].tolist()
        assert data.class_names == [str(i) for i in range(10)]
        pixels = np.round(load_digits().images[-500] * 255 / 16).astype(np.uint8)
        expected = create_transform(**{**CONFIG, "interpolation": "bilinear"})(Image.fromarray(pixels).convert("RGB"))
        torch.testing.assert_close(images[0], expected)
        assert data.val_dataloader() == []


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
class TestSharedData:
    @pytest.mark.parametrize(
        ("name", "options", "classes", "on_device"),
        [
            ("cifar10-small", {}, 10, True),
            ("caltech101-fewshot", {}, 100, False),
            ("omniglot-small", {}, 242, True),
            ("mini-imagenet", {"train_split": None}, None, True),
        ],
    )
    def test_reads(self, name, options, classes, on_device):
        data = make(SHARED / name, batch_size=8, **options)
        if classes is not None:
            assert data.num_classes == classes
        images, labels = next(iter(data.test_dataloader()))
        assert (images.dtype == torch.uint8) == on_device
        assert data.on_after_batch_transfer((images, labels), 0)[0].shape == (8, 3, 24, 24)

    def test_the_papers_mini_imagenet(self):
        data = make(SHARED / "mini-imagenet", train_split="test", test_split=None, holdout=0.5)
        assert data.num_classes == 20
        assert np.bincount(data.labels("train")).tolist() == [300] * 20
        assert np.bincount(data.labels("test")).tolist() == [300] * 20

    def test_cifar_names(self):
        assert make(SHARED / "cifar10-small").class_names[:3] == ["airplane", "automobile", "bird"]


def test_import_is_light():
    code = (
        "import sys, lightning_faast.data as data; assert 'DigitsDataModule' in dir(data);"
        "data.ImageDataModule, data.DigitsDataModule;"
        "heavy = {'datasets', 'timm', 'sklearn.datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_missing_library_names_the_extra(monkeypatch, layout):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-faast\[vision\]"'):
        ImageDataModule(str(layout), data_config=CONFIG).prepare_data()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn.*lightning-faast\[quickstart\]"):
        DigitsDataModule(data_config=CONFIG).setup()
