"""Text encoders: pooling, padding, layers, prompts, truncation, defaults of sentence encoders, and what is refused."""

import copy

import pytest
import torch
from torch.nn import functional

transformers = pytest.importorskip("transformers")

from lightning_faast.encoders import TextEncoder  # noqa: E402
from lightning_faast.encoders.text_pooling import pool  # noqa: E402
from lightning_faast.encoders.text_tokens import Tokenization, groups_of_alike_length  # noqa: E402
from lightning_faast.evaluation.keys import fingerprint  # noqa: E402
from lightning_faast.training import FullFinetuning, Lora  # noqa: E402
from tests.text_models import LAYERS, make_bert, make_llama, make_reviews, make_tokenizer  # noqa: E402

TEXTS, _ = make_reviews(30)
PROMPT = "review: {text} sentiment:"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(make_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(make_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(params=["bert", "llama"])
def folder(request, bert, llama):
    return {"bert": bert, "llama": llama}[request.param]


def alone(folder, text, layer=-1):
    """Hidden states [T, d] of one text that nothing stands beside."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states[layer][0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


POOLINGS = {
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
def test_features_are_those_of_each_text_alone(folder, pooling, max_tokens):
    encoder = TextEncoder(folder, pooling=pooling, normalize=False, max_tokens=max_tokens)
    expected = torch.stack([POOLINGS[pooling](alone(folder, text)) for text in TEXTS])
    assert relative(encoder(TEXTS), expected) < 1e-6
    assert encoder.num_features == 16
    normal = TextEncoder(folder, pooling=pooling, max_tokens=max_tokens)(TEXTS)
    assert relative(normal, functional.normalize(expected, dim=-1)) < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_on_either_side_gives_the_same_features(folder, pooling):
    features = []
    for side in ("left", "right"):
        encoder = TextEncoder(folder, pooling=pooling)
        encoder.tokenizer.padding_side = side
        features.append(encoder(TEXTS))
    assert relative(*features) < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan")])
def test_pooling_ignores_padding_on_either_side(pooling, padding):
    hidden = torch.randn(3, 5, 4)
    nothing = torch.full((3, 2, 4), padding)
    yes, no = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)
    expected = torch.stack([POOLINGS[pooling](states) for states in hidden])
    for states, mask in (([nothing, hidden], [no, yes]), ([hidden, nothing], [yes, no])):
        torch.testing.assert_close(pool(torch.cat(states, 1), torch.cat(mask, 1), pooling), expected)


def test_layers(folder):
    wide = TextEncoder(folder, layers=[1, -1], normalize=False)
    assert wide.num_features == 32
    parts = [torch.stack([alone(folder, text, layer).mean(0) for text in TEXTS]) for layer in (1, -1)]
    assert relative(wide(TEXTS), torch.cat(parts, 1)) < 1e-6
    normal = TextEncoder(folder, layers=[1, -1])(TEXTS)
    together = torch.cat([functional.normalize(part, dim=-1) for part in parts], 1) / 2**0.5
    assert relative(normal, together) < 1e-6
    for wrong in (4, -5, [], [3, -1]):
        with pytest.raises(ValueError, match=r"from 0 \(the embeddings\) to 3 \(the last layer\)"):
            TextEncoder(folder, layers=wrong)


def test_prompt(llama):
    encoder = TextEncoder(llama, pooling="last", prompt=PROMPT, normalize=False)
    expected = torch.stack([alone(llama, PROMPT.replace("{text}", text))[-1] for text in TEXTS])
    assert relative(encoder(TEXTS), expected) < 1e-6
    with pytest.raises(ValueError, match=r"must be a template with \{text\}"):
        TextEncoder(llama, prompt="review:")


def test_pairs(bert):
    encoder = TextEncoder(bert, pooling="cls", normalize=False)
    model = transformers.AutoModel.from_pretrained(bert).eval()
    tokens = encoder.tokenizer("a good film", "bad plot", return_tensors="pt")
    assert tokens["token_type_ids"].sum() == 3
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state[:, 0]
    assert relative(encoder([("a good film", "bad plot"), ("a", "b")])[:1], expected) < 1e-6
    both = TextEncoder(bert, prompt="{text} and {pair}")
    assert relative(both([("a film", "a plot")]), TextEncoder(bert)(["a film and a plot"])) < 1e-6
    with pytest.raises(ValueError, match=r"no \{pair\} for the second"):
        TextEncoder(bert, prompt=PROMPT)([("a", "b")])
    with pytest.raises(ValueError, match="and the texts are none"):
        both(["a"])
    with pytest.raises(ValueError, match="all of them alike"):
        encoder(["a", ("a", "b")])


def test_texts_are_put_into_prompts_as_they_are():
    tokens = Tokenization(make_tokenizer(special=False), "{text} : {pair}")
    assert tokens._fill([r"{pair} \1 {", "b"]) == (r"{pair} \1 { : b",)


def test_truncation_is_counted_and_said_once(bert):
    encoder = TextEncoder(bert, max_length=8)
    long = "the film was good and very very moving"
    cut = encoder([long, "a film", long + " and great"])
    assert relative(cut[:1], encoder(["the film was good and very"])) < 1e-6
    assert torch.equal(cut[0], cut[2])
    with pytest.warns(UserWarning, match=r"2 of 4 texts are longer than max_length=8 tokens"):
        encoder.report_truncation()
    encoder(["a film"])
    encoder.report_truncation()  # nothing to say: warnings would be recorded


def test_truncation_keeps_the_prompts_end(llama):
    tokens = Tokenization(make_tokenizer(special=False), PROMPT, max_length=12)
    (row, short), cut = tokens(["good " * 30, "bad"])
    words = make_tokenizer().convert_ids_to_tokens(row["input_ids"])
    assert words[:2] == ["review", ":"]
    assert words[-2:] == ["sentiment", ":"]
    assert set(words[2:-2]) <= {"good", "[UNK]"}
    assert 8 < len(words) <= 12
    assert len(short["input_ids"]) == 5
    assert cut == 1
    with pytest.raises(ValueError, match="leaves no room for a text: the prompt and special tokens alone are 4 tokens"):
        TextEncoder(llama, prompt=PROMPT, max_length=4)


def test_max_length_is_the_models(bert, llama):
    assert TextEncoder(bert).max_length == 64
    with pytest.raises(ValueError, match="max_length=65, but the model has 64 positions"):
        TextEncoder(llama, max_length=65)


def test_groups_hold_every_row_once_and_little_padding():
    lengths = torch.randint(1, 60, (500,)).tolist()
    groups = list(groups_of_alike_length(lengths, 512))
    assert sorted(row for group in groups for row in group) == list(range(500))
    padded = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    assert padded < 1.1 * sum(lengths)
    assert all(len(group) * max(lengths[row] for row in group) <= 512 for group in groups)
    assert list(groups_of_alike_length([700, 3], 512)) == [[0], [1]]


def test_bad_texts(bert, llama):
    with pytest.raises(ValueError, match="must be a list of at least one"):
        TextEncoder(bert)("a film")
    with pytest.raises(ValueError, match="must be a list of at least one"):
        TextEncoder(bert)([])
    with pytest.raises(ValueError, match="has no tokens"):
        TextEncoder(llama)(["a film", ""])
    assert TextEncoder(bert)([""]).isfinite().all()  # special tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, dtype):
    encoder = TextEncoder(folder, dtype=dtype)
    assert next(encoder.parameters()).dtype == getattr(torch, dtype)
    features = encoder(TEXTS)
    assert features.dtype == torch.float32
    assert relative(features, TextEncoder(folder)(TEXTS)) < 0.05
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        TextEncoder(folder, dtype="int8")


def test_frozen_and_not(folder):
    encoder = TextEncoder(folder).train()
    assert not any(part.training for part in encoder.modules() if part is not encoder)
    assert not encoder(TEXTS).requires_grad
    trained = TextEncoder(folder, frozen=False)
    assert trained.training
    trained(TEXTS).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


class TestSentenceEncoders:
    def test_own_files_choose(self, tmp_path):
        make_bert(tmp_path / "a", sentence={"pooling": "cls_token", "normalize": False, "max_seq_length": 20})
        encoder = TextEncoder(str(tmp_path / "a"))
        assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("cls", False, 20)
        encoder = TextEncoder(str(tmp_path / "a"), pooling="max", normalize=True, max_length=30)
        assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("max", True, 30)

    @pytest.mark.parametrize(
        ("sentence", "what"),
        [
            ({"pooling": "weightedmean"}, "'weightedmean'"),
            ({"pooling": "mean_tokens", "further": ["Dense"]}, "'followed by Dense'"),
        ],
    )
    def test_what_is_not_ours_is_refused(self, tmp_path, sentence, what):
        make_bert(tmp_path / "a", sentence=sentence)
        with pytest.raises(ValueError, match=f"{what}; expected one of mean, cls, last, max.*pooling=mean"):
            TextEncoder(str(tmp_path / "a"))
        assert TextEncoder(str(tmp_path / "a"), pooling="mean").pooling == "mean"


class TestLoading:
    def test_nothing_is_random(self, tmp_path, bert):
        """Neither BERT's pooler, which no feature passes, nor the caller's random state has a part in it."""
        torch.manual_seed(1)
        first = fingerprint(TextEncoder(bert))
        torch.manual_seed(2)
        assert fingerprint(TextEncoder(bert)) == first
        assert not any("pooler" in name for name, _ in TextEncoder(bert).named_parameters())

    def test_fingerprint_is_of_what_is_computed(self, tmp_path, bert):
        first = fingerprint(TextEncoder(bert))
        assert fingerprint(TextEncoder(bert, max_tokens=7)) == first
        assert fingerprint(TextEncoder(str(make_bert(tmp_path / "elsewhere")))) == first
        for options in ({"prompt": PROMPT}, {"pooling": "max"}, {"layers": 1}, {"max_length": 9}, {"normalize": False}):
            assert fingerprint(TextEncoder(bert, **options)) != first
        again = TextEncoder(bert)
        again(["a film"] * 3)
        assert fingerprint(again) == first
        heads = make_bert(tmp_path / "heads", num_attention_heads=4)  # the same weights and structure
        assert fingerprint(TextEncoder(str(heads))) != first

    def test_missing_weights(self, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = make_bert(tmp_path / "a")
        weights = load_file(folder / "model.safetensors")
        weights.pop("encoder.layer.1.output.dense.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 1 tensors of a BertModel: encoder.layer.1.output.dense.weight"):
            TextEncoder(str(folder))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ConnectionError, match=r"--model.encoder.model_name=DIR"):
            TextEncoder("no-such-user/no-such-model")
        with pytest.raises(FileNotFoundError, match=r"has no config.json.*--model.encoder.gguf_file=FILE"):
            TextEncoder(str(tmp_path))
        folder = make_bert(tmp_path / "a")
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks files of a model"):
            TextEncoder(str(folder))

    def test_random(self, bert):
        assert TextEncoder(bert, pretrained=False)(TEXTS).shape == (30, 16)
        with pytest.raises(ValueError, match="gguf_file='x' for those of a file"):
            TextEncoder(bert, pretrained=False, gguf_file="x")

    def test_code_of_its_own_is_not_run(self, tmp_path):
        import json

        folder = make_bert(tmp_path / "a")
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ValueError, match=r"--model.encoder.trust_remote_code=true"):
            TextEncoder(str(folder))

    def test_encoder_of_an_encoder_decoder(self, tmp_path):
        config = transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        transformers.T5Model(config).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        encoder = TextEncoder(str(tmp_path))
        assert not any("decoder" in name for name, _ in encoder.named_parameters())
        assert encoder(TEXTS).shape == (30, 16)
        Lora(r=2).adapt(encoder)
        names = {name.rpartition(".lora_")[0][-1] for name, p in encoder.named_parameters() if p.requires_grad}
        assert names == {"q", "k", "v", "o"}


class TestTraining:
    @pytest.mark.parametrize("layers", [-1, 2])
    def test_every_parameter_that_texts_pass_is_trained(self, folder, layers):
        adapter = FullFinetuning(0.5)
        encoder = adapter.adapt(TextEncoder(folder, layers=layers))
        encoder(TEXTS).pow(3).sum().backward()
        for parameter in encoder.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
        top = LAYERS["num_hidden_layers"] if layers == -1 else 2
        scales = sorted({group["lr_scale"] for group in adapter.parameter_groups(encoder)}, reverse=True)
        assert scales == [0.5**depth for depth in range(top)]

    @pytest.mark.parametrize("layers", [-1, 2])
    def test_lora(self, folder, layers):
        before = TextEncoder(folder, layers=layers)(TEXTS)
        adapter = Lora(r=2)
        encoder = adapter.adapt(TextEncoder(folder, layers=layers))
        assert torch.equal(copy.deepcopy(encoder).eval()(TEXTS), before)
        encoder(TEXTS).pow(3).sum().backward()
        adapter.check_gradients(encoder)
        trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
