"""Decoding on the GPU, against the CPU's."""

import pytest
import simplejpeg
import torch

from fcmae.config import DataConfig
from fcmae.data.decoding import decoded
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.crops import Box, cut
from fcmae.data.pixels.decode import Encoded, PixelFormat, decode
from fcmae.data.pixels.on_device import decode_all
from fcmae.data.pixels.transforms import normalized, pretrain_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.resident import Resident
from fcmae.data.samples import MaskedImages
from fcmae.errors import UsageError
from tests.unit.test_batches import Files
from tests.unit.test_crops import texture
from tests.unit.test_decoded import TURNS, Once, data, folder, resident_batches  # noqa: F401
from tests.unit.test_normalize import MODES, TYPES, images
from tests.unit.test_pixels import encoded, noise

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def tensor(image):
    return torch.frombuffer(bytearray(image.data), dtype=torch.uint8)


def difference(ours, theirs):
    return (ours.cpu().float() - theirs.float()).abs().mean()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_nvjpeg_gives_the_pixels_of_libjpeg_but_for_smoothed_chroma(options):
    """Subsampled chroma is repeated, as ``fastupsample`` does: of photographs that changes less than a level."""
    images = [encoded(texture(375 + i, 500), "JPEG", quality=90, **options) for i in range(4)]
    decoded = decode_all([tensor(image) for image in images], ["a"] * 4, CUDA)
    for ours, image in zip(decoded, images, strict=True):
        assert ours.device.type == "cuda"
        repeated = simplejpeg.decode_jpeg(image.data, fastupsample=True)
        assert difference(ours, torch.from_numpy(repeated).permute(2, 0, 1)) < 1


def test_nvjpeg_gives_nearly_the_pixels_of_libjpeg():
    image = encoded(texture(375, 500, roughness=1.5), "JPEG", quality=90)
    (ours,) = decode_all([tensor(image)], ["a"], CUDA)
    assert difference(ours, decode(image, 3)) < 2


def test_what_nvjpeg_refuses_comes_from_the_cpu():
    good = encoded(texture(64, 64), "JPEG", subsampling=0)
    torn = encoded(noise(64, 64, 3), "PNG")
    decoded = decode_all([tensor(good), tensor(torn)], ["good", "a png"], CUDA)
    assert difference(decoded[0], decode(good, 3)) < 2
    assert torch.equal(decoded[1].cpu(), decode(Encoded(torn.data, "a png"), 3))


def test_crops_on_the_gpu_are_those_of_the_cpu():
    """The CPU's filter rounds to whole levels between its two passes, which shows most at hard edges."""
    for roughness, largest in ((1.0, 8), (1.5, 2)):
        pixels = torch.from_numpy(texture(375, 500, roughness)).permute(2, 0, 1)
        for box in (Box(10, 20, 300, 250, True), Box(0, 0, 100, 120, False)):
            ours, theirs = cut(pixels.to(CUDA), box, (224, 224)), cut(pixels, box, (224, 224))
            assert difference(ours, theirs) < 0.3
            assert (ours.cpu().int() - theirs.int()).abs().max() <= largest


def test_batches_decoded_on_the_gpu_are_those_of_the_cpu():
    crop = pretrain_transform(DataConfig(image_size=32))
    plan = BatchPlan.create(24, 8, 8, 1, seed=0)

    def read(undecoded):
        return TrainBatches(
            MaskedImages(Files(), crop, (2, 2), seed=0, on_device=undecoded),
            plan,
            rank=0,
            steps=range(3),
            workers=Workers(2, pin_memory=True),
        )

    for ours, theirs in zip(read(True), read(False), strict=True):
        imgs = ours[0].to(CUDA, non_blocking=True)
        assert (imgs.dtype, imgs.shape) == (torch.uint8, theirs[0].shape)
        assert difference(imgs, theirs[0]) < 3
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("tf32", [False, True])
def test_crops_of_images_on_the_gpu_are_those_of_images_in_memory(folder, crops, tf32, monkeypatch):  # noqa: F811
    """Also while training uses TF32 and bf16, and with pinned memory."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    how = {"crops_per_image": crops, "pad": 30, **TURNS}
    expected = resident_batches(data(folder, "ram", **how), crops=crops)
    with torch.autocast("cuda", torch.bfloat16):
        found = resident_batches(data(folder, "gpu", **how), 2, crops=crops, device=CUDA, pin=True)
        for (theirs, noise), (ours, same) in zip(expected, found, strict=True):
            assert ours.dtype == torch.uint8
            assert (ours.int() - theirs.int()).abs().max() <= 1
            assert torch.equal(noise, same)


def test_the_host_does_not_wait_for_crops_of_images_on_the_gpu():
    resident = Resident(decoded(Once(), PixelFormat(1)), None, (4, 4), pad=1)
    index, boxes = torch.tensor([0, 1]), torch.tensor([[0, 0, 3, 4, 0, 1, 0], [1, 0, 4, 3, 1, 0, 3]])
    resident.crops(index, boxes, CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        resident.crops(index, boxes, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_that_do_not_fit_on_the_gpu_are_refused(monkeypatch):
    images = decoded(Once(), PixelFormat(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64, 2**30))
    with pytest.raises(UsageError, match=r"data.cache=gpu needs .* GiB for 3 decoded images; 0.0 GiB of memory of"):
        Resident(images, None, (4, 4)).on(CUDA)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_way_to_normalise_is_the_same_on_the_device(mode, dtype):
    keys, white = TYPES[dtype]
    cfg = DataConfig(in_chans=2, normalize=mode, **keys, **MODES[mode])
    raw = torch.from_numpy(images(dtype, 4))
    raw = raw.float() / white if mode == "image" else raw  # what transforms give
    torch.testing.assert_close(normalized(raw.to(CUDA), cfg).cpu(), normalized(raw, cfg), rtol=1e-6, atol=1e-6)
