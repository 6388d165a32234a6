"""``augment.on=gpu`` on a GPU: the CPU's bits, no waiting for the device, and runs that resume bit for bit."""

import pytest
import torch

from fcmae.config import AugmentConfig, DataConfig, compose
from fcmae.data.collate import Item, collate
from fcmae.data.pixels.augmented import Augmented
from fcmae.data.pixels.transforms import finetune_transform
from fcmae.data.samples import LabelledImages
from fcmae.data.sources import Synthetic
from fcmae.data.to_device import to_device
from fcmae.errors import Interrupted
from fcmae.training.run import finetune
from tests.conftest import TINY_FINETUNE
from tests.results import assert_same, newest

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
RECIPE = AugmentConfig("rand-m9-mstd0.5-inc1", 0.25, on="gpu")


@pytest.fixture(scope="module")
def batch() -> Augmented:
    """256 images with all operations."""
    samples = LabelledImages(Synthetic(256, 3, (250, 300)), finetune_transform(DataConfig(), RECIPE), seed=0)
    packed = collate([Item(samples[0, index], []) for index in range(256)]).opened().parts[0]
    assert len({name for operations in packed.operations for name, _ in operations}) == 15
    return packed.pin_memory()


def test_the_gpu_has_the_cpus_bits(batch):
    assert torch.equal(batch.to(CUDA, non_blocking=True).cpu(), batch.to(CPU))


def test_16_bits_reach_the_gpu():
    cfg = DataConfig(image_size=32, bit_depth=12)
    transform = finetune_transform(cfg, AugmentConfig(random_erasing=0.9, on="gpu"))
    images = torch.randint(0, 4096, (4, 3, 40, 40)).to(torch.uint16)
    packed = collate([Item((transform(image), 0), []) for image in images]).parts[0]
    assert torch.equal(packed.to(CUDA).cpu(), packed.to(CPU))


def test_the_host_does_not_wait_for_the_gpu(batch):
    batch.to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.to(CUDA, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_algorithms_give_the_same(batch):
    expected = batch.to(CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(batch.to(CUDA), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_graphed_run_resumes_bit_exactly(tmp_path):
    overrides = [
        *TINY_FINETUNE[1:],
        "trainer.device=cuda",
        "trainer.compile=true",
        "precision=bf16",
        "loader.workers=2",
    ]
    overrides += ["augment=in1k", "augment.on=gpu", "augment.label_smoothing=0.1", "optim.ema_decay=0.9"]
    finetune(compose("finetune", overrides), tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(compose("finetune", [*overrides, "trainer.max_steps=3"]), tmp_path / "parts")
    finetune(compose("finetune", overrides), tmp_path / "parts")
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    assert_same(whole["ema"], parts["ema"])


@pytest.mark.parametrize("shape", [(8, 3, 300, 300), (2, 3, 8, 8)])
def test_copies_beside_a_step_arrive_before_what_uses_them(shape):
    """Also where the host is many batches ahead of the device, and memory is used again."""
    batches = [torch.full(shape, number, dtype=torch.uint8).pin_memory() for number in range(8)]
    sums, work = [], torch.randn(4096, 4096, device=CUDA)
    for batch in batches * 4:
        for _ in range(5):
            work = (work @ work).clamp(-1, 1)
        sums.append(to_device(batch, CUDA).long().sum())
    assert [int(value) for value in sums] == [number * batches[0].numel() for number in range(8)] * 4
