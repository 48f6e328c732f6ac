"""The verbs of the command line on LightningCLI: fit, validate, test and predict."""

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_faast.associative.files import save_tensors, write_text
from lightning_faast.cli import VERBS, find_configs
from lightning_faast.module import FaastModule

_PROGRAM = "python -m lightning_faast"
_TRAINER_DEFAULTS = {
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs", "name": ""}},
    "max_epochs": 1,
    "num_sanity_val_steps": 0,  # before the pass there is no head worth checking
}
# Lightning warns of these in every fit of a frozen encoder in one pass, where they are meant.
_EXPECTED_IN_ONE_PASS = (
    r"Found \d+ module\(s\) in eval mode at the start of training",
    r"The number of training batches .* is smaller than the logging interval",
    r"Total length of `list` across ranks is zero",  # no validation split
)
# ... and of this where nothing learns (max_epochs=0), as in zero-shot.
_EXPECTED_WITHOUT_LEARNING = r"`LightningModule.configure_optimizers` returned `None`"
# ... and of these when a checkpoint is only evaluated, in a run of its own and without the method that wrote it.
_EXPECTED_OF_A_CHECKPOINT = (r"Be aware that when using `ckpt_path`", r"The dirpath has changed from")
# Lightning 2.6 calls what torch 2.14 deprecates, once in every stage.
warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")


def names_model(args: Sequence[str]) -> bool:
    """Whether a command line says of which class the model is, by ``model.class_path`` in a file or as an option."""
    if any(arg.startswith(("--model=", "--model.class_path")) or arg == "--model" for arg in args):
        return True
    try:
        found = find_configs(args)
    except FileNotFoundError:
        return False  # said where the command line is parsed
    configs = [arg for before, arg in zip(["", *found], found, strict=False) if before in ("--config", "-c")]
    configs += [arg.removeprefix("--config=") for arg in found if arg.startswith("--config=")]
    return any("class_path" in _model_of(config) for config in configs)


def _model_of(config: str) -> Mapping[str, Any]:
    """The part ``model`` of a configuration, a file or text; empty where there is none, or nothing that can be read."""
    try:
        text = Path(config).read_text(encoding="utf-8")
    except OSError:
        text = config
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # said where the command line is parsed
    model = content.get("model") if isinstance(content, Mapping) else None
    return model if isinstance(model, Mapping) else {}


def run_directory(logger: Logger) -> str:
    """Return the folder of this run, in which ModelCheckpoint makes ``checkpoints/``."""
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return str(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or ".", str(logger.name), version)


class SaveRunConfig(SaveConfigCallback):
    """Keep the configuration with the run, once, whatever the logger.

    Every logger's run gets ``config.yaml`` beside its checkpoints; ``--config`` reads it back. Loggers with a server of
    their own (W&B) also get the configuration as the run's config. Lightning's own callback writes to
    ``trainer.log_dir``, which is one and the same folder for all W&B runs, and refuses the second.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration; called on rank zero only."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger | TensorBoardLogger):
                logger.log_hyperparams(yaml.safe_load(text))  # W&B: config.update(…, allow_val_change=True)
            directory = run_directory(logger)
            write_text(os.path.join(directory, self.config_filename), text)


class FaastCLI(LightningCLI):
    """LightningCLI with a ``FaastModule``, any datamodule, and a method.

    Where a configuration names another LightningModule as ``model.class_path``, that is the model.

    ``method`` is a callback or null, ``FaastCallback`` where nothing is said. ``fit`` appends it to the trainer's own
    callbacks; the other verbs do not need it. With null the module trains by backpropagation.

    ``fit`` ends with an accuracy, or what the module says in ``headline``: that of the validation split, or of the test
    split where the data have none, or the leave-one-out estimate where they have neither.

    Args:
        args: The command line, from the verb on; that of the process where nothing is given.

    Example::

        cli = FaastCLI(["fit", "--config", "recipes/quickstart.yaml"])
        cli.trainer.callback_metrics["test/accuracy"]
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        other_model = names_model(sys.argv[1:] if args is None else list(args))
        super().__init__(
            LightningModule if other_model else FaastModule,
            LightningDataModule,
            subclass_mode_model=other_model,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=_TRAINER_DEFAULTS,
            seed_everything_default=0,
            # the module builds its optimizer itself: LightningCLI's would miss a head that is built in setup
            auto_configure_optimizers=False,
            # the module keeps no hyper-parameters: those of a checkpoint would overrule what the user typed
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": _PROGRAM,
                "allow_abbrev": False,
                **{
                    verb: {
                        "allow_abbrev": False,
                        "description": text[0].upper() + text[1:] + ".",
                        # the generated usage has sixty lines and would bury the error below it
                        "usage": f"{_PROGRAM} {verb} --config RECIPE [--config OVERLAY ...] [--OPTION=VALUE ...]",
                    }
                    for verb, text in VERBS.items()
                },
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verbs, each with the arguments of its Trainer method that are not options."""
        subcommands = LightningCLI.subcommands()
        subcommands["predict"].add("return_predictions")  # they are always written to a file
        return subcommands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--method``."""
        parser.add_argument(
            "--method",
            type=Callback | None,
            default={"class_path": "lightning_faast.callback.FaastCallback"},
            help="What fits the module in fit: a callback, or null for backpropagation.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, with configuration files looked up among the shipped ones too."""
        try:
            found = find_configs(sys.argv[1:] if args is None else list(args))
        except FileNotFoundError as error:
            parser.error(str(error))
        # not super(): it warns whenever args are given and the process has some of its own
        self.config = parser.parse_args(found)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; in ``fit`` with the method behind the recipe's own callbacks."""
        options = self.config_init[self.subcommand]
        if self.subcommand == "fit" and options.method is not None:
            callbacks = options.trainer.callbacks or []
            kwargs["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), options.method]
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Run ``Trainer.fit``, without Lightning's warnings of what a fit in one pass does on purpose."""
        options = self.config_init[self.subcommand]
        with warnings.catch_warnings():
            if options.trainer.max_epochs == 0:
                warnings.filterwarnings("ignore", _EXPECTED_WITHOUT_LEARNING)
            if options.method is not None:
                for message in _EXPECTED_IN_ONE_PASS:
                    warnings.filterwarnings("ignore", message)
            self.trainer.fit(model, **kwargs)

    def _before_evaluation(self) -> None:
        """Refuse to measure a head that nothing has solved or trained; leave out what Lightning says of our own file.

        Raises:
            ValueError: Without a checkpoint.
        """
        if self.config_init[self.subcommand].ckpt_path is None:
            raise ValueError(
                f"{self.subcommand} needs a solved head: give --ckpt_path=FILE, a checkpoint that fit wrote "
                "(logs/version_N/checkpoints/NAME.ckpt)."
            )
        for message in _EXPECTED_OF_A_CHECKPOINT:
            warnings.filterwarnings("ignore", message)

    before_validate = before_test = before_predict = _before_evaluation

    def after_fit(self) -> None:
        """End with the headline: of the test split where nothing was validated, or leave-one-out without either."""
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            self._say(f"checkpoint {checkpoint.best_model_path}")  # before the test, which may fail
        has_test = getattr(self.datamodule, "has_test", True)
        if f"val/{self._headline}" not in self.trainer.callback_metrics and has_test:
            self.trainer.test(self.model, datamodule=self.datamodule)
        self._say_headline()

    def after_validate(self) -> None:
        """Print the headline."""
        self._say_headline()

    def after_test(self) -> None:
        """Print the headline."""
        self._say_headline()

    def predict(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Write labels [N] and probabilities [N, c], or what else the module predicts, to the run's folder.

        The file is ``predictions.safetensors``. The class names stand in the file's metadata, as a JSON list.

        Raises:
            RuntimeError: If several processes run, each of which would have a part of the rows.
        """
        if self.trainer.world_size > 1:
            raise RuntimeError(
                f"predict runs in {self.trainer.world_size} processes and writes one file; add --trainer.devices=1 "
                "--trainer.num_nodes=1."
            )
        batches: Any = self.trainer.predict(model, datamodule=datamodule, return_predictions=True, **kwargs)
        rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        class_names = json.dumps(list(getattr(datamodule, "class_names", None) or []))
        directory = run_directory(self.trainer.logger) if self.trainer.logger else self.trainer.default_root_dir
        path = save_tensors(rows, os.path.join(directory, "predictions.safetensors"), {"class_names": class_names})
        self._say(f"predictions of {len(rows['label'])} rows ({', '.join(rows)}) in {path}")

    @property
    def _headline(self) -> str:
        return getattr(self.model, "headline", "accuracy")

    def _say_headline(self) -> None:
        measured = self.trainer.callback_metrics
        names: list[str] = [name for stage in ("val", "test") if (name := f"{stage}/{self._headline}") in measured]
        if not names and "faast/leave_one_out_accuracy" in measured:
            names.append("faast/leave_one_out_accuracy")
        for name in names:
            self._say(f"{name} {measured[name]:.3f}")

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(line, flush=True)
