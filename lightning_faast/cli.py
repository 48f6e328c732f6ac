"""The front door of the command line: help, version and the shipped recipes, without importing torch.

The verbs themselves are :class:`~lightning_faast.lightning_cli.FaastCLI`, imported only when one of them runs.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_faast import __version__

if TYPE_CHECKING:
    from lightning_faast.lightning_cli import FaastCLI

__all__ = ["FaastCLI", "main", "shipped_configs"]

_TRACEBACK = "LIGHTNING_FAAST_TRACEBACK"

VERBS = {
    "fit": "solve the head in one pass over the training data, and end with an accuracy",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write the probabilities of a checkpoint to a file",
}

#: Verbs that are no Trainer methods, each with the function of ``evaluation.commands`` that runs it.
COMMANDS = {
    "compare": "run methods side by side on one recipe, and report them on one page",
    "fewshot": "measure methods on n-way k-shot episodes",
    "keys": "list or clear the encoded keys that comparisons keep on disk",
}

_HELP = """\
lightning-faast {version}: adapt a frozen pretrained model in one forward pass.

usage: python -m lightning_faast VERB --config RECIPE [--config OVERLAY ...] [--OPTION=VALUE ...]

verbs:
{verbs}

examples:
  python -m lightning_faast fit --config recipes/quickstart.yaml
  python -m lightning_faast fit --config recipes/vit_cifar.yaml --config configs/methods/faast_paper.yaml \\
      --data.path=DIR --model.encoder.checkpoint_path=FILE
  python -m lightning_faast compare --data.path=MYFOLDER
  python -m lightning_faast test --config logs/version_0/config.yaml --ckpt_path logs/version_0/checkpoints/NAME.ckpt

A --config is looked up in the working directory first and then among the shipped files in
{root}.
Later files and options win over earlier ones.

recipes (data and encoder):
{recipes}

overlays (a method, a logger, a trainer):
{overlays}

All options of a verb: python -m lightning_faast VERB --help
The configuration after all files and options: python -m lightning_faast VERB --config … --print_config
"""


def __getattr__(name: str) -> Any:
    if name == "FaastCLI":
        from lightning_faast.lightning_cli import FaastCLI

        return FaastCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def shipped_root() -> Path:
    """Return the folder that holds ``recipes/`` and ``configs/``: the installed package, or the checkout around it."""
    package = Path(__file__).resolve().parent
    return package if (package / "recipes").is_dir() else package.parent


def shipped_configs(folder: str) -> list[str]:
    """List the shipped YAML files under ``recipes`` or ``configs``, as they are named after ``--config``."""
    root = shipped_root()
    names = (path.relative_to(root).as_posix() for path in (root / folder).rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("configs/sweeps/"))  # W&B reads those, not --config


def find_config(name: str) -> str:
    """Return the path of a configuration file: in the working directory, or else among the shipped ones.

    Args:
        name: What stands after ``--config``. YAML or JSON text and URLs are returned as they are.

    Raises:
        FileNotFoundError: If there is no such file; the message lists the shipped ones.
    """
    if "\n" in name or ": " in name or "://" in name or name.lstrip().startswith("{") or Path(name).exists():
        return name
    relative = Path(name).as_posix()  # drops a leading ./
    if relative in (*shipped_configs("recipes"), *shipped_configs("configs")):
        return str(shipped_root() / relative)
    known = "\n".join(f"  {known}" for known in (*shipped_configs("recipes"), *shipped_configs("configs")))
    raise FileNotFoundError(
        f"--config {name}: no such file in {Path.cwd()}, nor among the shipped recipes and overlays:\n{known}"
    )


def find_configs(args: Sequence[str]) -> list[str]:
    """Apply :func:`find_config` to every ``--config FILE``, ``--config=FILE`` and ``-c FILE`` of a command line."""
    found = []
    for position, arg in enumerate(args):
        if position and args[position - 1] in ("--config", "-c"):
            found.append(find_config(arg))
        elif arg.startswith("--config="):
            found.append("--config=" + find_config(arg.removeprefix("--config=")))
        else:
            found.append(arg)
    return found


def _purpose(config: str) -> str:
    """Return the first comment line of a shipped file."""
    first = (shipped_root() / config).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _help() -> str:
    recipes, overlays = shipped_configs("recipes"), shipped_configs("configs")
    width = max(len(name) for name in (*recipes, *overlays))
    return _HELP.format(
        version=__version__,
        root=shipped_root(),
        verbs="\n".join(f"  {verb:<9} {text}" for verb, text in (*VERBS.items(), *COMMANDS.items())),
        recipes="\n".join(f"  {name:<{width}}  {_purpose(name)}" for name in recipes),
        overlays="\n".join(f"  {name:<{width}}  {_purpose(name)}" for name in overlays),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb of the command line.

    Args:
        args: The arguments after the program's name; those of the process where nothing is given.

    Returns:
        The exit status: 0; 1 after an error of this package, of which only the message is printed (the traceback too
        where the environment variable LIGHTNING_FAAST_TRACEBACK is set); 2 where the verb is unknown. Unknown files
        and wrong options end the process with status 2, as in argparse.

    Example::

        main(["fit", "--config", "recipes/quickstart.yaml"])
    """
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"lightning-faast {__version__}")
        return 0
    if args[0] not in (*VERBS, *COMMANDS):
        verbs = ", ".join((*VERBS, *COMMANDS))
        print(f"error: {args[0]!r} is not a verb; expected one of {verbs} first. See --help.", file=sys.stderr)
        return 2

    try:
        if args[0] in COMMANDS:
            from lightning_faast.evaluation import commands

            return int(getattr(commands, args[0])(args[1:]))
        from lightning_faast.lightning_cli import FaastCLI  # only now: torch and Lightning take seconds to import

        FaastCLI(args)
    except Exception as error:
        if os.environ.get(_TRACEBACK) or not _is_meant_for_the_user(error):
            raise
        print(f"error: {error}\n({_TRACEBACK}=1 shows where.)", file=sys.stderr)
        return 1
    return 0


def _is_meant_for_the_user(error: BaseException) -> bool:
    """Whether the error was raised by this package, whose messages say what to do, and not somewhere below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return Path(__file__).parent in raised_in.parents and not isinstance(error, AssertionError)
