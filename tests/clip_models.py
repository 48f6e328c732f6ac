"""Tiny CLIP models with random weights and real tokenizers, as folders."""

import json
import string

import torch

OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},  # a ResNet, as in RN50
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_open_clip(folder, seed=0, preprocess=None, **config):
    """A folder for ``open_clip:local-dir:``; the tokenizer is CLIP's own, which open_clip brings along."""
    import open_clip
    from safetensors.torch import save_file

    config = {**OPEN_CLIP_CONFIG, **config}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def make_transformers(folder, seed=0, **config):
    """A folder with everything that transformers looks for; the tokenizer knows letters."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + ".,"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **layers,
                "vocab_size": len(tokens),
                "max_position_embeddings": 40,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "attention_dropout": 0.5,
            },
            vision_config={**layers, "image_size": 32, "patch_size": 8, "attention_dropout": 0.5},
            **{"projection_dim": 12, **config},
        )
    )
    model.save_pretrained(folder)
    return folder
