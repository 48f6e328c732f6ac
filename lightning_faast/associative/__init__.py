"""The mathematics of fast weights in plain torch: no Lightning, usable and testable alone."""

from lightning_faast.associative.class_means import LinearDiscriminant, NearestClassMean
from lightning_faast.associative.fast_weights import FastWeights
from lightning_faast.associative.files import load_statistics, save_statistics
from lightning_faast.associative.learner import Learner
from lightning_faast.associative.linear_attention import LinearAttentionMemory
from lightning_faast.associative.logistic import LogisticRegression
from lightning_faast.associative.memory import Memory
from lightning_faast.associative.readers import KNN, SoftmaxMemory, WeightedKNN
from lightning_faast.associative.readout import Discriminant, PairedDiscriminants, Regression
from lightning_faast.associative.regularization import (
    GCV,
    Automatic,
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
    "KNN",
    "Automatic",
    "Choice",
    "Discriminant",
    "FastWeights",
    "Learner",
    "LeaveOneOut",
    "LinearAttentionMemory",
    "LinearDiscriminant",
    "LogisticRegression",
    "Memory",
    "NearestClassMean",
    "PairedDiscriminants",
    "PaperRule",
    "Regression",
    "Regularization",
    "Reservoir",
    "Ridge",
    "SoftmaxMemory",
    "Solution",
    "Spectrum",
    "SufficientStatistics",
    "Truncation",
    "WeightedKNN",
    "load_statistics",
    "save_statistics",
]
