"""Fast weights inside a causal language model: text is learned in one forward pass."""

from lightning_faast.language.chunked import ChunkedFastWeights
from lightning_faast.language.dynamic_evaluation import dynamic_evaluation, learn_while_reading
from lightning_faast.language.embedding import EmbeddingFastWeights
from lightning_faast.language.fast_weight_lm import FastWeightLM
from lightning_faast.language.in_context import InContextClassifier
from lightning_faast.language.knn_lm import KNNLM
from lightning_faast.language.label_words import LabelWords
from lightning_faast.language.middle import MiddleFastWeights, slow_weights
from lightning_faast.language.module import LanguageModule
from lightning_faast.language.output import OutputLayer
from lightning_faast.language.pairs import windows
from lightning_faast.language.perplexity import evaluate, labelled_windows, perplexity
from lightning_faast.language.residual import ResidualFastWeights
from lightning_faast.language.translation import Translator, bleu

__all__ = [
    "KNNLM",
    "ChunkedFastWeights",
    "EmbeddingFastWeights",
    "FastWeightLM",
    "InContextClassifier",
    "LabelWords",
    "LanguageModule",
    "MiddleFastWeights",
    "OutputLayer",
    "ResidualFastWeights",
    "Translator",
    "bleu",
    "dynamic_evaluation",
    "evaluate",
    "labelled_windows",
    "learn_while_reading",
    "perplexity",
    "slow_weights",
    "windows",
]
