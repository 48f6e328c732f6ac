"""Tiny random causal language models of the families that are known."""

import torch
import transformers as hf

V, D, T = 97, 32, 64
_SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": T,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SIZES, **options})).eval()


def gpt2(**options):
    sizes = {"n_embd": D, "n_layer": 3, "n_head": 4, "n_positions": T, "vocab_size": V}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **tokens, **options)).eval()


def opt(**options):
    sizes = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": D}
    return hf.OPTForCausalLM(hf.OPTConfig(**{**sizes, **options})).eval()


def gemma2(**options):
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**_GROUPED, "final_logit_softcapping": 3.0, **options})).eval()


FAMILIES = {
    "llama": llama,
    "gpt2": gpt2,
    "opt": opt,
    "gemma2": gemma2,
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GROUPED)).eval(),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES, num_key_value_heads=2)).eval(),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)).eval(),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)).eval(),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, num_key_value_heads=2)).eval(),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_SIZES, logits_scaling=4.0)).eval(),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_SIZES, logit_scale=0.25)).eval(),
}


def text(sequences=24, length=40, seed=0):
    """Token ids [sequences, length] that a model can learn: a rule, and noise in every fifth place."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.arange(length) * 7 + torch.randint(V, (sequences, 1), generator=generator)) % V
    ids[:, ::5] = torch.randint(V, ids[:, ::5].shape, generator=generator)
    return ids


def loss(lm, ids):
    with torch.no_grad():
        return float(lm(input_ids=ids, labels=ids).loss)
