"""Fine-tuning from image to image: losses, metrics, and a run to TIFF files."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics import PearsonCorrCoef
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from fcmae.config import AugmentConfig, DataConfig, FinetuneConfig, LoaderConfig
from fcmae.data.pixels.crops import cut
from fcmae.data.pixels.decode import Encoded
from fcmae.data.pixels.maps import value_map
from fcmae.data.pixels.pairs import PairTransform
from fcmae.errors import UsageError
from fcmae.models.objective import Predictions
from fcmae.tasks.objectives import Translate
from fcmae.tasks.objectives.translate import BETAS, ms_ssim
from tests.conftest import TINY_FINETUNE, run_python
from tests.dense_files import write_squares
from tests.results import assert_same, metrics_of, newest
from tests.unit.test_segment import CPU, Listed


def fitted(maps, **arguments):
    translate = Translate(len(maps[0]), **arguments)
    translate.fit(Listed(maps), FinetuneConfig().settled({}))
    return translate


def test_values_are_standardised_by_the_training_maps():
    maps = [torch.randn(2, 6, 7) * torch.tensor([3.0, 0.1])[:, None, None] + 5 for _ in range(4)]
    maps[1][0, :3] = torch.nan
    translate = fitted(maps)
    values = torch.stack(maps).transpose(0, 1).flatten(1)
    torch.testing.assert_close(translate.mean, values.nanmean(1))
    torch.testing.assert_close(translate.std[1], values[1].std(correction=0))
    torch.testing.assert_close(translate.span[1], values[1].max() - values[1].min())
    target = torch.stack(maps)
    perfect = (target.nan_to_num(0) - translate.mean[:, None, None]) / translate.std[:, None, None]
    assert translate.loss(perfect, target)[0].abs().max() < 1e-5
    torch.testing.assert_close(translate.predict(perfect), target.nan_to_num(0))
    again = Translate(2)
    again.load_state_dict(translate.state_dict())
    assert again.std.equal(translate.std)
    assert fitted(maps, data_range=7).span.tolist() == [7, 7]
    with pytest.raises(UsageError, match="the target maps have one value only, or none, in channel 1"):
        fitted([torch.stack([torch.randn(4, 4), torch.ones(4, 4)])])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"crop_zoom": [1.0, 1.0]},
        {"crop_zoom": [0.5, 2.0], "vflip": 0.5, "rot90": True},
        {"fit": "pad", "crop_zoom": [0.5, 2.0]},
        {"fit": "pad"},
    ],
)
@pytest.mark.parametrize("size", [(50, 40), (150, 170)])
def test_a_pixel_without_a_value_takes_those_that_the_filter_makes_of_it(how, size):
    """torch's own resize spreads a NaN to just these. A map without one is resized as an image is."""
    cfg = DataConfig(image_size=64, mean=[0.0] * 3, std=[1.0] * 3, **how)
    transform, image = PairTransform(cfg, AugmentConfig()), torch.zeros(3, *size, dtype=torch.uint8)
    whole = torch.randn(2, *size)
    target, filled = whole.clone(), whole.clone()
    for y, x in [(7, 3), (20, 30), (49, 11)]:
        target[0, y, x], filled[0, y, x] = torch.nan, 1e6
    for seed in range(10):
        random.seed(seed)
        box = transform.crop.box(size, random.random)
        random.seed(seed)
        found = transform(image, target)[1]
        random.seed(seed)
        before = transform(image, whole)[1]
        shown = box.shown or ((box.height, box.width) if "fit" in how else (64, 64))

        def expected(pixels, box=box, shown=shown):
            part = pixels[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
            if part.shape[2:] != shown:
                part = F.interpolate(part, shown, mode="bicubic", antialias=True)
            part = part.flip([dim for dim, flipped in ((2, box.vflip), (3, box.flip)) if flipped])
            return part[0].rot90(box.turns, (1, 2))

        rows, cols = expected(target).shape[1:]
        assert found[:, rows:].isnan().all()
        assert found[:, :, cols:].isnan().all()
        assert before[:, :rows, :cols].equal(cut(whole, box, shown))
        inside, missing = found[:, :rows, :cols], expected(target).isnan()
        assert inside.isnan().equal(missing)
        assert inside[~missing].equal(before[:, :rows, :cols][~missing])
        torch.testing.assert_close(inside[~missing], expected(filled)[~missing], rtol=1e-5, atol=1e-5)


def test_losses_are_means_over_what_is_there():
    maps = [torch.randn(1, 16, 16) for _ in range(3)]
    translate = fitted(maps, loss={"l1": 0.5, "mse": 2})
    target, output = torch.stack(maps), torch.randn(3, 1, 16, 16, requires_grad=True)
    target[0, :, :5] = torch.nan
    target[2] = torch.nan
    losses, parts = translate.loss(output, target)
    truth = (target - translate.mean) / translate.std
    for number in range(2):
        of = ~truth[number].isnan()
        l1, mse = (loss(output[number][of], truth[number][of]) for loss in (F.l1_loss, F.mse_loss))
        torch.testing.assert_close([parts["l1"][number], parts["mse"][number]], [l1, mse])
        torch.testing.assert_close(losses[number], 0.5 * l1 + 2 * mse)
    losses.sum().backward()
    assert losses[2] == 0
    assert output.grad.isfinite().all()
    assert (output.grad[0, :, :5] == 0).all()


def test_ms_ssim_is_that_of_torchmetrics():
    found, truth = torch.rand(2, 2, 2, 192, 200)
    found = (0.5 * found + 0.5 * truth).requires_grad_()
    valid = torch.ones_like(truth, dtype=torch.bool)
    expected = torchmetrics_ms_ssim(found, truth, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(found, truth, valid), expected)
    assert ms_ssim(found[..., :11, :11], truth[..., :11, :11], valid[..., :11, :11]).shape == (2,)
    small = truth[..., :50, :50]
    torch.testing.assert_close(ms_ssim(small, small, valid[..., :50, :50]), torch.ones(2))
    (1 - ms_ssim(1 - truth + 0 * found, truth, valid)).sum().backward()
    assert found.grad.isfinite().all()  # of dissimilar images


def ssim_of_windows(found, truth, of):
    """The mean over the windows of ``of``, each by its own sums in float64, and that of their contrast."""
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    weights, values = (bell[:, None] * bell / bell.sum() ** 2), []
    for y, x in of:
        a, b = (part[y - 5 : y + 6, x - 5 : x + 6].double() for part in (found, truth))
        assert not b.isnan().any()
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        contrast = (2 * (weights * (a - mean_a) * (b - mean_b)).sum() + 0.03**2) / (var_a + var_b + 0.03**2)
        values.append([contrast * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2), contrast])
    return torch.tensor(values).mean(0)


def test_ssim_is_of_windows_where_all_pixels_have_a_value():
    """Only a block has values, and so two scales have windows: at the finest 14 x 16, at the other 2 x 3."""
    found, truth = torch.rand(2, 1, 1, 48, 60)
    found = 0.5 * found + 0.5 * truth
    target = torch.full_like(truth, torch.nan)
    target[..., 10:34, 20:46] = truth[..., 10:34, 20:46]
    valid = target.isfinite()
    fine = ssim_of_windows(found[0, 0], target[0, 0], [(y, x) for y in range(15, 29) for x in range(25, 41)])
    halves = [F.avg_pool2d(x, 2)[0, 0] for x in (found, target)]
    coarse = ssim_of_windows(*halves, [(y, x) for y in (10, 11) for x in (15, 16, 17)])
    total = sum(BETAS) / (BETAS[0] + BETAS[1])
    expected = (fine[1] ** BETAS[0] * coarse[0] ** BETAS[1]) ** total
    torch.testing.assert_close(ms_ssim(found, target.nan_to_num(0.5), valid)[0].double(), expected, rtol=1e-4, atol=0)
    translate = Translate(1)
    result = translate.metrics([Predictions(found, target, torch.tensor([0]))], CPU)
    assert result["ssim"] == pytest.approx(fine[0].item(), rel=1e-4)


def test_pixels_without_a_value_are_not_perfect():
    """Unlike images stay so, and gradients are finite, also of a sample without a window and of a finer scale alone."""
    translate = fitted([torch.rand(1, 64, 64)], loss="ms_ssim")
    target, output = torch.rand(2, 4, 1, 64, 64)
    output.requires_grad_()
    target[1, :, :, 32:] = torch.nan
    target[2, :, :50] = torch.nan
    target[3, :, ::4] = torch.nan
    losses = translate.loss(output, target)[0]
    assert (losses[:3] > 0.8).all()
    assert losses[3] == 0
    losses.sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad[target.isnan()] == 0).all()
    found, truth = translate.predict(output.detach()), target
    results = [
        translate.metrics([Predictions(found[i : i + 1], truth[i : i + 1], torch.tensor([i]))], CPU) for i in range(4)
    ]
    assert max(abs(result["ssim"]) for result in results[:3]) < 0.1
    assert np.isnan(results[3]["ssim"])
    assert np.isfinite(results[3]["psnr"])


def test_maps_without_a_window_are_named(capsys):
    target = torch.rand(1, 32, 32)
    target[:, ::4] = torch.nan
    with pytest.raises(
        UsageError, match="each window of 11x11 pixels in the target maps touches NaN, so that objective.loss="
    ):
        fitted([target], loss="l1+ms_ssim")
    fitted([target, torch.rand(1, 32, 32)], loss="ms_ssim")
    fitted([target], best="psnr")
    assert not capsys.readouterr().err
    fitted([target])
    assert "so that there is no ssim; objective.best=-mae" in capsys.readouterr().err


def test_metrics_are_those_of_torchmetrics_in_the_units_of_the_maps():
    maps = [100 * torch.rand(2, 20, 24) + torch.tensor([0, 300])[:, None, None] for _ in range(3)]
    translate = fitted(maps)
    target = torch.stack(maps)
    found = target + 10 * torch.randn_like(target)
    share = [Predictions(found[i : i + 1], target[i : i + 1], torch.tensor([i])) for i in range(3)]
    result = translate.metrics(share, CPU)
    assert repr(result["images"]) == "3"
    assert result["mae"] == pytest.approx((found - target).abs().mean().item(), rel=1e-5)
    each = [[PearsonCorrCoef()(found[i, c].flatten(), target[i, c].flatten()) for i in range(3)] for c in range(2)]
    assert [result["pearson_0"], result["pearson_1"]] == pytest.approx(np.mean(each, axis=1).tolist(), rel=1e-4)
    scaled = [(x - translate.low[:, None, None]) / translate.span[:, None, None] for x in (found, target)]
    ssim, psnr = StructuralSimilarityIndexMeasure(data_range=1.0), PeakSignalNoiseRatio(1.0, dim=(1, 2, 3))
    assert result["ssim"] == pytest.approx(ssim(*scaled).item(), rel=1e-4)
    assert result["psnr"] == pytest.approx(psnr(*scaled).item(), rel=1e-4)
    nothing = torch.full_like(target[:1], torch.nan)
    more = translate.metrics([*share, Predictions(found[:1], nothing, torch.tensor([3]))], CPU)
    assert {**more, "images": 3} == pytest.approx(result)


def test_the_loss_copies_nothing_from_the_host_again():
    """A CUDA graph cannot record such a copy. An evaluation may be the first to need one."""
    translate = fitted([torch.randn(1, 16, 16)], loss="l1+ms_ssim")
    with torch.inference_mode():
        translate.predict(torch.zeros(1, 1, 16, 16))
    copies = {name: translate.on_device(name, torch.device("cpu")) for name in ("mean", "std", "low", "span")}
    translate.loss(torch.zeros(1, 1, 16, 16, requires_grad=True), torch.randn(1, 1, 16, 16))[0].sum().backward()
    for name, copy in copies.items():
        assert translate.on_device(name, torch.device("cpu")) is copy
        assert not copy.is_inference()
    translate.load_state_dict({name: value + 1 for name, value in translate.state_dict().items()})
    assert translate.on_device("mean", torch.device("cpu")) is translate.mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "channels must be an integer from 1 to 4096; got None"),
        ({"channels": 1, "loss": "dice"}, "loss must be one or several of l1, mse, ms_ssim"),
        ({"channels": 1, "data_range": 0}, "data_range must be a positive number or null; got 0"),
        ({"channels": 1, "best": "miou"}, "best must be one of ssim, psnr, pearson, mae"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Translate(**arguments)


@pytest.fixture(scope="module")
def blurred(tmp_path_factory):
    """Images, and the red and green of each halved, as float32."""
    folder = write_squares(tmp_path_factory.mktemp("blurred"), 6)
    (folder / "targets" / "s").mkdir(parents=True)
    for number in range(6):
        pixels = np.array(Image.open(folder / "images" / "s" / f"{number}.png"), np.float32)
        np.save(folder / "targets" / "s" / f"{number}.npy", pixels[..., :2] / 2)
    return folder


def translating(folder):
    data = (f"data.path={folder}/images", f"data.target_path={folder}/targets", f"data.val_path={folder}/images")
    of = ("objective=translate", "objective.channels=2", "objective.width=8", "objective.loss=l1+ms-ssim")
    return (*TINY_FINETUNE, *data, *of, "data.name=imagefolder", "optim.global_batch_size=3", "schedule.epochs=2")


def test_a_run_to_predictions(fcmae_here, tmp_path, blurred):
    pytest.importorskip("tifffile")
    args = translating(blurred)
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=1", check=75)
    fcmae_here(*args, "hydra.run.dir=cut")
    states = [newest(tmp_path / run) for run in ("whole", "cut")]
    assert_same(states[0]["model"], states[1]["model"])
    lines = metrics_of(tmp_path / "whole")
    assert {"loss_l1", "loss_ms_ssim"} <= lines[0].keys()
    last = [line for line in lines if "ssim" in line][-1]
    (picture, *_) = sorted((tmp_path / "whole" / "reconstructions").glob("predictions_*.png"))
    with Image.open(picture) as image:
        assert image.size == (3 * 56 + 4 * 4, 4 * 40 + 5 * 4)
    fcmae_here("evaluate", "checkpoint=whole@last", "out=result.json", "batch_size=4", "loader.workers=0")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["pearson"] == pytest.approx(last["pearson"], rel=1e-5)
    fcmae_here("predict", "whole@last", f"{blurred}/images", "--out", "out", "loader.workers=0")
    errors = []
    for number in range(6):
        data = (tmp_path / "out" / "s" / f"{number}.tif").read_bytes()
        found = value_map(Encoded(data, "a"), "a", 2, LoaderConfig.max_pixels)
        truth = np.load(blurred / "targets" / "s" / f"{number}.npy").transpose(2, 0, 1)
        errors.append((found - torch.from_numpy(truth)).abs().mean().item())
    assert np.mean(errors) == pytest.approx(result["mae"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_are_one(blurred, tmp_path):
    results = []
    for ranks in (1, 2):
        run = ("-m", "fcmae.cli", *translating(blurred), f"hydra.run.dir=run{ranks}", "schedule.epochs=1")
        run_python(tmp_path, *run, "optim.global_batch_size=4", ranks=ranks)
        results.append(metrics_of(tmp_path / f"run{ranks}"))
    for name in ("loss", "mae", "pearson", "ssim", "psnr"):
        one, two = ([line[name] for line in lines if name in line] for lines in results)
        assert one
        assert one == pytest.approx(two, rel=1e-6)
