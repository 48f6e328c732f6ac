"""The command line: help without torch, the lookup of files, options and overlays, every verb end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_faast
from lightning_faast.cli import find_config, find_configs, main, shipped_configs, shipped_root
from lightning_faast.lightning_cli import FaastCLI, names_model

HEAVY = ("timm", "datasets", "wandb", "sklearn", "tensorboard")


class Encoder(nn.Module):
    """A frozen encoder that a configuration can name."""

    def __init__(self, width: int = 8, checkpoint_path: str | None = None):
        super().__init__()
        self.num_features = width
        self.checkpoint_path = checkpoint_path
        self.net = nn.Linear(5, width)
        self.requires_grad_(False)

    def forward(self, x):
        return self.net(x).relu()


class Blobs(LightningDataModule):
    """Three classes around three centers; ``path`` stands for a place on disk."""

    def __init__(
        self, path: str = "hub/name", rows: int = 120, val: bool = False, names: str = "abc", test: bool = True
    ):
        super().__init__()
        self.path, self.rows, self.val = path, rows, val
        self.num_classes: int | None = None
        self.class_names = list(names)
        self.has_test = test

    def setup(self, stage):
        self.num_classes = 3

    def _loader(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        centers = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(99))
        labels = torch.arange(rows) % 3
        x = centers[labels] + torch.randn(rows, 5, generator=generator)
        return DataLoader(TensorDataset(x, labels), batch_size=32)

    def train_dataloader(self):
        return self._loader(self.rows, 0)

    def val_dataloader(self):
        return self._loader(103, 1) if self.val else []

    def test_dataloader(self):
        return self._loader(103, 2)

    predict_dataloader = test_dataloader


class Witness(Callback):
    """A recipe's own callback: notes the callbacks of the fit it was in."""

    seen: tuple[str, ...] = ()

    def on_fit_start(self, trainer, pl_module):
        Witness.seen = tuple(type(callback).__name__ for callback in trainer.callbacks)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with the stand-ins above, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    content = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
        "model": {"encoder": {"class_path": f"{__name__}.Encoder", "init_args": {"width": 8}}},
        "data": {"class_path": f"{__name__}.Blobs", "init_args": {"path": "hub/name", "rows": 120}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    return "recipe.yaml"


def parsed(capsys, *args):
    """The configuration after all files and options, as --print_config gives it."""
    with pytest.raises(SystemExit) as stopped:
        FaastCLI([*args, "--print_config"])
    assert stopped.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, *args):
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the door


def test_help_teaches_without_importing_torch():
    script = (
        "import sys; from lightning_faast.cli import main; code = main(['--help']);"
        "found = {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules); sys.exit(str(found or '') or code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for word in ("fit", "validate", "test", "predict", *shipped_configs("recipes"), *shipped_configs("configs")):
        assert word in result.stdout
    assert result.stdout.count("python -m lightning_faast ") >= 5  # usage, three examples, where the options are


@pytest.mark.parametrize("args", [["--help"], ["-h"], []])
def test_python_m_prints_the_help(args):
    command = [sys.executable, "-X", "importtime", "-m", "lightning_faast", *args]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: python -m lightning_faast VERB" in result.stdout
    assert "torch" not in result.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-faast {lightning_faast.__version__}\n"


def test_unknown_verb_names_the_verbs(capsys):
    assert main(["train"]) == 2
    assert "'train' is not a verb; expected one of fit, validate, test, predict" in capsys.readouterr().err


def test_help_of_a_verb_does_not_import_what_it_does_not_need():
    script = (
        "import sys; from lightning_faast.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit as stopped: code = stopped.code\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(code or (str(found) if found else 0))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
    for option in ("--config", "--method", "--model.encoder", "--data", "--trainer.max_epochs"):
        assert option in result.stdout


# -------------------------------------------------------------------------------------------------------- the lookup


def test_shipped_files_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/quickstart.yaml", "./recipes/quickstart.yaml", "configs/methods/faast.yaml"):
        found = Path(find_config(name))
        assert found.is_file()
        assert found.is_relative_to(shipped_root())


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("recipes/quickstart.yaml")
    own.parent.mkdir()
    own.write_text("seed_everything: 3\n")
    assert find_config("recipes/quickstart.yaml") == "recipes/quickstart.yaml"


def test_unknown_file_lists_the_shipped_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, "fit", "--config", "recipes/vit_cifra.yaml")
    assert f"--config recipes/vit_cifra.yaml: no such file in {tmp_path}" in message
    assert "recipes/vit_cifar.yaml" in message
    with pytest.raises(FileNotFoundError):
        find_config("pyproject.toml")  # beside the recipes in a checkout, and not one of them


def test_every_way_to_write_config_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(shipped_root() / "recipes/quickstart.yaml")
    name = "recipes/quickstart.yaml"
    assert find_configs(["fit", "--config", name, f"--config={name}", "-c", name, "--data.path", name]) == [
        "fit", "--config", shipped, f"--config={shipped}", "-c", shipped, "--data.path", name,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['{"seed_everything": 3}', "seed_everything: 3", "https://example.org/recipe.yaml"])
def test_text_and_urls_are_left_alone(text):
    assert find_config(text) == text


# ------------------------------------------------------------------------------------------- options and overlays


def test_options_in_short_form_reach_nested_arguments(capsys, recipe):
    config = parsed(capsys, "fit", "--config", recipe, "--data.path=DIR", "--model.encoder.checkpoint_path=FILE")
    assert config["data"]["init_args"] == {"path": "DIR", "rows": 120, "val": False, "names": "abc", "test": True}
    assert config["model"]["encoder"]["init_args"] == {"width": 8, "checkpoint_path": "FILE"}


def test_later_files_win_and_options_win_over_files(capsys, recipe):
    Path("first.yaml").write_text("{data: {init_args: {rows: 7}}, trainer: {max_epochs: 7, log_every_n_steps: 7}}")
    Path("second.yaml").write_text("{data: {init_args: {rows: 8}}, trainer: {max_epochs: 8}}")
    files = ["--config", recipe, "--config", "first.yaml", "--config", "second.yaml"]
    config = parsed(capsys, "fit", *files, "--trainer.max_epochs=9")
    assert config["data"]["init_args"]["rows"] == 8
    assert config["trainer"]["max_epochs"] == 9
    assert config["trainer"]["log_every_n_steps"] == 7


def test_method_overlays_replace_one_another(capsys, recipe):
    paper = ["--config", recipe, "--config", "configs/methods/faast_paper.yaml"]
    head = parsed(capsys, "fit", *paper)["model"]["head"]
    assert head["init_args"]["regularization"]["class_path"].endswith("PaperRule")
    Path("probe.yaml").write_text("{method: null, model: {head: {class_path: torch.nn.Linear}}}")
    config = parsed(capsys, "fit", *paper, "--config", "probe.yaml")
    assert config["method"] is None
    assert config["model"]["head"]["class_path"] == "torch.nn.Linear"


def test_method_is_faast_where_nothing_is_said(capsys, recipe):
    config = parsed(capsys, "fit", "--config", recipe)
    assert config["method"]["class_path"].endswith(".FaastCallback")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.rws=3", "rws"),
        ("--model.encoder.wdth=3", "wdth"),
        ("--trainer.max_epoch=3", "max_epoch"),
        ("--metod=null", "metod"),
        ("--data.rows=many", "many"),
    ],
)
def test_wrong_options_end_in_a_short_message_that_names_them(capsys, recipe, option, message):
    error = refused(capsys, "fit", "--config", recipe, option)
    assert message in error
    assert len(error.splitlines()) < 15


class Own(LightningModule):
    """A module that is no FaastModule, with a parameter that it trains."""

    headline = "loss"

    def __init__(self, width: int = 5):
        super().__init__()
        self.net = nn.Linear(width, 3)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch):
        self.log("test/loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--config", "own.yaml"], True),
        (["--config=own.yaml"], True),
        (["--config", "recipe.yaml", "--config", "own.yaml"], True),
        (["--config", "recipe.yaml"], False),
        (["--config", "{model: {class_path: a.B}}"], True),
        (["--config", "recipe.yaml", "--model.class_path=a.B"], True),
        (["--config", "none.yaml"], False),
        (["--config", "{model: [}"], False),
        ([], False),
    ],
)
def test_who_says_which_module_is_the_model(recipe, args, named):
    Path("own.yaml").write_text(f"model: {{class_path: {__name__}.Own}}")
    assert names_model(["fit", *args]) == named


def test_model_class_path_makes_any_module_the_model(capsys, recipe):
    content = yaml.safe_load(Path(recipe).read_text())
    content["model"] = {"class_path": f"{__name__}.Own", "init_args": {"width": 5}}
    Path("own.yaml").write_text(yaml.safe_dump(content))
    cli = FaastCLI(["fit", "--config", "own.yaml", "--model.width=5"])  # FaastCallback solves its linear layer
    assert isinstance(cli.model, Own)
    name, loss = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert (name, float(loss)) == (
        "test/loss",
        pytest.approx(float(cli.trainer.callback_metrics["test/loss"]), abs=1e-3),
    )
    FaastCLI(["fit", "--config", "logs/version_0/config.yaml"])  # the saved configuration is a recipe itself


def test_what_a_recipe_must_have(capsys):
    assert "model.encoder, fit.data" in refused(capsys, "fit", "--config", '{"seed_everything": 3}')


# ---------------------------------------------------------------------------------------------------------- the verbs


def test_fit_ends_in_the_test_split_and_leaves_a_checkpoint_and_its_configuration(capsys, recipe):
    assert main(["fit", "--config", recipe]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    name, accuracy = lines[-1].split()
    assert name == "test/accuracy"
    assert float(accuracy) > 0.8
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    assert f"checkpoint {checkpoint}" in [line.replace(f"{Path.cwd()}/", "") for line in lines]

    saved = "logs/version_0/config.yaml"
    for verb in ("test", "fit"):  # the saved configuration is a recipe itself
        capsys.readouterr()
        FaastCLI([verb, "--config", saved, *(["--ckpt_path", str(checkpoint)] if verb == "test" else [])])
        assert capsys.readouterr().out.strip().splitlines()[-1] == f"test/accuracy {accuracy}"


def test_fit_with_a_validation_split_never_opens_the_test_split(capsys, recipe, monkeypatch):
    monkeypatch.setattr(Blobs, "test_dataloader", lambda self: pytest.fail("the test split was opened"))
    cli = FaastCLI(["fit", "--config", recipe, "--data.val=true"])
    accuracy = cli.trainer.callback_metrics["val/accuracy"]
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"val/accuracy {accuracy:.3f}"
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    again = FaastCLI(["validate", "--config", recipe, "--data.val=true", f"--ckpt_path={checkpoint}"])
    assert again.trainer.callback_metrics["val/accuracy"] == accuracy


def test_options_win_over_the_checkpoint(recipe):
    FaastCLI(["fit", "--config", recipe])
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    cli = FaastCLI(["test", "--config", recipe, f"--ckpt_path={checkpoint}", "--model.encoder.checkpoint_path=OTHER"])
    assert cli.model.encoder.checkpoint_path == "OTHER"


def test_a_checkpoint_of_other_classes_is_refused(capsys, recipe):
    main(["fit", "--config", recipe])
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    assert main(["test", "--config", recipe, f"--ckpt_path={checkpoint}", "--data.names=acb"]) == 1
    assert "class 1 was 'b' and is 'c' in this data" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_head_that_nothing_solved_is_not_measured(capsys, recipe, verb):
    assert main([verb, "--config", recipe]) == 1
    assert f"error: {verb} needs a solved head: give --ckpt_path=FILE" in capsys.readouterr().err


def test_fit_without_any_evaluation_split_ends_with_the_leave_one_out_accuracy(capsys, recipe):
    assert main(["fit", "--config", recipe, "--data.test=false"]) == 0
    name, accuracy = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert name == "faast/leave_one_out_accuracy"
    assert float(accuracy) > 0.8


def test_errors_of_this_package_end_in_their_message(capsys, recipe, monkeypatch):
    command = ["fit", "--config", recipe, "--method=null"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "\nerror: nothing to optimize" in f"\n{error}"
    assert "Traceback" not in error
    monkeypatch.setenv("LIGHTNING_FAAST_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="nothing to optimize"):
        main(command)
    monkeypatch.delenv("LIGHTNING_FAAST_TRACEBACK")
    with pytest.raises(Exception, match=r"gpu backend|CUDA"):  # Lightning's own errors keep their traceback
        main(["fit", "--config", recipe, "--trainer.accelerator=cuda"])


def test_null_method_trains_a_linear_head_by_backpropagation(recipe):
    options = ["--method=null", "--model.head=torch.nn.Linear", "--model.optimizer=SGD", "--model.optimizer.lr=0.1"]
    cli = FaastCLI(["fit", "--config", recipe, *options, "--trainer.max_epochs=30"])
    assert cli.trainer.global_step == 30 * 4
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert cli.trainer.callback_metrics["test/accuracy"] > 0.8


def test_null_method_with_a_head_that_cannot_be_trained(recipe):
    with pytest.raises(RuntimeError, match="nothing to optimize"):
        FaastCLI(["fit", "--config", recipe, "--method=null"])


@pytest.mark.parametrize("head", ["lightning_faast.FastWeights", "torch.nn.Linear"])
def test_one_pass_solves_the_head_without_an_optimizer(recipe, head):
    cli = FaastCLI(["fit", "--config", recipe, f"--model.head={head}", "--trainer.max_epochs=5"])
    assert cli.trainer.current_epoch == 1
    assert not any(optimizer.param_groups for optimizer in cli.trainer.optimizers)
    assert cli.trainer.callback_metrics["test/accuracy"] > 0.8


def test_a_recipe_keeps_its_own_callbacks_and_only_fit_needs_the_method(recipe):
    callbacks = [f"--trainer.callbacks+={__name__}.Witness"]
    FaastCLI(["fit", "--config", recipe, *callbacks])
    assert Witness.seen.index("Witness") < Witness.seen.index("FaastCallback")
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    cli = FaastCLI(["test", "--config", recipe, *callbacks, f"--ckpt_path={checkpoint}"])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert "Witness" in names
    assert "FaastCallback" not in names


def test_predict_writes_a_file(capsys, recipe):
    FaastCLI(["fit", "--config", recipe])
    (checkpoint,) = Path("logs/version_0/checkpoints").glob("*.ckpt")
    accuracy = capsys.readouterr().out.strip().splitlines()[-1].split()[1]
    FaastCLI(["predict", "--config", recipe, f"--ckpt_path={checkpoint}"])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("predictions of 103 rows")
    with safe_open(line.split()[-1], "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["a", "b", "c"]
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert written["probabilities"].shape == (103, 3)
    right = (written["probabilities"].argmax(-1) == written["label"]).double().mean()
    assert f"{right:.3f}" == accuracy


def test_fast_dev_run_and_no_logger(capsys, recipe):
    assert main(["fit", "--config", recipe, "--trainer.fast_dev_run=true"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("test/accuracy")
    assert main(["fit", "--config", recipe, "--trainer.logger=false", "--trainer.default_root_dir=plain"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("test/accuracy")
    assert not Path("logs").exists()
    assert list(Path("plain/checkpoints").glob("*.ckpt"))


def test_a_seeded_fit_repeats_itself(capsys, recipe):
    first = FaastCLI(["fit", "--config", recipe]).model
    second = FaastCLI(["fit", "--config", recipe]).model
    assert torch.equal(first.encoder.net.weight, second.encoder.net.weight)
    x = torch.randn(4, 5)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert Path("logs/version_1").is_dir()
