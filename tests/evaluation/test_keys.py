"""Keys on disk: found by what determines them, whole or not at all, checked when they are opened."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_faast.evaluation.keys import KeyStore, digest_of, fingerprint


def batches(n=10, d=4, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, labels = torch.randn(n, d, generator=generator), torch.arange(n) % 3
    return keys, labels, list(zip(keys.split(size), labels.split(size), strict=True))


def encoded(store, description=None, **kwargs):
    keys, labels, parts = batches(**kwargs)
    return keys, labels, store.get_or_encode(description or {"a": 1}, len(keys), lambda: parts)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 9), size=st.integers(1, 31))
def test_keys_come_back_bit_for_bit(tmp_path_factory, n, d, size):
    store = KeyStore(tmp_path_factory.mktemp("keys"))
    keys, labels, stored = encoded(store, n=n, d=d, size=size)
    assert (stored.rows, stored.width) == (n, d)
    assert torch.equal(stored.take(torch.arange(n)), keys)
    assert torch.equal(stored.labels, labels)
    assert stored.seconds > 0


def test_blocks_are_the_chosen_rows_in_their_order(tmp_path):
    keys, labels, stored = encoded(KeyStore(tmp_path))
    chosen = torch.tensor([7, 0, 9, 3, 3])
    parts = list(stored.blocks(chosen, rows=2))
    assert [len(block) for block, _ in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([block for block, _ in parts]), keys[chosen])
    assert torch.equal(torch.cat([part for _, part in parts]), labels[chosen])


def test_half_precision_keys_are_kept_as_float32(tmp_path):
    keys = torch.randn(4, 3).half()
    stored = KeyStore(tmp_path).get_or_encode({}, 4, lambda: [(keys, torch.zeros(4))])
    assert torch.equal(stored.take(torch.arange(4)), keys.float())


def test_what_is_there_is_not_encoded_again(tmp_path):
    store = KeyStore(tmp_path)
    encoded(store)

    def never():
        raise AssertionError

    assert store.get_or_encode({"a": 1}, 10, never).rows == 10


def test_another_description_is_never_found(tmp_path):
    store = KeyStore(tmp_path)
    encoded(store, {"encoder": "a", "data": "b"})
    assert store.get({"encoder": "a", "data": "c"}) is None
    assert store.get({"data": "b", "encoder": "a"}) is not None  # the order of names does not matter
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_functions_count_by_name_not_by_address():
    digest = digest_of({"head": textwrap.dedent})
    code = "import textwrap; import lightning_faast.evaluation.keys as k; print(k.digest_of({'head': textwrap.dedent}))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == digest
    with pytest.raises(TypeError, match="no name that lasts"):
        digest_of({"head": object()})


@pytest.mark.parametrize("place", ["keys", "labels"])
def test_changed_content_is_refused(tmp_path, place):
    store = KeyStore(tmp_path)
    _, _, stored = encoded(store)
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset + 5 if place == "keys" else stored.offset - 50)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="its content has changed"):
        store.get({"a": 1})


def test_truncated_file_is_refused(tmp_path):
    store = KeyStore(tmp_path)
    _, _, stored = encoded(store)
    os.truncate(stored.path, 200)
    with pytest.raises(ValueError, match="is damaged"):
        store.get({"a": 1})


@pytest.mark.parametrize("rows", [9, 11])
def test_another_number_of_rows_leaves_nothing(tmp_path, rows):
    _, _, parts = batches()
    with pytest.raises(ValueError, match="announced"):
        KeyStore(tmp_path).get_or_encode({}, rows, lambda: parts)
    assert list(tmp_path.iterdir()) == []


def test_nan_keys_name_their_rows_and_leave_nothing(tmp_path):
    keys, labels, _ = batches()
    keys[4, 1] = float("nan")
    parts = list(zip(keys.split(3), labels.split(3), strict=True))
    with pytest.raises(ValueError, match="NaN or infinite keys for rows 3 to 5"):
        KeyStore(tmp_path).get_or_encode({}, 10, lambda: parts)
    assert list(tmp_path.iterdir()) == []


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        KeyStore(tmp_path).get_or_encode({}, 0, list)


def test_killed_process_leaves_no_keys_and_clear_removes_its_rest(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        from lightning_faast.evaluation.keys import KeyStore
        def forever():
            yield torch.randn(3, 4), torch.zeros(3)
            print("started", flush=True)
            time.sleep(60)
        KeyStore(sys.argv[1]).get_or_encode({"a": 1}, 10, forever)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = KeyStore(tmp_path)
    assert store.get({"a": 1}) is None
    assert store.entries() == []
    assert store.clear() > 0
    assert list(tmp_path.iterdir()) == []


def test_entries_say_what_they_are(tmp_path):
    store = KeyStore(tmp_path)
    encoded(store, {"stage": "train"})
    (entry,) = store.entries()
    assert (entry.description, entry.rows, entry.width) == ({"stage": "train"}, 10, 4)
    assert entry.num_bytes == entry.path.stat().st_size
    assert store.clear() == entry.num_bytes
    assert store.entries() == []


def test_directory_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path))
    assert KeyStore().directory == tmp_path / "keys"


class Encoder(nn.Module):
    def __init__(self, normalize=True):
        super().__init__()
        self.normalize = normalize
        self.layer = nn.Linear(3, 2)


def test_fingerprint_sees_weights_options_and_structure():
    torch.manual_seed(0)
    encoder, same, other = Encoder(), Encoder(), Encoder(normalize=False)
    for copy in (same, other):
        copy.load_state_dict(encoder.state_dict())
    assert fingerprint(encoder) == fingerprint(same)
    assert fingerprint(encoder.eval()) == fingerprint(same)  # the mode is not part of it
    assert fingerprint(encoder) != fingerprint(other)
    with torch.no_grad():
        same.layer.weight[0, 0] += 1e-7
    assert fingerprint(encoder) != fingerprint(same)
    encoder.layer = nn.Sequential(encoder.layer)
    assert fingerprint(encoder) != fingerprint(Encoder())
