"""Fast weights inside a causal language model: text is learned in one forward pass."""

from lightning_faast.language.chunked import ChunkedFastWeights
from lightning_faast.language.embedding import EmbeddingFastWeights
from lightning_faast.language.fast_weight_lm import FastWeightLM
from lightning_faast.language.middle import MiddleFastWeights, slow_weights
from lightning_faast.language.module import LanguageModule
from lightning_faast.language.output import OutputLayer
from lightning_faast.language.pairs import windows
from lightning_faast.language.residual import ResidualFastWeights

__all__ = [
    "ChunkedFastWeights",
    "EmbeddingFastWeights",
    "FastWeightLM",
    "LanguageModule",
    "MiddleFastWeights",
    "OutputLayer",
    "ResidualFastWeights",
    "slow_weights",
    "windows",
]
