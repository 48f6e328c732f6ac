"""Statistics on disk: whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from lightning_faast.associative import SufficientStatistics, load_statistics, save_statistics
from tests.associative.oracles import blobs, statistics_of


@pytest.fixture
def saved(tmp_path):
    statistics = statistics_of(*blobs(50, 8, 3))
    return statistics, save_statistics(statistics, tmp_path / "sums.safetensors")


def same(found, expected):
    states = found.state_dict(), expected.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_what_is_written_is_read(saved):
    statistics, path = saved
    assert same(load_statistics(path), statistics)
    assert load_statistics(str(path), num_classes=3).labels
    assert os.listdir(path.parent) == [path.name], "nothing else is left behind"
    assert path.stat().st_size < 8 * (36 + 24) + 1500, "G is a packed triangle"


def test_folders_are_made_and_permissions_are_ordinary(tmp_path):
    path = save_statistics(statistics_of(*blobs(50, 8, 3)), tmp_path / "a" / "b" / "sums.safetensors")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_saving_goes_over_what_was_there(saved):
    _, path = saved
    other = statistics_of(*blobs(70, 8, 3))
    save_statistics(other, path)
    assert same(load_statistics(path), other)


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "noise", "other"])
def test_a_damaged_or_foreign_file_is_refused(saved, damage):
    _, path = saved
    whole = path.read_bytes()
    if damage == "other":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {"empty": b"", "truncated": whole[:-9], "header": whole[:20], "noise": os.urandom(200)}[damage]
        )
    with pytest.raises(ValueError, match=r"not a whole safetensors file|missing"):
        load_statistics(path)


def test_a_missing_file_and_another_number_of_classes(saved):
    with pytest.raises(FileNotFoundError, match="No statistics file"):
        load_statistics(saved[1].with_name("none"))
    with pytest.raises(ValueError, match="expected 5"):
        load_statistics(saved[1], num_classes=5)


WRITER = """
    import os, signal, sys, time, resource, torch
    import lightning_faast.associative.files as files
    from lightning_faast.associative import SufficientStatistics
    sums = SufficientStatistics(3).update(torch.randn(400, 300), torch.arange(400) % 3)
    {prepare}
    files.save_statistics(sums, sys.argv[1])
"""


def run_writer(path, prepare):
    script = textwrap.dedent(WRITER).format(prepare=prepare)
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_writing_leaves_the_old_file_whole(saved, moment):
    statistics, path = saved
    found = run_writer(path, f"os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    assert found.returncode == -signal.SIGKILL
    assert same(load_statistics(path), statistics)
    save_statistics(statistics, path)
    assert same(load_statistics(path), statistics)


def test_a_full_disk_leaves_the_old_file_whole_and_says_so(saved):
    statistics, path = saved
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))"
    found = run_writer(path, limit)
    assert found.returncode == 1, found.stderr
    assert "OSError" in found.stderr.splitlines()[-1]
    assert "could not be written" in found.stderr
    assert same(load_statistics(path), statistics)
    assert os.listdir(path.parent) == [path.name], "the part that was written is removed"


def test_empty_statistics_can_be_written(tmp_path):
    assert load_statistics(save_statistics(SufficientStatistics(3), tmp_path / "empty"), num_classes=3).rows == 0
