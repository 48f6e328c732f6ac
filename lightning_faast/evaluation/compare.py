"""Run every method on one recipe, at several numbers of shots and seeds; only what has not been run before."""

from __future__ import annotations

import pkgutil
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_faast import __version__
from lightning_faast.evaluation.formats import shots_title
from lightning_faast.evaluation.frozen import Bench, FrozenRun
from lightning_faast.evaluation.keys import Keys, KeyStore, digest_of
from lightning_faast.evaluation.methods import Method, find_method, is_language, resolve, shown_name
from lightning_faast.evaluation.records import Record, load_record, load_rows, save_record
from lightning_faast.evaluation.summary import Comparison
from lightning_faast.evaluation.text import TextBench

_COMMAND = ("python", "-m", "lightning_faast", "fit")
_VERSIONS = ("torch", "lightning", "timm")
_MEMORY_OF_AN_ERROR = 4000  # last characters of a log that are read


@dataclass(frozen=True)
class Run:
    """A method at a number of shots, with a seed.

    Attributes:
        method: The method.
        shots: Examples a class, or tokens learned; None for all.
        seed: Of the choice of examples and of training.
        path: Where its record is, or will be.
    """

    method: Method
    shots: int | None
    seed: int
    path: Path

    @property
    def args(self) -> list[str]:
        """What follows ``fit``."""
        limit = "null" if self.shots is None else self.shots
        option, _ = meaning_of_shots(self.method.config)
        chosen = [f"--data.{option}={limit}", f"--data.seed={self.seed}", f"--seed_everything={self.seed}"]
        return [*self.method.args, *chosen]

    @property
    def command(self) -> str:
        """What a user would type for this very run."""
        return shlex.join([*_COMMAND, *self.args])

    @property
    def label(self) -> str:
        """As shown while it runs."""
        _, unit = meaning_of_shots(self.method.config)
        return f"{self.method.name}, {shots_title(self.shots, unit)}, seed {self.seed}"

    def nothing(self, status: str, reason: str) -> Record:
        """The record of a run that has no result."""
        _, unit = meaning_of_shots(self.method.config)
        about = {"reason": reason, "command": self.command, "unit": unit}
        return Record(self.method.name, self.shots, self.seed, status, **about)  # type: ignore[arg-type]


class Comparer:
    """Runs what is missing of a comparison.

    Methods that learn in one pass share one process and one encoding of the data; each method that trains runs in a
    process of its own, by the very command that a user would type. So does every method on a language model.

    Args:
        recipe: What stands after ``--config``.
        methods: Names of overlays, or YAML files.
        shots: Numbers of examples a class, or of tokens learned; None for all.
        seeds: Seeds 0, 1, … of the choice of examples. All examples are taken once, with seed 0.
        directory: Where records go, in ``runs/``, and logs of training runs, in ``logs/``.
        options: Further options of ``fit``, such as ``--data.path=DIR``.
        jobs: Training runs at a time.
        store: Where keys are kept.
        console: Where progress is shown.

    Attributes:
        runs: All that belong to the comparison, whether there is a record or not.

    Raises:
        FileNotFoundError: For an unknown method.
        ValueError: For numbers that cannot be, or a recipe that does not fit its options.
    """

    def __init__(
        self,
        recipe: str,
        methods: Sequence[str],
        shots: Sequence[int | None],
        seeds: int,
        directory: Path,
        options: Sequence[str] = (),
        jobs: int = 1,
        store: KeyStore | None = None,
        console: Console | None = None,
    ) -> None:
        if seeds < 1 or jobs < 1:
            raise ValueError(f"seeds and jobs must be at least 1, got {seeds} and {jobs}.")
        for number in shots:
            if number is not None and number < 1:
                raise ValueError(f"shots must be at least 1, or all, got {number}.")
        self.recipe = recipe
        self.directory = directory
        self.jobs = jobs
        self.store = store or KeyStore()
        self.console = console or Console(stderr=True)
        self.options = tuple(options)
        config = resolve(["--config", recipe, *options])
        self.bench: Bench | TextBench
        self.bench = TextBench.from_config(config) if is_language(recipe) else Bench.from_config(config)
        _, self.unit = meaning_of_shots(config)
        keys = self.bench.identity
        cells = [(number, seed) for number in dict.fromkeys(shots) for seed in range(1 if number is None else seeds)]
        self.runs: list[Run] = []
        self._impossible: list[Record] = []
        for name in dict.fromkeys(methods):
            try:
                method = find_method(name, recipe, options)
            except ValueError as error:
                refused = [
                    Record(shown_name(name), *cell, "refused", reason=str(error), unit=self.unit) for cell in cells
                ]
                self._impossible += refused
            else:
                self.runs += [self._run(method, *cell, keys) for cell in cells]

    def _run(self, method: Method, shots: int | None, seed: int, keys: str) -> Run:
        determines = {
            "version": __version__,
            "config": method.identity(),
            "shots": shots,
            "seed": seed,
            "keys": keys,
        }
        return Run(method, shots, seed, self.directory / "runs" / f"{digest_of(determines)}.json")

    # ------------------------------------------------------------------ running

    def missing(self) -> list[Run]:
        """Runs without a result: not run yet, or failed. A refusal is a result."""
        return [run for run in self.runs if not run.path.is_file() or load_record(run.path).status == "failed"]

    def run(self) -> list[Record]:
        """Run what is missing.

        Returns:
            The records of all runs, in order.

        Raises:
            KeyboardInterrupt: What was finished stays.
        """
        missing = self.missing()
        shares = isinstance(self.bench, Bench)
        frozen = [run for run in missing if shares and run.method.learns_in_one_pass]
        training = [run for run in missing if run not in frozen]
        what = f"{len(frozen)} share one encoding, {len(training)} train" if shares else f"{len(training)} run by fit"
        self.console.print(f"{len(self.runs)} runs: {len(self.runs) - len(missing)} are there, {what}.")
        with progress_display(self.console) as progress:
            if frozen:
                self._run_frozen(frozen, progress)
            if training:
                self._run_training(training, progress)
        return self.records()

    def records(self) -> list[Record]:
        """All that there are by now."""
        return [load_record(run.path) for run in self.runs if run.path.is_file()] + self._impossible

    def comparison(self, reference: str, command: str) -> Comparison:
        """Everything that there is by now, ready to be reported.

        Args:
            reference: The method that the others are compared with.
            command: What made it, as typed in a shell.
        """
        about = {
            "title": Path(self.recipe).stem,
            "recipe": self.recipe,
            **self.bench.summary,
            "options": shlex.join(self.options),
            "device": self.bench.device_name,
            "versions": ", ".join(
                [f"lightning-faast {__version__}", *(f"{name} {version(name)}" for name in _VERSIONS)]
            ),
            "date": date.today().isoformat(),
            "command": command,
        }
        rows = [load_rows(run.path) for run in self.runs if run.path.is_file()] + [None] * len(self._impossible)
        return Comparison(tuple(self.records()), tuple(rows), reference, about)

    def _run_frozen(self, runs: Sequence[Run], progress: Progress) -> None:
        assert isinstance(self.bench, Bench)
        train, test = (encoded(self.bench, stage, self.store, progress) for stage in ("train", "test"))
        task = progress.add_task("methods on stored keys", total=len(runs))
        for run in runs:
            progress.update(task, description=run.label)
            try:
                record, rows = FrozenRun(run.method, run.shots, run.seed, self.bench, train, test).measure()
                save_record(replace(record, command=run.command), rows, run.path)
            except Exception as error:
                save_record(run.nothing(*_judge(error)), None, run.path)
            progress.advance(task)
        progress.update(task, description="methods on stored keys")

    def _run_training(self, runs: Sequence[Run], progress: Progress) -> None:
        task = progress.add_task("methods, each by fit", total=len(runs))
        waiting = list(runs)
        running: dict[Future[None], Run] = {}
        with ThreadPoolExecutor(self.jobs) as pool, _Processes() as processes:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    run = waiting.pop(0)
                    self.console.print(f"$ {run.command}", markup=False, highlight=False, soft_wrap=True)
                    running[pool.submit(self._train, run, processes)] = run
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    del running[future]
                    progress.advance(task)

    def _train(self, run: Run, processes: _Processes) -> None:
        """Run one command, and see to it that there is a record at the end."""
        log = self.directory / "logs" / f"{run.path.stem}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        run.path.unlink(missing_ok=True)
        recorder = "lightning_faast.evaluation.recording.RecordRun"
        about = {"path": run.path, "method": run.method.name, "seed": run.seed}
        if run.shots is not None:
            about["shots"] = run.shots
        quiet = [
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
        ]
        recording = [f"--trainer.callbacks+={recorder}", *(f"--trainer.callbacks.{k}={v}" for k, v in about.items())]
        with open(log, "w", encoding="utf-8") as output:
            output.write(f"$ {run.command}\n")
            output.flush()
            returned = processes.call([sys.executable, *_COMMAND[1:], *run.args, *quiet, *recording], output)
        if run.path.is_file():  # the recorder's command has the recorder's own options in it
            save_record(replace(load_record(run.path), command=run.command), None, run.path)
        elif not processes.stopped:
            save_record(run.nothing(*_judge_log(log, returned)), None, run.path)


def meaning_of_shots(config: Namespace) -> tuple[str, str]:
    """The option of the data module that shots stand for, and what one of them is: as its class says."""
    data: Any = pkgutil.resolve_name(config.data.class_path)
    return getattr(data, "shots_option", "limit_per_class"), getattr(data, "shots_unit", "shot")


def progress_display(console: Console) -> Progress:
    """Bars that say how many of how many, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def encoded(bench: Bench, stage: str, store: KeyStore, progress: Progress) -> Keys:
    """Keys of a stage, encoded where the store has none, with a bar."""
    task = progress.add_task(f"encode {stage} rows", total=len(bench.data.labels(stage)))
    keys = bench.keys(stage, store, lambda rows: progress.advance(task, rows))
    progress.update(task, completed=keys.rows)
    return keys


class _Processes:
    """Child processes that end with this one: on Ctrl-C they are told to stop, and no new one starts."""

    def __init__(self) -> None:
        self.stopped = False
        self._alive: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped = True
        for process in list(self._alive):
            process.terminate()

    def call(self, command: Sequence[str], output: Any) -> int:
        if self.stopped:
            return -1
        # a session of its own: Ctrl-C reaches it through this process alone, which then knows why it ended
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self._alive.add(process)
        try:
            return process.wait()
        finally:
            self._alive.discard(process)


def _judge(error: Exception) -> tuple[str, str]:
    """Status and reason of an exception: what this package raises says what cannot be done."""
    message = str(error) or type(error).__name__
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    own = Path(__file__).parent.parent in raised_in.parents and isinstance(error, ValueError | TypeError | RuntimeError)
    return ("refused" if own else "failed"), message


def _judge_log(log: Path, returned: int) -> tuple[str, str]:
    """Status and reason from what a command printed: its front door ends in ``error: MESSAGE``."""
    text = log.read_text(encoding="utf-8", errors="replace")[-_MEMORY_OF_AN_ERROR:].strip()
    _, found, message = text.rpartition("\nerror: ")
    if found and returned == 1:
        return "refused", message.partition("\n(")[0].strip()
    if found:
        return "failed", message.strip()
    return (
        "failed",
        f"ended with status {returned}: {text.splitlines()[-1] if text else 'no output'} (all of it: {log})",
    )
