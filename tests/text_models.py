"""Tiny text models with random weights and a tokenizer of whole words, as folders."""

import json

import torch

WORDS = "a an and awful bad boring brilliant dull film good great gripping it movie moving negative of or plot positive"
WORDS += " review sentiment terrible text the tedious this truly very was wonderful : ( )"
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def make_tokenizer(special=True, **options):
    """Words apart by spaces and punctuation; ``special`` puts [CLS] and [SEP] around a text."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **{"model_max_length": 64, **options}
    )


def make_bert(folder, seed=0, sentence=None, **config):
    """A BERT; ``sentence`` are the files of a sentence encoder: pooling, normalize, max_seq_length, further modules."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=64, max_position_embeddings=64, **{**LAYERS, **config})
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if sentence is not None:
        _write_sentence_files(folder, **sentence)
    return folder


def make_llama(folder, seed=0, **config):
    """A causal language model of the Llama family, whose tokenizer has no padding and no special tokens."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, max_position_embeddings=64, num_key_value_heads=1, **{**LAYERS, **config}
        )
    )
    model.save_pretrained(folder)
    make_tokenizer(special=False).save_pretrained(folder)
    return folder


def _write_sentence_files(folder, pooling, normalize=True, max_seq_length=None, further=()):
    kinds = ["Transformer", "Pooling", *further, *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {mode: mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken", "weightedmean")}
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{k}": v for k, v in modes.items()}))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


GOOD, BAD = ("brilliant", "good", "great", "gripping", "moving", "wonderful"), (
    "awful", "bad", "boring", "dull", "terrible", "tedious",
)  # fmt: skip


def make_reviews(rows, seed=0):
    """Texts of several lengths and their labels, told apart by one word."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for row in range(rows):
        words = (BAD, GOOD)[row % 2]
        picked = [words[int(i)] for i in torch.randint(6, (1 + row % 5,), generator=generator)]
        texts.append(f"the film was {' and '.join(picked)}")
        labels.append(("negative", "positive")[row % 2])
    return texts, labels


def write_reviews(root, train=24, test=12):
    """``train.csv`` and ``test.csv`` with the columns ``text`` and ``sentiment``."""
    root.mkdir(parents=True, exist_ok=True)
    for split, rows, seed in (("train", train, 0), ("test", test, 1)):
        lines = [f"{text},{label}" for text, label in zip(*make_reviews(rows, seed), strict=True)]
        (root / f"{split}.csv").write_text("\n".join(["text,sentiment", *lines]) + "\n")
    return root
