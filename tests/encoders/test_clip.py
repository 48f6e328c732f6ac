import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lightning_faast.data.transforms import DeviceTransform, WorkerTransform, complete_data_config
from lightning_faast.encoders import ClipEncoder
from lightning_faast.encoders.class_names import name_classes
from tests.clip_models import OPEN_CLIP_CONFIG, make_open_clip, make_transformers

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

NAMES = ["cat", "school_bus", "n02085620 Chihuahua"]
TEXTS = ["cat", "school bus", "Chihuahua"]
PROMPTS = ["a photo of a {}.", "a drawing of the {}.", "{}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    return {
        "open_clip": make_open_clip(root / "open_clip", seed=5),
        "transformers": make_transformers(root / "transformers", seed=5),
    }


@pytest.fixture(params=["open_clip", "transformers"])
def name(request, folders):
    folder = folders[request.param]
    return f"open_clip:local-dir:{folder}" if request.param == "open_clip" else str(folder)


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """A built-in architecture with two kinds of weights, of which one was trained with QuickGELU, as RN50 has."""
    from open_clip import factory, pretrained

    (tmp_path / "tiny-clip.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    tags = {
        "quick": pretrained._pcfg(hf_hub="nobody/nowhere/", quick_gelu=True),
        "grey": pretrained._pcfg(hf_hub="nobody/nowhere/", mean=(0.5, 0.5, 0.5)),
    }
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", tags)
    return "tiny-clip"


def reference(name):
    """The model by its own library, in eval mode."""
    if name.startswith("open_clip:"):
        return open_clip.create_model(name.removeprefix("open_clip:")).eval()
    return transformers.CLIPModel.from_pretrained(name).eval()


@torch.no_grad()
def reference_images(name, images):
    model = reference(name)
    if name.startswith("open_clip:"):
        return model.encode_image(images)
    pooled = model.vision_model(pixel_values=images).pooler_output
    return model.visual_projection(pooled)


@torch.no_grad()
def reference_texts(name, texts):
    """Unit-norm embeddings of texts one by one."""
    if name.startswith("open_clip:"):
        tokenizer = open_clip.get_tokenizer(name.removeprefix("open_clip:"))
        return functional.normalize(torch.cat([reference(name).encode_text(tokenizer([text])) for text in texts]))
    model, tokenizer = reference(name), transformers.AutoTokenizer.from_pretrained(name)
    images = torch.zeros(1, 3, 32, 32)
    rows = [model(**tokenizer([text], return_tensors="pt"), pixel_values=images).text_embeds for text in texts]
    return torch.cat(rows)


class TestImages:
    def test_are_the_librarys_own(self, name):
        images = torch.randn(3, 3, 32, 32)
        expected = reference_images(name, images)
        encoder = ClipEncoder(name, normalize=False)
        assert encoder(images).shape == (3, encoder.num_features)
        torch.testing.assert_close(encoder(images), expected)
        torch.testing.assert_close(ClipEncoder(name)(images), functional.normalize(expected))

    def test_have_unit_norm(self, name):
        torch.testing.assert_close(ClipEncoder(name)(torch.randn(4, 3, 32, 32)).norm(dim=1), torch.ones(4))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_normalized_in_float32(self, name, dtype):
        encoder = ClipEncoder(name).to(dtype)
        images = torch.randn(2, 3, 32, 32)
        for half, full in (
            (encoder(images.to(dtype)), ClipEncoder(name)(images)),
            (encoder.embed_classes(NAMES), ClipEncoder(name).embed_classes(NAMES)),
        ):
            assert half.dtype == torch.float32
            torch.testing.assert_close(half.norm(dim=1), torch.ones(len(half)))
            assert functional.cosine_similarity(half, full).min() > 0.99

    def test_double_precision_stays_double(self, name):
        encoder = ClipEncoder(name).double()
        assert encoder(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
        assert encoder.embed_classes(NAMES).dtype == torch.float64

    @pytest.mark.parametrize("size", [(32, 32), (50, 40), (90, 198)])
    def test_are_prepared_as_the_library_prepares_them(self, name, size):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        config = complete_data_config(ClipEncoder(name, pretrained=False).data_config)
        prepared = WorkerTransform(config)(image)
        if name.startswith("open_clip:"):
            _, _, transform = open_clip.create_model_and_transforms(name.removeprefix("open_clip:"))
            torch.testing.assert_close(prepared, transform(image))
        else:
            # transformers resizes tensors, rounding otherwise than PIL by up to two steps of 255; it also halves odd
            # margins otherwise than torchvision, timm and CLIP's authors, so there are none here
            expected = transformers.CLIPImageProcessor.from_pretrained(name)(image, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(prepared, expected[0], atol=2.1 / 255 / 0.26, rtol=0)
        assert DeviceTransform.unsupported(config) is None

    def test_squashed_ones_too(self, tmp_path):
        folder = make_open_clip(tmp_path, preprocess={"resize_mode": "squash", "mean": [0.5, 0.5, 0.5]})
        encoder = ClipEncoder(f"open_clip:local-dir:{folder}")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        torch.testing.assert_close(WorkerTransform(encoder.data_config)(image), transform(image))

    def test_padded_ones_are_refused(self, tmp_path):
        folder = make_open_clip(tmp_path, preprocess={"resize_mode": "longest"})
        with pytest.raises(ValueError, match="resize_mode 'longest'"):
            ClipEncoder(f"open_clip:local-dir:{folder}")

    def test_a_processor_without_center_crop_is_refused(self, tmp_path):
        folder = make_transformers(tmp_path)
        path = next(path for path in folder.glob("*processor_config.json") if "do_center_crop" in path.read_text())
        path.write_text(path.read_text().replace('"do_center_crop": true', '"do_center_crop": false'))
        with pytest.raises(ValueError, match="otherwise than CLIP"):
            ClipEncoder(str(folder))


class TestClasses:
    def test_have_unit_norm(self, name):
        embeddings = ClipEncoder(name, prompts=PROMPTS).embed_classes(NAMES)
        assert embeddings.shape == (3, ClipEncoder(name).num_features)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
        assert not embeddings.requires_grad

    def test_are_the_mean_of_unit_norm_embeddings(self, name):
        by_prompt = [reference_texts(name, [prompt.replace("{}", text) for text in TEXTS]) for prompt in PROMPTS]
        expected = functional.normalize(torch.stack(by_prompt).mean(0))
        torch.testing.assert_close(ClipEncoder(name, prompts=PROMPTS).embed_classes(NAMES), expected)
        alone = ClipEncoder(name, prompts=PROMPTS[:1]).embed_classes(NAMES)
        torch.testing.assert_close(alone, by_prompt[0])
        assert not torch.allclose(alone, expected)

    def test_are_those_of_open_clips_zero_shot_classifier(self, folders):
        source = f"local-dir:{folders['open_clip']}"
        expected = open_clip.build_zero_shot_classifier(
            open_clip.create_model(source).eval(),
            open_clip.get_tokenizer(source),
            TEXTS,
            [lambda text, prompt=prompt: prompt.replace("{}", text) for prompt in PROMPTS],
        )
        embeddings = ClipEncoder(f"open_clip:{source}", prompts=PROMPTS).embed_classes(NAMES)
        torch.testing.assert_close(embeddings, expected.T)

    def test_do_not_depend_on_those_beside_them(self, name):
        encoder = ClipEncoder(name, prompts=PROMPTS)
        names = [f"thing {number}" for number in range(200)]  # 600 texts: several batches
        embeddings = encoder.embed_classes(names)
        torch.testing.assert_close(embeddings[150:152], encoder.embed_classes(names[150:152]))
        assert torch.equal(embeddings, encoder.embed_classes(names))

    def test_can_be_given_other_texts(self, name):
        encoder = ClipEncoder(name, class_texts={"automobile": "car"})
        assert torch.equal(
            encoder.embed_classes(["automobile", "cat"]), ClipEncoder(name).embed_classes(["car", "cat"])
        )

    @pytest.mark.parametrize("prompts", [[], ["a photo."], ["{} or {}"], "a photo of a {}."])
    def test_wrong_prompts_are_refused(self, prompts):
        with pytest.raises(ValueError, match="templates"):
            ClipEncoder("open_clip:RN50/openai", prompts=prompts)


class TestNames:
    def test_become_words(self):
        given = ["cat", "great_white_shark", "n04146614 school bus", "n04146614_school_bus2", "n01 x", " 2  doors "]
        assert name_classes(given) == ["cat", "great white shark", "school bus", "school bus2", "n01 x", "2 doors"]

    @pytest.mark.parametrize("names", [["0", "1"], ["cat", "n04146614"], ["cat", ""], ["cat", "__"]])
    def test_that_say_nothing_are_refused(self, names):
        with pytest.raises(ValueError, match=r"say nothing .* class_texts"):
            name_classes(names)

    def test_that_are_numbers_may_be_said_otherwise(self):
        assert name_classes(["0", "1"], {"0": "zero", "1": "1"}) == ["zero", "1"]
        assert name_classes(["737", "Cessna"]) == ["737", "Cessna"]

    def test_texts_for_unknown_classes_are_refused(self):
        with pytest.raises(ValueError, match=r"class_texts has 'dgo'.*'cat', 'dog'"):
            name_classes(["cat", "dog"], {"dgo": "hound"})

    def test_texts_that_say_nothing_are_refused(self):
        with pytest.raises(ValueError, match="'dog' say nothing"):
            name_classes(["cat", "dog"], {"dog": " "})

    def test_equal_texts_are_warned_of(self):
        with pytest.warns(UserWarning, match=r"'n02012849 crane' and 'n03126707 crane' have the same text 'crane'"):
            name_classes(["n02012849 crane", "n03126707 crane"])


class TestFrozen:
    def test_stays_in_eval_mode(self, name):
        encoder = ClipEncoder(name)
        around = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, 2)).train()
        assert not any(module.training for module in encoder.modules())
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        around(torch.randn(4, 3, 32, 32)).sum().backward()
        encoder.embed_classes(NAMES)
        assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert around[1].weight.grad is not None

    def test_false_trains_the_image_tower_alone(self, name):
        encoder = ClipEncoder(name, frozen=False)
        assert encoder.training
        encoder(torch.randn(4, 3, 32, 32))[:, 0].sum().backward()
        trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert trained
        assert not any("text" in name or "token" in name for name in trained)

    def test_false_embeds_names_without_dropout(self, name):
        encoder = ClipEncoder(name, frozen=False)
        embeddings = encoder.embed_classes(NAMES)
        assert torch.equal(embeddings, ClipEncoder(name).embed_classes(NAMES))
        assert not embeddings.requires_grad
        assert all(module.training for module in encoder.modules())

    def test_false_respects_no_grad_around_it(self, name):
        with torch.no_grad():
            assert not ClipEncoder(name, frozen=False)(torch.randn(2, 3, 32, 32)).requires_grad


class TestWeights:
    def test_state_dict_round_trip(self, name):
        other = ClipEncoder(name, pretrained=False)
        encoder = ClipEncoder(name)
        assert not torch.allclose(other.embed_classes(NAMES), encoder.embed_classes(NAMES))
        other.load_state_dict(encoder.state_dict())
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(other(images), encoder(images))
        assert torch.equal(other.embed_classes(NAMES), encoder.embed_classes(NAMES))

    def test_half_precision_files_give_float32(self, tmp_path, name):
        half = make_transformers(tmp_path / "t")
        transformers.CLIPModel.from_pretrained(half).half().save_pretrained(half)
        assert {parameter.dtype for parameter in ClipEncoder(str(half)).parameters()} == {torch.float32}

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("custom_text", [False, True])
    def test_file_in_either_layout(self, tmp_path, architecture, suffix, custom_text):
        torch.manual_seed(3)
        model = open_clip.create_model(architecture, force_quick_gelu=True, force_custom_text=custom_text).eval()
        path = tmp_path / f"weights{suffix}"
        if suffix == ".pt":
            torch.save({"state_dict": model.half().state_dict()}, path)
        else:
            save_file(model.half().state_dict(), path)
        model.float()
        encoder = ClipEncoder(f"open_clip:{architecture}/quick", checkpoint_path=str(path))
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), model.encode_image(images, normalize=True))
            tokens = open_clip.get_tokenizer(architecture)(["a photo of a cat."])
            torch.testing.assert_close(encoder.embed_classes(["cat"]), model.encode_text(tokens, normalize=True))
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}

    def test_tag_says_activation_and_normalization(self, tmp_path, architecture):
        path = tmp_path / "weights.safetensors"
        save_file(open_clip.create_model(architecture).state_dict(), path)
        quick, grey = (
            ClipEncoder(f"open_clip:{architecture}/{tag}", checkpoint_path=str(path)) for tag in ("quick", "grey")
        )
        assert all(torch.equal(a, b) for a, b in zip(quick.parameters(), grey.parameters(), strict=True))
        assert not torch.allclose(quick.embed_classes(["cat"]), grey.embed_classes(["cat"]), atol=1e-6)
        assert grey.data_config["mean"] == (0.5, 0.5, 0.5)
        assert quick.data_config["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))

    def test_file_without_tag_is_refused_where_it_matters(self, tmp_path, architecture):
        path = tmp_path / "weights.safetensors"
        save_file(open_clip.create_model(architecture).state_dict(), path)
        with pytest.raises(ValueError, match=r"two activations.*quick, grey"):
            ClipEncoder(f"open_clip:{architecture}", checkpoint_path=str(path))

    def test_wrong_file_is_refused(self, tmp_path, architecture):
        model = open_clip.create_model(architecture).state_dict()
        path = tmp_path / "weights.safetensors"
        save_file({name: tensor for name, tensor in model.items() if name != "visual.conv1.weight"}, path)
        with pytest.raises(ValueError, match=r"does not fit 'tiny-clip': missing: visual.conv1.weight\. Give"):
            ClipEncoder(f"open_clip:{architecture}/quick", checkpoint_path=str(path))
        torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
        with pytest.raises(ValueError, match="weights_only=True"):
            ClipEncoder(f"open_clip:{architecture}/quick", checkpoint_path=str(tmp_path / "whole.pt"))

    def test_folder_without_weights_is_refused(self, tmp_path):
        folder = make_open_clip(tmp_path / "open_clip")
        (folder / "open_clip_model.safetensors").unlink()
        with pytest.raises(RuntimeError, match="could not be loaded"):
            ClipEncoder(f"open_clip:local-dir:{folder}")
        folder = make_transformers(tmp_path / "transformers")
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="lacks files"):
            ClipEncoder(str(folder))

    def test_tensors_that_are_missing_are_refused(self, tmp_path):
        folder = make_transformers(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        del tensors["text_projection.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 1 tensors of a CLIP model: text_projection\.weight"):
            ClipEncoder(str(folder))

    @pytest.mark.parametrize("given", ["open_clip:RN50/openai", "openai/clip-vit-base-patch32"])
    def test_out_of_reach(self, given):
        with pytest.raises(ConnectionError) as caught:
            ClipEncoder(given)
        assert ("checkpoint_path=FILE" if "open_clip:" in given else "model_name=FOLDER") in str(caught.value)
        assert given in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model_name": "open_clip:RN55/openai"}, "no model of open_clip. Did you mean RN50"),
            ({"model_name": "open_clip:RN50/opnai"}, "only: openai, yfcc15m, cc12m"),
            ({"model_name": "open_clip:RN50"}, "says no weights: .*openai"),
            ({"model_name": "x", "checkpoint_path": "f.pt"}, "give the folder .* as model_name"),
            ({"model_name": "x", "checkpoint_path": "f.pt", "pretrained": False}, "Leave one of them out"),
            ({"model_name": "open_clip:local-dir:x", "checkpoint_path": "f.pt"}, "leave checkpoint_path out"),
        ],
    )
    def test_options_that_cannot_be(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClipEncoder(**options)

    def test_other_kinds_of_models_are_refused(self, tmp_path):
        transformers.BertConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="'bert', expected 'clip'"):
            ClipEncoder(str(tmp_path))
        folder = make_open_clip(
            tmp_path / "coca",
            vision_cfg={"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "attentional_pool": True,
                        "attn_pooler_heads": 2, "output_tokens": True},
            text_cfg={"width": 32, "heads": 2, "layers": 1, "embed_cls": True, "output_tokens": True},
            multimodal_cfg={"width": 32, "heads": 2, "layers": 1},
            custom_text=True,
        )  # fmt: skip
        with pytest.raises(ValueError, match="is a CoCa"):
            ClipEncoder(f"open_clip:local-dir:{folder}")

    def test_missing_library_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
        with pytest.raises(ImportError, match=r"lightning-faast\[clip\]"):
            ClipEncoder("open_clip:RN50/openai")
