"""Methods of a comparison: a recipe with an overlay, resolved and judged before anything runs."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_faast.cli import shipped_configs
from lightning_faast.lightning_cli import FaastCLI, names_model

_METHODS = "configs/methods/"
_LANGUAGE = "language/"
#: Parts of a configuration that do not change what a method answers: places, displays and devices.
_IRRELEVANT = (
    "config",
    "ckpt_path",
    "weights_only",
    "data.init_args.path",
    "data.init_args.root",
    "data.init_args.eval_batch_size",
    "data.init_args.num_workers",
    "data.init_args.pin_memory",
    "data.init_args.persistent_workers",
    "model.encoder",  # its fingerprint stands for it
    "model.init_args.model_name",  # likewise
    "model.init_args.gguf_file",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy",
    "trainer.num_nodes",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_checkpointing",
    "trainer.log_every_n_steps",
)


class _Resolve(FaastCLI):
    """Parses a command line, and neither makes nor runs what it says."""

    def before_instantiate_classes(self) -> None:
        self.verb, self.subcommand = self.subcommand, None

    def instantiate_classes(self) -> None:
        return


def resolve(args: Sequence[str]) -> Namespace:
    """The configuration after all files and options of a ``fit`` command line.

    Args:
        args: What follows ``fit``.

    Raises:
        ValueError: Where the command line is wrong; the message is the parser's.
    """
    logger = logging.getLogger("lightning.fabric.utilities.seed")
    level = logger.level
    logger.setLevel(logging.WARNING)  # nothing runs, so the seed is not worth a line
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            cli = _Resolve(["fit", *args])
    except SystemExit:  # argparse's way of refusing; Lightning's parser does so after printing its usage
        raise ValueError(printed.getvalue().rpartition("error: ")[2].strip()) from None
    finally:
        logger.setLevel(level)
    return cli.config[cli.verb]


def make(kind: Any, config: Any) -> Any:
    """What one part of a resolved configuration describes.

    Args:
        kind: Its type, as the command line has it.
        config: The part.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    return parser.instantiate(Namespace(made=config)).made


@dataclass(frozen=True)
class Method:
    """A method on a recipe.

    Attributes:
        name: As shown.
        overlay: What stands after ``--config``.
        args: What follows ``fit`` on its command line: recipe, overlay, options.
        config: The resolved configuration.
    """

    name: str
    overlay: str
    args: tuple[str, ...]
    config: Namespace

    @property
    def learns_in_one_pass(self) -> bool:
        """Whether keys that were encoded once are all it needs: it learns in one pass, or not at all."""
        method = self.config.get("method")
        if method is None:
            return self.config.trainer.max_epochs == 0
        callback = str(method.class_path).rpartition(".")[2]
        return callback == "FaastCallback" and method.init_args.get("epochs", 1) == 1 and not self.trains_encoder

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder is adapted too, so that its keys change."""
        return self.config.model.get("adapter") is not None

    @property
    def embeds_classes(self) -> bool:
        """Whether values are embeddings of class names."""
        return bool(self.config.model.get("class_embeddings"))

    def make_head(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The head, called as FaastModule calls it: ``(num_features, num_classes)``, maybe with class embeddings."""
        made: nn.Module = make(Callable[[int, int], nn.Module], self.config.model.head)(*args, **kwargs)
        return made

    def identity(self) -> dict[str, Any]:
        """What of the configuration decides the answers; places, displays and devices left out."""
        config = self.config.clone()
        for name in _IRRELEVANT:
            if name in config:
                config.pop(name)
        plain: dict[str, Any] = config.as_dict()
        return plain


def find_method(name: str, recipe: str, options: Sequence[str]) -> Method:
    """A method by the name of its overlay, shipped or the user's own.

    Args:
        name: Such as ``faast``, or the path of a YAML file.
        recipe: What stands after ``--config``.
        options: Further options of ``fit``.

    Raises:
        FileNotFoundError: Where there is no such overlay; the message lists the shipped ones.
        ValueError: Where recipe, overlay and options do not go together.
    """
    overlay = name
    if not name.endswith((".yaml", ".yml")):
        overlay = f"{_METHODS}{name}.yaml"
        if overlay not in shipped_configs("configs") and not Path(overlay).is_file():
            raise FileNotFoundError(
                f"{name!r} is no method; expected a YAML file or some of: {', '.join(shipped_methods())}."
            )
    args = ("--config", recipe, "--config", overlay, *options)
    return Method(shown_name(name), overlay, args, resolve(args))


def shown_name(name: str) -> str:
    """A method's name, or that of a user's file, as reports show it."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def shipped_methods(recipe: str | None = None) -> list[str]:
    """Names of the shipped overlays under ``configs/methods``.

    Args:
        recipe: What stands after ``--config``; with it, only those that are made for its kind of model.
    """
    shipped = shipped_configs("configs")
    names = [name.removeprefix(_METHODS).removesuffix(".yaml") for name in shipped if name.startswith(_METHODS)]
    if recipe is None:
        return names
    text = is_language(recipe)
    return [name for name in names if name.startswith(_LANGUAGE) == text]


def is_language(recipe: str) -> bool:
    """Whether a recipe's model is a language model rather than an encoder with a head."""
    return names_model(["--config", recipe])
