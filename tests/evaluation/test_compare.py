"""A comparison: one encoding, one process a training method, only what is missing, refusals as rows."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lightning_faast.cli import main
from lightning_faast.evaluation.compare import Comparer
from lightning_faast.evaluation.keys import KeyStore
from lightning_faast.evaluation.records import load_record, load_rows
from lightning_faast.lightning_cli import FaastCLI

RECIPE = "recipes/images.yaml"
TINY = [
    "--model.encoder.model_name=test_vit",
    "--model.encoder.pretrained=false",
    "--model.encoder.checkpoint_path=null",
    "--model.encoder.image_size=32",
    "--trainer.accelerator=cpu",
    "--trainer.enable_model_summary=false",
    "--seed_everything=0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain image folder of three colors, class/image."""
    root = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for number in range(15):
            pixels = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 90
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One random encoder as a file, so that every process has the same."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), path)
    return path


@pytest.fixture
def options(folder, weights):
    tiny = [option for option in TINY if "pretrained" not in option and "checkpoint_path" not in option]
    return [f"--data.path={folder}", *tiny, f"--model.encoder.checkpoint_path={weights}"]


def comparer(tmp_path, options, methods=("faast", "faast_paper"), shots=(1, None), seeds=2, **kwargs):
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    return Comparer(
        RECIPE,
        methods,
        shots,
        seeds,
        tmp_path / "out",
        options,
        store=KeyStore(tmp_path / "keys"),
        console=quiet,
        **kwargs,
    )


def test_every_run_has_a_record(tmp_path, options):
    records = comparer(tmp_path, options).run()
    assert [(r.method, r.shots, r.seed) for r in records] == [
        (method, shots, seed) for method in ("faast", "faast_paper") for shots, seed in ((1, 0), (1, 1), (None, 0))
    ]
    assert {r.status for r in records} == {"done"}
    for record in records:
        assert record.train_rows == (3 if record.shots == 1 else 36)
        assert record.examples_encoded == record.train_rows
        assert record.test_rows == 9
        assert record.seconds == pytest.approx(record.seconds_encode + record.seconds_fit + record.seconds_solve)
        assert record.seconds_encode > 0
        assert record.microseconds_1 > record.microseconds_256 > 0
    everything = [r for r in records if r.shots is None]
    assert everything[0].details["path"]["kind"] == "ridge"
    grid = everything[0].details["path"]["grid"]
    assert grid == sorted(grid)
    assert len(grid) == len(everything[0].details["path"]["scores"]) > 3


def test_figures_are_those_of_the_very_command(tmp_path, options, capsys):
    """Stored keys and ``fit`` on the recipe give one and the same accuracy and loss."""
    compared = comparer(tmp_path, options, ["faast"], [4], 1)
    (record,) = compared.run()
    run = FaastCLI(["fit", *compared.runs[0].args, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    measured = run.trainer.callback_metrics
    assert record.accuracy == pytest.approx(float(measured["test/accuracy"]), abs=1e-6)
    assert record.loss == pytest.approx(float(measured["test/loss"]), rel=1e-4)
    assert record.calibration_error == pytest.approx(float(measured["test/calibration_error"]), abs=1e-4)


def test_second_call_runs_only_what_is_missing(tmp_path, options):
    first = comparer(tmp_path, options)
    first.run()
    times = {run.path: run.path.stat().st_mtime_ns for run in first.runs}
    removed = first.runs[2].path
    removed.unlink()
    second = comparer(tmp_path, options)
    assert [run.path for run in second.missing()] == [removed]
    second.run()
    assert second.missing() == []
    again = {run.path: run.path.stat().st_mtime_ns for run in second.runs}
    assert {path for path in times if times[path] != again[path]} == {removed}


def test_replaced_image_makes_everything_missing_again(tmp_path, folder, options):
    first = comparer(tmp_path, options, ["faast"], [1], 1)
    first.run()
    image = folder / "red" / "3.png"
    before = image.read_bytes()
    Image.new("RGB", (32, 32), "white").save(image)
    try:
        assert len(comparer(tmp_path, options, ["faast"], [1], 1).missing()) == 1
    finally:
        image.write_bytes(before)


def test_one_encoding_serves_all_and_is_counted_for_each(tmp_path, options):
    comparer(tmp_path, options).run()
    entries = KeyStore(tmp_path / "keys").entries()
    assert sorted(entry.description["stage"] for entry in entries) == ["test", "train"]
    seconds = (
        KeyStore(tmp_path / "keys")
        .get(next(e for e in entries if e.description["stage"] == "train").description)
        .seconds
    )
    for record in comparer(tmp_path, options).records():
        assert record.seconds_encode == pytest.approx(seconds * record.train_rows / 36)


def test_what_cannot_be_done_is_a_row_that_says_so(tmp_path, options):
    zero_shot = tmp_path / "no_text_tower.yaml"
    zero_shot.write_text(
        "model:\n  class_embeddings: true\n  head:\n    class_path: lightning_faast.FastWeights\n"
        "    init_args: {zero_shot: identity}\nmethod: null\ntrainer: {max_epochs: 0}\n"
    )
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {head: {class_path: lightning_faast.FastWeights, init_args: {no_such_option: 1}}}\n")
    records = comparer(tmp_path, options, ["faast", str(zero_shot), str(wrong)], [1], 1).run()
    assert [(r.method, r.status) for r in records] == [
        ("faast", "done"),
        ("no_text_tower", "refused"),
        ("wrong", "refused"),
    ]
    assert "no embed_classes" in records[1].reason
    assert "no_such_option" in records[2].reason


def test_training_method_runs_in_a_process_of_its_own(tmp_path, options):
    compared = comparer(tmp_path, options, ["linear_probe"], [2], 1)
    (record,) = compared.run()
    assert record.status == "done", record.reason
    assert record.train_rows == 6
    assert record.examples_encoded == 20 * 6  # every epoch encodes anew
    assert record.details["epochs"] == 20
    assert record.parameters == 3 * record.key_width + 3
    assert record.bytes_to_predict == 4 * record.parameters
    assert record.bytes_to_update == 8 * record.parameters  # and SGD's momentum
    assert record.command == compared.runs[0].command
    assert "--config configs/methods/linear_probe.yaml" in record.command
    rows = load_rows(compared.runs[0].path)
    assert float((rows.label == rows.predicted).double().mean()) == pytest.approx(record.accuracy)


def test_failed_training_run_says_why_and_runs_again(tmp_path, options):
    broken = tmp_path / "broken.yaml"
    optimizer = "{class_path: torch.optim.SGD, init_args: {lr: -1.0}}"
    broken.write_text(f"model: {{head: torch.nn.Linear, optimizer: {optimizer}}}\nmethod: null\n")
    compared = comparer(tmp_path, options, [str(broken)], [1], 1)
    (record,) = compared.run()
    assert record.status == "failed"
    assert "learning rate: -1.0" in record.reason
    assert compared.missing() == compared.runs


def _obey_ctrl_c():
    """As in a terminal; where these tests run in the background, SIGINT is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_leaves_what_is_finished_and_stops_the_child(tmp_path, options):
    forever = tmp_path / "forever.yaml"
    forever.write_text("model: {head: torch.nn.Linear}\nmethod: null\ntrainer: {max_epochs: 1000000}\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lightning_faast", "compare", "--recipe", RECIPE, *options]
    command += [
        "--methods",
        f"faast,{forever}",
        "--shots",
        "2",
        "--seeds",
        "1",
        "--out",
        str(out),
        "--keys",
        str(tmp_path / "keys"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_obey_ctrl_c,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any((out / "logs").glob("*.txt")):
        time.sleep(0.5)
    time.sleep(5)  # the child is training, or still importing
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 130, printed
    assert "the same command runs the rest" in printed
    (finished,) = (out / "runs").glob("*.json")
    assert load_record(finished).method == "faast"
    assert (out / "comparison.html").is_file()


def test_command_reports_and_lists_its_keys(tmp_path, options, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FAAST_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    args = [
        "compare",
        "--recipe",
        RECIPE,
        *options,
        "--methods",
        "faast_regression",
        "--shots",
        "1,all",
        "--seeds",
        "1",
    ]
    assert main([*args, "--out", str(out)]) == 0
    capsys.readouterr()
    for name in ("comparison.html", "comparison.md", "comparison.tex", "comparison.csv"):
        assert (out / name).stat().st_size > 100
    methods = {json.loads(path.read_text())["method"] for path in (out / "runs").glob("*.json")}
    assert methods == {"faast", "faast_regression"}  # the reference joins by itself
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "train" in listed
    assert "36" in listed
    assert main(["keys", "clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert main(["keys", "list"]) == 0
    assert "No keys" in capsys.readouterr().out


def test_keys_that_are_there_already_are_compared(tmp_path):
    from safetensors.torch import save_file

    labels = torch.arange(40) % 4
    keys = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(6)[labels]
    file = tmp_path / "keys.safetensors"
    save_file(
        {"train_keys": keys, "train_labels": labels, "test_keys": keys + 0.1, "test_labels": labels.clone()}, file
    )
    options = [f"--data.path={file}", "--model.encoder.num_features=6", "--trainer.accelerator=cpu"]
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    store = KeyStore(tmp_path / "store")
    compared = Comparer(
        "recipes/keys.yaml", ["faast", "lda"], [2, None], 1, tmp_path, options, store=store, console=quiet
    )
    assert [record.status for record in compared.run()] == ["done"] * 4


def test_help_teaches_without_a_recipe(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("--recipe", "--methods", "--shots", "--data.path=MYFOLDER", "faast_paper", "comparison.html"):
        assert word in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--shots", "0"], "at least 1"),
        (["--shots", "many"], "expected numbers and 'all'"),
        (["--seeds", "0"], "at least 1"),
        (["--methods", "fast"], "is no method"),
        (["stray"], "stray"),
        (["--no.such=1"], "no.such"),
    ],
)
def test_wrong_arguments_are_refused_at_once(capsys, options, args, says, tmp_path):
    try:
        returned = main(["compare", "--recipe", RECIPE, *options, *args, "--out", str(tmp_path)])
    except SystemExit as stopped:
        returned = stopped.code
    assert returned != 0
    assert says in capsys.readouterr().err
