"""A tiny model with a tokenizer as a folder, and text that it can learn."""

import random

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def lines(count, seed=0):
    """Sentences that a rule makes."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        animal, color = generator.choice(("cat", "dog")), generator.choice(("red", "blue"))
        place = "mat" if animal == "cat" else "house"
        made.append(f"the {color} {animal} sat on the {place} and then it ran under the {color} tree <unk> é\n")
    return made


def text(count, seed=0):
    return "".join(lines(count, seed))


def save_model(folder, family="llama", seed=0):
    """A folder as the hub has it: a random model, and a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(lines(200), trainer)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(folder)
    sizes = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0}
    hf.set_seed(seed)
    if family == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **sizes,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    return folder
