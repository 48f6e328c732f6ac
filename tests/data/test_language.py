"""Running text: tokens made once, windows, limits, bytes."""

import pytest
import torch

import lightning_faast.data.tokens as tokens_module
from lightning_faast.data import LanguageDataModule
from lightning_faast.data.tokens import open_stream
from tests.language.projects import lines, save_model, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text(40), encoding="utf-8")
    return path


def ready(path, folder, **options):
    data = LanguageDataModule(str(path), tokenizer=str(folder), **{"test_split": None, "window": 16, **options})
    data.prepare_data()
    data.setup()
    return data


def batches(loader):
    return {name: torch.cat([batch[name] for batch in loader]) for name in ("input_ids", "labels", "bytes")}


def test_windows_are_the_text(file, folder, tokenizer):
    data = ready(file, folder)
    ids = tokenizer(text(40), add_special_tokens=False)["input_ids"]
    assert data.num_tokens("train") == len(ids)
    assert data.num_bytes("train") == len(text(40).encode())
    made = batches(data.train_dataloader())
    assert made["input_ids"].flatten()[: len(ids)].tolist() == ids  # in order, disjoint
    assert made["labels"][0].tolist() == [-100, *ids[1:16]]
    filled = made["labels"][-1][len(ids) % 16 or 16 :]
    assert (filled == -100).all()


def test_raw_text_stays_raw(file, folder, tokenizer):
    data = ready(file, folder)
    ids = batches(data.train_dataloader())["input_ids"].flatten()[: data.num_tokens("train")]
    assert tokenizer.decode(ids) == text(40)
    assert "<unk>" in tokenizer.decode(ids)


@pytest.mark.parametrize("stride", [None, 1, 5])
def test_bytes_are_those_of_the_scored_text(file, folder, tokenizer, stride):
    data = ready(file, folder, holdout=0.5, stride=stride)
    made = batches(data.test_dataloader())
    for labels, size in zip(made["labels"], made["bytes"].tolist(), strict=True):
        scored = labels[labels != -100]
        assert len(tokenizer.decode(scored).encode()) == size
    if stride is not None:
        first = tokenizer.decode(made["input_ids"][0, :1])
        assert int(made["bytes"].sum()) == data.num_bytes("test") - len(first.encode())


def test_limits_take_the_first_tokens(file, folder):
    whole = ready(file, folder, holdout=0.25)
    some = ready(file, folder, holdout=0.25, limit_tokens=40, test_tokens=20)
    assert (some.num_tokens("train"), some.num_tokens("test")) == (40, 20)
    for stage in ("train", "test"):
        ids = [batches(getattr(d, f"{stage}_dataloader")())["input_ids"].flatten() for d in (whole, some)]
        n = some.num_tokens(stage)
        assert torch.equal(ids[0][:n], ids[1][:n])
    assert some.fingerprint("train") == whole.fingerprint("train")  # what there was to choose from
    assert some.fingerprint("test") != whole.fingerprint("test")


def test_held_out_tokens_are_the_last_and_not_learned(file, folder, tokenizer):
    data = ready(file, folder, holdout=0.25)
    ids = tokenizer(text(40), add_special_tokens=False)["input_ids"]
    assert data.num_tokens("train") + data.num_tokens("test") == len(ids)
    assert data.num_tokens("test") == round(0.25 * len(ids))
    assert batches(data.test_dataloader())["input_ids"][0, 0] == ids[-data.num_tokens("test")]


def test_text_is_tokenized_once(file, folder, cache):
    first = ready(file, folder)
    (made,) = cache.glob("*.safetensors")
    before = made.stat().st_mtime_ns
    second = ready(file, folder)
    assert made.stat().st_mtime_ns == before
    assert second.fingerprint("train") == first.fingerprint("train")
    file.write_text(text(41), encoding="utf-8")
    third = ready(file, folder)
    assert third.fingerprint("train") != first.fingerprint("train")
    assert third.num_bytes("train") == len(text(41).encode())


def test_long_texts_are_tokenized_in_blocks(monkeypatch, tmp_path, tokenizer):
    whole = open_stream(iter(lines(30)), tokenizer, "whole", tmp_path)
    monkeypatch.setattr(tokens_module, "_BLOCK", 200)
    blocks = open_stream(iter(lines(30)), tokenizer, "blocks", tmp_path)
    assert blocks.num_bytes(0, len(blocks)) == whole.num_bytes(0, len(whole)) == len(text(30).encode())
    assert tokenizer.decode(blocks.ids) == text(30)


def test_block_without_a_line_end_is_cut_where_it_is_full(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(tokens_module, "_BLOCK", 10)
    stream = open_stream(["word " * 20], tokenizer, "", tmp_path)
    assert tokenizer.decode(stream.ids) == "word " * 20


def test_rows_of_a_data_set_are_one_text(tmp_path, folder, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "set"
    root.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = [line.rstrip("\n") for line in lines(20, seed)]
        pq.write_table(pa.table({"text": rows}), root / f"{split}-00000-of-00001.parquet")
    data = ready(root, folder, test_split="test")
    for stage, seed in (("train", 0), ("test", 1)):
        ids = batches(getattr(data, f"{stage}_dataloader")())["input_ids"].flatten()[: data.num_tokens(stage)]
        assert tokenizer.decode(ids) == text(20, seed)
    with pytest.raises(ValueError, match="no split 'dev'"):
        ready(root, folder, test_split="dev")
    with pytest.raises(ValueError, match=r"text_column='words'.*columns text"):
        ready(root, folder, text_column="words")


def test_shuffling_keeps_windows_whole(file, folder):
    ordered, shuffled = ready(file, folder), ready(file, folder, shuffle=True, seed=3)
    a, b = (batches(d.train_dataloader())["input_ids"] for d in (ordered, shuffled))
    assert not torch.equal(a, b)
    assert sorted(a.tolist()) == sorted(b.tolist())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_split": None}, "name at least one split"),
        ({"holdout": 1.0}, "between 0 and 1"),
        ({"holdout": 0.1, "test_split": "test"}, "test_split=null"),
        ({"window": 8, "stride": 9}, "stride from 1 to window"),
        ({"limit_tokens": 1}, "limit_tokens=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        LanguageDataModule("text.txt", **{"test_split": None, **options})


def test_text_that_is_not_there_or_empty(tmp_path, folder, file):
    with pytest.raises(FileNotFoundError, match="no such text file"):
        ready(tmp_path / "none.txt", folder)
    with pytest.raises(ValueError, match=r"one text.*--data.holdout=0.1"):
        ready(file, folder, test_split="test")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="The text is empty"):
        ready(tmp_path / "empty.txt", folder)


def test_without_a_tokenizer_it_says_what_to_give(file):
    with pytest.raises(ValueError, match="tokenizer is not set"):
        LanguageDataModule(str(file), test_split=None).setup()


def test_tokens_are_known_after_setup(file):
    with pytest.raises(RuntimeError, match="after setup"):
        LanguageDataModule(str(file), test_split=None).num_tokens("train")
    with pytest.raises(ValueError, match="no val text"):
        LanguageDataModule(str(file), test_split=None).num_tokens("val")
