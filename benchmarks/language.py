"""Fast weights inside a causal language model: the cost of learning, and of generating, over the bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Row, Section, Settings, Target, interleave, samples
from lightning_faast.language import FastWeightLM

TITLE = "Language models"
_LEARN = {"embedding": Target("at most", 1.10), "residual": Target("at most", 1.6)}
_GENERATE = Target("at most", 1.05)


def run(settings: Settings) -> Section:
    """Measure."""
    model = _model(settings.quick)
    sequences, length, new = (2, 16, 4) if settings.quick else (4, 512, 48)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
    section = Section(
        TITLE,
        "A Llama of the sizes of SmolLM2-135M (hidden 576, 30 layers, vocabulary 49,152) with random weights, which "
        f"cost what trained ones cost. Learning: {sequences} x {length} tokens, without the solve, over the model's "
        f"forward pass of the same tokens with its output layer. Generating: {new} tokens after 32, greedy, with the "
        "KV cache.",
    )
    for mode, target in _LEARN.items():
        lm = FastWeightLM(model, mode=mode)
        measured = interleave({"learn": _learning(lm, ids), "bare": _forward(model, lm, ids)}, settings.runs)
        section.rows.append(_row(f"learning, `{mode}`", measured, "learn", "bare", "the bare forward pass", target))
        lm.use("default").learn(ids).solve()
        prompt = ids[:1, :32]
        measured = interleave(
            {"with": _generating(lm, prompt, new, "default"), "bare": _generating(lm, prompt, new, None)}, settings.runs
        )
        section.rows.append(_row(f"generating, `{mode}`", measured, "with", "bare", "the bare model", _GENERATE))
        if mode == "residual":
            solution = lm.use("default").solve()
            section.notes.append(
                f"The solve of `residual` after {lm.tokens:,} tokens took {solution.solve_seconds:.1f} s, of which the "
                f"choice of step and ridges {solution.choice_seconds:.1f} s."
            )
        lm.detach()
    return section


def _model(quick: bool) -> Any:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    large = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes = {**small, "vocab_size": 100} if quick else {**large, "num_key_value_heads": 3, "vocab_size": 49152}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, eos_token_id=None)).eval()


def _learning(lm: FastWeightLM, ids: Tensor) -> Callable[[], object]:
    def learn() -> None:
        lm.use("default").reset().learn(ids)

    return learn


def _forward(model: Any, lm: FastWeightLM, ids: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def forward() -> None:
        lm.use(None)
        model(input_ids=ids, use_cache=False)

    return forward


def _generating(lm: FastWeightLM, prompt: Tensor, new: int, name: str | None) -> Callable[[], object]:
    @torch.inference_mode()
    def generate() -> None:
        lm.use(name)
        lm.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0)

    return generate


def _row(what: str, measured: dict[str, list[float]], ours: str, theirs: str, peer: str, target: Target) -> Row:
    return Row.compare(what, samples(measured[ours]), peer, samples(measured[theirs]), target)
