"""Every file in configs/sweeps/: W&B accepts it, and every combination is a command line that fit takes and runs."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from lightning_faast.cli import main
from lightning_faast.encoders import VisionEncoder
from lightning_faast.evaluation.methods import resolve
from tests.wandb_files import read_run

ROOT = Path(__file__).parent.parent
SWEEPS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/sweeps").glob("*.yaml"))}

TINY = [
    "--model.encoder.model_name=test_vit",
    "--model.encoder.pretrained=false",
    "--model.encoder.image_size=32",
    "--data.limit_per_class=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def combinations(sweep):
    """What a grid search suggests: each value of each parameter with each of the others."""
    values = {name: given.get("values", [given.get("value")]) for name, given in sweep["parameters"].items()}
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def command(sweep, chosen):
    """The command of a combination, by the macros that W&B documents."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": ["python"],
        "${program}": [sweep["program"]],
        "${args}": [f"--{name}={value}" for name, value in chosen.items()],
    }
    return [part for given in sweep["command"] for part in macros.get(given, [given])]


def args_of_fit(sweep, chosen):
    """What stands behind ``python -m lightning_faast fit``."""
    program, verb = ["/usr/bin/env", "python", "-m", "lightning_faast"], "fit"
    found = command(sweep, chosen)
    assert found[:5] == [*program, verb]
    return found[5:]


ALL = [
    pytest.param(name, chosen, id=f"{name}-{i}")
    for name in SWEEPS
    for i, chosen in enumerate(combinations(SWEEPS[name]))
]


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """An image folder of two colors."""
    root = tmp_path_factory.mktemp("colors")
    for split, images in (("train", 8), ("test", 4)):
        for name, channel in (("blue", 2), ("red", 0)):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = np.full((32, 32, 3), number, np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty working directory, where the package is found and W&B needs no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    yield tmp_path
    wandb = pytest.importorskip("wandb")
    wandb.finish()
    wandb.teardown()  # its process keeps the working directory in which it was started


# ------------------------------------------------------------------------- what W&B accepts


def test_there_are_sweeps():
    assert set(SWEEPS) == {"methods", "shots", "encoders", "regularization"}


@pytest.mark.parametrize("name", SWEEPS)
def test_file_says_what_it_compares_and_how_it_is_started(name):
    path = f"configs/sweeps/{name}.yaml"
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0].startswith("# Sweep: ")
    assert lines[0].endswith(".")
    assert lines[1] == f"#   wandb sweep {path}"
    assert lines[2] == f"#   wandb agent ENTITY/{SWEEPS[name]['project']}/SWEEP"


@pytest.mark.parametrize("name", SWEEPS)
def test_runs_go_to_the_project_of_the_logger(name):
    logger = yaml.safe_load((ROOT / "configs/logger/wandb.yaml").read_text())["trainer"]["logger"]
    assert SWEEPS[name]["project"] == logger["init_args"]["project"]
    assert "--config=configs/logger/wandb.yaml" in SWEEPS[name]["command"]


@pytest.mark.parametrize("name", SWEEPS)
def test_values_are_texts_and_numbers(name):
    # The agent writes others as Python does: null would become None, which no option takes.
    for given in SWEEPS[name]["parameters"].values():
        assert len(given) == 1
        assert {type(value) for value in given.get("values", [given.get("value")])} <= {str, int, float}


@pytest.mark.parametrize("name", SWEEPS)
def test_schema_of_wandb(name):
    schema = pytest.importorskip("sweeps.config", reason="needs W&B's search engine: pip install 'wandb[sweeps]'")
    assert schema.schema_violations_from_proposed_config(SWEEPS[name]) == []


@pytest.mark.parametrize("name", SWEEPS)
def test_grid_search_of_wandb(name):
    sweeps = pytest.importorskip("sweeps", reason="needs W&B's search engine: pip install 'wandb[sweeps]'")
    expected = [sorted(chosen.items()) for chosen in combinations(SWEEPS[name])]
    runs = sweeps.next_runs(SWEEPS[name], [], n=len(expected) + 1)
    suggested = [sorted((key, given["value"]) for key, given in run.config.items()) for run in runs if run is not None]
    assert sorted(suggested) == sorted(expected)


@pytest.mark.parametrize("name", SWEEPS)
def test_arguments_are_those_of_the_agent(name):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    for chosen in combinations(SWEEPS[name]):
        args = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
        assert command(SWEEPS[name], chosen)[-len(chosen) :] == args["args"]


# ------------------------------------------------------------------------- what fit accepts


@pytest.mark.parametrize(("name", "chosen"), ALL)
def test_combination_parses(name, chosen):
    config = resolve(args_of_fit(SWEEPS[name], chosen))
    assert config.trainer.logger.class_path == "lightning.pytorch.loggers.WandbLogger"
    for option, value in chosen.items():
        if option == "config":
            continue
        part, *names = option.split(".")
        found = config[part]
        for key in names:
            found = found[key] if key in found else found.init_args[key]
        if option == "model.head.regularization":
            given = yaml.safe_load(value)
            assert found.class_path == f"lightning_faast.associative.{given['class_path']}"
            assert {key: found.init_args[key] for key in given.get("init_args", {})} == given.get("init_args", {})
        else:
            assert found == value


@pytest.mark.parametrize("name", SWEEPS)
def test_order_of_the_arguments_changes_nothing(name):
    chosen = combinations(SWEEPS[name])[-1]  # W&B promises no order
    in_reverse = dict(reversed(chosen.items()))
    assert resolve(args_of_fit(SWEEPS[name], in_reverse)) == resolve(args_of_fit(SWEEPS[name], chosen))


def test_methods_are_those_that_need_no_text():
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/methods").glob("*.yaml")}
    swept = SWEEPS["methods"]["parameters"]["config"]["values"]
    assert shipped - set(swept) <= {"configs/methods/zero_shot.yaml"}
    assert len(set(swept)) == len(swept)


@pytest.mark.parametrize(
    "chosen", combinations(SWEEPS["encoders"]), ids=lambda chosen: "-".join(map(str, chosen.values()))
)
def test_encoder_can_be_built_and_has_weights(chosen):
    name, size = chosen["model.encoder.model_name"], chosen["model.encoder.image_size"]
    with torch.device("meta"):
        encoder = VisionEncoder(name, pretrained=False, image_size=size)
        assert encoder(torch.zeros(2, 3, size, size)).shape == (2, encoder.num_features)
    assert encoder.data_config["input_size"] == (3, size, size)
    assert timm.get_pretrained_cfg(name).has_weights


# ------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_combination_runs_and_logs_what_the_sweep_looks_at(offline, colors, name, place):
    wandb = pytest.importorskip("wandb")
    args = args_of_fit(SWEEPS[name], combinations(SWEEPS[name])[place])
    assert main(["fit", *args, f"--data.path={colors}", *TINY, "--trainer.max_epochs=1"]) == 0
    wandb.finish()
    (file,) = offline.glob("logs/wandb/offline-run-*/run-*.wandb")
    run, metric = read_run(file), SWEEPS[name]["metric"]["name"]
    assert 0 <= run.summary[metric] <= 1
    assert [row[metric] for row in run.history if metric in row] == [run.summary[metric]]


def test_the_agent_of_wandb_runs_a_combination(offline, colors, monkeypatch):
    """Everything that ``wandb agent`` does but for asking the server which combination is next."""
    agents = pytest.importorskip("wandb.wandb_agent")
    sweep, chosen = SWEEPS["regularization"], combinations(SWEEPS["regularization"])[-1]
    for name, value in (("DIR", str(offline)), ("SWEEP_ID", "sweep"), ("RUN_ID", ""), ("SWEEP_PARAM_PATH", "")):
        monkeypatch.setenv(f"WANDB_{name}", value)  # the agent sets the last two
    agent = agents.Agent(api=None, queue=None)
    agent._sweep_command = [*sweep["command"], f"--data.path={colors}", *TINY]
    args = {key: {"value": value} for key, value in chosen.items()}
    agent._command_run({"run_id": "chosen", "program": sweep["program"], "args": args})
    assert agent._run_processes["chosen"].wait() == 0

    (file,) = offline.glob("**/run-chosen.wandb")
    run = read_run(file)
    assert run.config["model.head.regularization"] == chosen["model.head.regularization"]
    assert run.config["model"]["head"]["init_args"]["regularization"]["init_args"]["alpha"] == 1.2
    assert sweep["metric"]["name"] in run.summary
