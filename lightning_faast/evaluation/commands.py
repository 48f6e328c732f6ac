"""The verbs of the command line that compare methods."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = "python -m lightning_faast"
_TABLE_WIDTH = 100  # columns that the table needs, also where the output is no terminal

_COMPARE = """\
Run methods side by side on one recipe and report accuracy, time and memory.

A method is an overlay of configs/methods/, or a YAML file of yours. Methods that learn in one pass (fast weights,
memories, class means, logistic regression on keys) share one encoding of the data, which is kept on disk and checked.
Methods that train (linear_probe, lora, full_finetuning) each run in a process of their own, by the command that you
would type, which is printed. A second call runs only what is missing; Ctrl-C leaves what is finished.

On a recipe with a language model every method runs so, shots are tokens learned, and the report is on perplexity.

Whatever stands behind the options of compare is handed to every run, as to fit.
"""

_COMPARE_EXAMPLES = """\
examples:
  # your own folder of CLASS/IMAGE files, a fifth of each class held out to test on
  {program} compare --data.path=MYFOLDER

  # a recipe, some methods, from one example a class to all
  {program} compare --recipe recipes/vit_cifar.yaml --methods faast,knn,logistic_regression,linear_probe \\
      --shots 1,4,16,all --seeds 3 --out comparisons/cifar

  # a language model, from two thousand tokens to thirty thousand
  {program} compare --recipe recipes/wikitext2_smollm2.yaml --methods language/faast,language/lora \\
      --shots 2000,10000,30000 --data.test_tokens=8000

  # another encoder, without a hub
  {program} compare --recipe recipes/vit_cifar.yaml --data.path=DIR --model.encoder.checkpoint_path=FILE

methods:
  {methods}

OUT holds comparison.html (one page, offline), .md, .tex, .csv, runs.csv, figures/ and the records in runs/.
"""


def compare(args: Sequence[str]) -> int:
    """The verb ``compare``: run what is missing, report everything.

    Args:
        args: What follows the verb.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.
    """
    from lightning_faast.evaluation.methods import is_language, shipped_methods, shown_name

    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} compare",
        usage=f"{_PROGRAM} compare [--recipe RECIPE] [--methods A,B] [--shots 1,4] [--out DIR] [--OPTION=VALUE ...]",
        description=_COMPARE,
        epilog=_COMPARE_EXAMPLES.format(program=_PROGRAM, methods=", ".join(shipped_methods())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", default="recipes/images.yaml", help="data and encoder (default: %(default)s, your own images)")
    add(
        "--methods",
        type=_names,
        metavar="A,B",
        help="default: all shipped ones for the recipe's kind of model; what cannot run here is a row that says so",
    )
    add("--reference", help="the method that the others are compared with (default: faast, or language/faast)")
    add("--shots", type=_shots, default=[None], metavar="1,4,all", help="examples a class, or tokens (default: all)")
    add("--seeds", type=int, metavar="N", help="choices of examples for each number (default: 3; 1 for tokens)")
    add("--out", type=Path, metavar="DIR", help="default: comparisons/RECIPE")
    add("--jobs", type=int, default=1, metavar="N", help="training runs at a time (default: %(default)s)")
    add("--wandb", metavar="PROJECT", help="log every method as a run of one group to this W&B project")
    add("--keys", type=Path, metavar="DIR", help="where encoded keys are kept (default: see the verb keys)")
    given, options = parser.parse_known_args(list(args))
    _refuse_stray(parser, options)

    from rich.console import Console

    from lightning_faast.evaluation.compare import Comparer
    from lightning_faast.evaluation.keys import KeyStore
    from lightning_faast.evaluation.report import terminal, write_report

    out = given.out or Path("comparisons") / Path(given.recipe).stem
    text = is_language(given.recipe)
    reference = given.reference or ("language/faast" if text else "faast")
    methods = [reference, *(shipped_methods(given.recipe) if given.methods is None else given.methods)]
    seeds = given.seeds if given.seeds is not None else 1 if text else 3  # tokens are learned in order, the first ones
    comparer = Comparer(given.recipe, methods, given.shots, seeds, out, options, given.jobs, KeyStore(given.keys))
    interrupted = False
    try:
        comparer.run()
    except KeyboardInterrupt:
        interrupted = True
        comparer.console.print("Interrupted. What is finished is kept; the same command runs the rest.")
    command = shlex.join(["python", "-m", "lightning_faast", "compare", *args])
    if not comparer.records():
        return 130
    comparison = comparer.comparison(shown_name(reference), command)
    written = write_report(comparison, out)
    Console(width=max(_TABLE_WIDTH, Console().width)).print(terminal(comparison))
    comparer.console.print(f"{len(written)} files in {out}, of which to look at: {out / 'comparison.html'}")
    if given.wandb and not interrupted:
        from lightning_faast.evaluation.tracking import log_comparison

        log_comparison(comparison, given.wandb, out)
    return 130 if interrupted else 0


_FEWSHOT = """\
Measure methods on n-way k-shot episodes: each draws some classes, a few labelled rows of each (support) and others to
predict (query). All methods see the very same episodes, which a seed fixes. Episodes are drawn from the rows of one
stage, encoded once.
"""

_FEWSHOT_EXAMPLES = """\
example:
  {program} fewshot --recipe recipes/miniimagenet_vit.yaml --methods faast,nearest_class_mean --shots 1,5 \\
      --data.train_split=null --data.test_split=test --data.holdout=null
"""


def fewshot(args: Sequence[str]) -> int:
    """The verb ``fewshot``: evaluate methods on n-way k-shot episodes.

    Args:
        args: What follows the verb.

    Returns:
        The exit status 0.
    """
    from lightning_faast.evaluation.methods import find_method, is_language, resolve

    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} fewshot",
        usage=f"{_PROGRAM} fewshot --recipe RECIPE [--methods A,B] [--ways N] [--shots 1,5] [--OPTION=VALUE ...]",
        description=_FEWSHOT,
        epilog=_FEWSHOT_EXAMPLES.format(program=_PROGRAM),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", required=True, help="data and encoder")
    add(
        "--methods", type=_names, default=["faast", "nearest_class_mean", "knn"], metavar="A,B", help="one-pass methods"
    )
    add("--ways", type=int, default=5, metavar="N", help="classes of an episode; 0 for all (default: %(default)s)")
    add("--shots", type=_shots, default=[1, 5], metavar="1,5", help="support rows a class (default: 1,5)")
    add("--queries", type=int, default=15, metavar="N", help="query rows a class (default: %(default)s)")
    add("--episodes", type=int, default=600, metavar="N", help="for each number of shots (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the episodes (default: %(default)s)")
    add("--stage", choices=["train", "test"], default="test", help="whose rows are drawn (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: fewshot/RECIPE")
    add("--keys", type=Path, metavar="DIR", help="where encoded keys are kept (default: see the verb keys)")
    given, options = parser.parse_known_args(list(args))
    _refuse_stray(parser, options)
    if is_language(given.recipe):
        parser.error(f"--recipe {given.recipe}: episodes are of labelled rows, and its model is a language model.")
    if None in given.shots:
        parser.error("--shots all: an episode has a number of support rows; write numbers, such as 1,5.")

    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from lightning_faast.evaluation.compare import encoded, progress_display
    from lightning_faast.evaluation.fewshot import run
    from lightning_faast.evaluation.frozen import Bench
    from lightning_faast.evaluation.keys import KeyStore

    methods = [find_method(name, given.recipe, options) for name in dict.fromkeys(given.methods)]
    for method in methods:
        if not method.learns_in_one_pass or method.embeds_classes:
            parser.error(f"{method.name} does not learn from keys and labels alone: leave it out of --methods.")
    bench, console = Bench.from_config(resolve(["--config", given.recipe, *options])), Console(stderr=True)
    with progress_display(console) as progress:
        stored = encoded(bench, given.stage, KeyStore(given.keys), progress)
        task = progress.add_task("episodes", total=len(methods) * len(given.shots))
        report = run(
            {method.name: method.make_head for method in methods},
            stored.take(torch.arange(stored.rows)),
            stored.labels,
            ways=given.ways or None,
            shots=given.shots,
            queries=given.queries,
            episodes=given.episodes,
            seed=given.seed,
            advance=lambda method, shots: progress.advance(task),
        )
    out = given.out or Path("fewshot") / Path(given.recipe).stem
    report.save(out)
    Console().print(Markdown(report.markdown()))
    console.print(f"{out}/fewshot.md", markup=False, highlight=False)
    return 0


def keys(args: Sequence[str]) -> int:
    """The verb ``keys``: list or clear the encoded keys on disk.

    Args:
        args: What follows the verb.

    Returns:
        The exit status 0.
    """
    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} keys",
        description="Encoded keys that comparisons keep on disk, found by encoder weights, transform and data; "
        "stale ones never are, and clearing only costs another encoding.",
    )
    parser.add_argument("action", choices=["list", "clear"])
    parser.add_argument("--keys", type=Path, metavar="DIR", help="default: $LIGHTNING_FAAST_CACHE/keys or ~/.cache")
    given = parser.parse_args(list(args))

    from rich.console import Console
    from rich.table import Table

    from lightning_faast.evaluation.keys import KeyStore

    store, console = KeyStore(given.keys), Console()
    if given.action == "clear":
        console.print(f"{store.clear() / 1e6:.1f} MB removed from {store.directory}", highlight=False)
        return 0
    table = Table("file", "stage", "rows", "d", "MB", title=str(store.directory))
    entries = store.entries()
    for entry in entries:
        about = (str(entry.rows), str(entry.width), f"{entry.num_bytes / 1e6:.1f}")
        table.add_row(entry.path.stem, str(entry.description.get("stage", "")), *about)
    console.print(table if entries else f"No keys in {store.directory}.")
    return 0


def _refuse_stray(parser: argparse.ArgumentParser, options: Sequence[str]) -> None:
    """End with the parser's error where what is left over does not start with an option."""
    if options and not options[0].startswith("--"):
        parser.error(f"{options[0]!r} is no option; write --NAME=VALUE.")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shots(text: str) -> list[int | None]:
    try:
        return [None if part == "all" else int(part) for part in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers and 'all', such as 1,4,16,all, got {text!r}") from None
