"""The one command: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Section, Settings

#: The benchmarks in the order of the report, and what each compares.
BENCHMARKS = {
    "fit": "Trainer.fit in one pass / the bare encoder over the same loader",
    "solve": "statistics and solve / the paper's float32 pinv, and the error of both",
    "regularization_path": "decomposition, GCV and read-out / one ridge by eigh",
    "memory": "growth of the peak memory with N / storing the keys",
    "prediction": "FastWeights / nn.Linear",
    "memories": "FastWeights / memories of the same rows and faiss's flat index: bytes, time of a prediction",
    "language": "FastWeightLM learning and generating / the bare language model",
    "loader": "images/s of the loader with two workers / decoding alone",
}
_OUT = Path("docs/benchmarks.md")


def main(arguments: Sequence[str] | None = None) -> list[Section]:
    """Run benchmarks and write the report."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    out = options.out or (None if options.only or options.quick else _OUT)
    settings = Settings(runs=options.runs or (2 if options.quick else 7), quick=options.quick)

    from benchmarks import machine, report  # torch: --help needs none of it

    facts, load = machine.describe(), machine.load()
    sections = []
    for name in options.only or BENCHMARKS:
        start, others = time.perf_counter(), machine.OtherLoad()
        print(f"{name}: {BENCHMARKS[name]} ...", file=sys.stderr, flush=True)
        section = importlib.import_module(f"benchmarks.{name}").run(settings)
        section.notes.append(f"Cores that other processes kept busy meanwhile: {others}.")
        sections.append(section)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    facts["load average over a minute"] = f"{load} before, {machine.load()} after (this command's own included)"
    text = report.markdown(sections, settings, shlex.join(["python", "-m", "benchmarks", *given]), facts)
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        print(f"wrote {out}", file=sys.stderr)
    return sections


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure lightning_faast against named peers and compare the ratios with their targets.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benchmarks (ours / peer):\n"
        + "\n".join(f"  {name:<20} {what}" for name, what in BENCHMARKS.items())
        + """

examples:
  python -m benchmarks                       all of them, about 15 minutes on 2 cores; writes docs/benchmarks.md
  python -m benchmarks --only prediction     one, printed
  python -m benchmarks --quick               do they run at all? tiny sizes, printed, half a minute

Run it on a machine that does nothing else: the report states the load. Real images and weights are taken from
../shared beside the checkout where it is there; elsewhere images are generated and weights random, and the report says
so. A target that is missed is reported and is no error.
""",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help="run these benchmarks alone"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks the code, measures nothing")
    parser.add_argument(
        "--runs", type=_positive, metavar="N", help="interleaved runs of each (default: 7; 2 with --quick)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the report (default: {_OUT}; with --only or --quick it is printed instead, so as not to replace a whole "
        "report by a part)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    main()
