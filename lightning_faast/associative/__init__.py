"""The mathematics of fast weights in plain torch: no Lightning, usable and testable alone."""

from lightning_faast.associative.fast_weights import FastWeights
from lightning_faast.associative.files import load_statistics, save_statistics
from lightning_faast.associative.learner import Learner
from lightning_faast.associative.readout import Discriminant, PairedDiscriminants, Regression
from lightning_faast.associative.regularization import (
    GCV,
    Choice,
    LeaveOneOut,
    PaperRule,
    Regularization,
    Ridge,
    Truncation,
)
from lightning_faast.associative.reservoir import Reservoir
from lightning_faast.associative.solution import Solution
from lightning_faast.associative.spectrum import Spectrum
from lightning_faast.associative.statistics import SufficientStatistics

__all__ = [
    "GCV",
    "Choice",
    "Discriminant",
    "FastWeights",
    "Learner",
    "LeaveOneOut",
    "PairedDiscriminants",
    "PaperRule",
    "Regression",
    "Regularization",
    "Reservoir",
    "Ridge",
    "Solution",
    "Spectrum",
    "SufficientStatistics",
    "Truncation",
    "load_statistics",
    "save_statistics",
]
