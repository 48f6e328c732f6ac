import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from lightning_faast.data.transforms import (
    DecodeTransform,
    DeviceTransform,
    WorkerTransform,
    complete_data_config,
    to_rgb,
)

CONFIG = {
    "input_size": (3, 96, 96),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def random_images(count, height, width, seed=0):
    """Noise, the hardest case for rounding, and smooth images in equal parts."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count // 2, height, width, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (count - count // 2, 3, 3, 3), dtype=np.uint8)
    smooth = [np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    return [*map(np.array, [*noise, *smooth])]


def in_255ths(images, config):
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (images * std + mean) * 255


class TestDeviceTransform:
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "hamming", "box"])
    @pytest.mark.parametrize(
        ("size", "target"),
        [
            ((32, 32), (128, 128)),
            ((8, 8), (96, 96)),
            ((105, 105), (64, 64)),
            ((28, 28), (28, 28)),
            ((37, 50), (96, 96)),
        ],
    )
    def test_is_timms_to_the_bit(self, interpolation, size, target):
        self.check({**CONFIG, "input_size": (3, *target), "interpolation": interpolation}, size)

    @pytest.mark.parametrize("crop_mode", ["center", "squash"])
    @pytest.mark.parametrize("crop_pct", [0.9, 1.0])
    @pytest.mark.parametrize("size", [(31, 50), (50, 31)])
    def test_is_timms_to_the_bit_in_shape(self, crop_mode, crop_pct, size):
        self.check({**CONFIG, "crop_pct": crop_pct, "crop_mode": crop_mode}, size)

    def check(self, config, size):
        images = random_images(6, *size)
        expected = torch.stack([create_transform(**config)(Image.fromarray(image)) for image in images])
        given = DeviceTransform(config)(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        difference = (in_255ths(given, config) - in_255ths(expected, config)).abs()
        assert difference.max() < 1e-3, f"max {difference.max()}, mean {difference.mean()} of 255"
        assert given.dtype == torch.float32
        assert given.shape == expected.shape

    def test_non_square_target(self):
        config = {**CONFIG, "input_size": (3, 64, 96), "crop_mode": "squash"}
        self.check(config, (20, 30))

    def test_is_nearer_than_torchvision_on_tensors(self):
        # why the arithmetic is our own: on float tensors, as on every accelerator, torchvision is off by a step or more
        image = random_images(2, 32, 32)[0]
        exact = torch.from_numpy(np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)).copy())
        floats = resize(
            torch.from_numpy(image).permute(2, 0, 1).float(), [128, 128], InterpolationMode.BICUBIC, antialias=True
        )
        theirs = floats.round().clamp(0, 255).permute(1, 2, 0)
        assert (theirs - exact).abs().max() >= 1

    def test_batches_of_any_length(self):
        transform = DeviceTransform(CONFIG)
        images = torch.from_numpy(np.stack(random_images(130, 8, 8))).permute(0, 3, 1, 2)
        together = transform(images)
        assert together.shape == (130, 3, 96, 96)
        assert torch.equal(together[100], transform(images[100:101])[0])

    def test_leaves_the_batch_alone(self):
        images = torch.from_numpy(np.stack(random_images(2, 96, 96))).permute(0, 3, 1, 2)
        before = images.clone()
        DeviceTransform({**CONFIG, "crop_pct": 1.0})(images)
        assert torch.equal(images, before)

    @pytest.mark.parametrize(
        "change",
        [
            {"interpolation": "nearest"},
            {"crop_mode": "border"},
            {"input_size": (3, 64, 96)},
            {"crop_pct": 1.2},
        ],
    )
    def test_refuses_what_it_does_not_cover(self, change):
        with pytest.raises(ValueError, match="device_transform=False"):
            DeviceTransform({**CONFIG, **change})
        WorkerTransform({**CONFIG, **change})(Image.new("RGB", (40, 30)))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_same_on_cuda(self):
        images = torch.from_numpy(np.stack(random_images(8, 32, 32))).permute(0, 3, 1, 2)
        transform = DeviceTransform(CONFIG)
        torch.testing.assert_close(transform(images.cuda()).cpu(), transform(images))


class TestWorkerTransform:
    def test_is_timms(self):
        image = Image.fromarray(random_images(1, 50, 70)[0])
        assert torch.equal(WorkerTransform(CONFIG)(image), create_transform(**CONFIG)(image))

    def test_augments_at_random(self):
        image = Image.fromarray(random_images(1, 50, 70)[0])
        torch.manual_seed(0)
        transform = WorkerTransform(CONFIG, {"scale": (0.1, 0.5)})
        assert not torch.equal(transform(image), transform(image))

    def test_augment_must_be_timms(self):
        with pytest.raises(TypeError, match="nonsense"):
            WorkerTransform(CONFIG, {"nonsense": 1})

    def test_can_be_sent_to_workers(self):
        image = Image.fromarray(random_images(1, 50, 70)[0])
        transform = WorkerTransform(CONFIG)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))


class TestDecodeTransform:
    def test_keeps_pixels(self):
        image = random_images(1, 8, 9)[0]
        decoded = DecodeTransform((9, 8))(Image.fromarray(image))
        assert decoded.dtype == torch.uint8
        assert torch.equal(decoded, torch.from_numpy(image).permute(2, 0, 1))

    def test_another_size_is_an_error(self):
        with pytest.raises(ValueError, match=r"9x8 pixels.*8x8.*device_transform=False"):
            DecodeTransform((8, 8))(Image.new("RGB", (9, 8)))


class TestToRgb:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
    def test_every_8_bit_mode(self, mode):
        image = to_rgb(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode))
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)

    def test_alpha_is_dropped(self):
        assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_more_than_8_bits_is_an_error(self, mode):
        with pytest.raises(ValueError, match="more than 8 bits"):
            to_rgb(Image.new(mode, (4, 4)))


class TestCompleteDataConfig:
    def test_overrides(self):
        config = complete_data_config(CONFIG, interpolation="bilinear", crop_pct=1.0)
        assert config == {**CONFIG, "interpolation": "bilinear", "crop_pct": 1.0}
        assert CONFIG["interpolation"] == "bicubic"

    def test_lists_from_yaml(self):
        config = complete_data_config({**CONFIG, "input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5]})
        assert config["input_size"] == (3, 96, 96)
        assert config["mean"] == (0.5, 0.5, 0.5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"means": 1}, "unknown: means"),
            ({"interpolation": "cubic"}, "bilinear, bicubic"),
            ({"crop_mode": "middle"}, "center, squash"),
            ({"crop_pct": 0.0}, "positive"),
            ({"input_size": (1, 96, 96)}, "RGB"),
            ({"mean": (0.5,)}, "three entries"),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(ValueError, match=message):
            complete_data_config({**CONFIG, **change})

    def test_missing_keys(self):
        with pytest.raises(ValueError, match="missing: mean, std"):
            complete_data_config({key: value for key, value in CONFIG.items() if key not in ("mean", "std")})
