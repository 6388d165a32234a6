"""Numbers per pixel: image to image."""

import io
import math
from collections.abc import Iterable
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.config import FinetuneConfig
from fcmae.data.pixels.maps import value_map
from fcmae.data.sources import Sample, Source
from fcmae.data.sources.map_files import map_of
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.imports import needed
from fcmae.messages import print_once_rank0
from fcmae.models.objective import Predictions
from fcmae.precision import no_autocast
from fcmae.tasks.objectives.per_image import metric
from fcmae.tasks.objectives.per_pixel import PerPixel, loss_terms

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales of MS-SSIM (Wang et al. 2003), the finest first."""
KERNEL = 11
"""Pixels per side of the window of SSIM."""
SIGMA = 1.5
"""Standard deviation in pixels of the window's Gaussian weights."""
C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM for values in 0..1."""
LEAST = 1e-4
"""Smallest similarity of a scale: powers of less have no finite gradient."""
MOST_PSNR = 100.0
"""Decibels, which an exact prediction counts as."""


class Translate(PerPixel):
    """Numbers per pixel, standardised by the training maps, reported in their own units.

    Args:
        channels: of the maps.
        loss: ``l1``, ``mse``, ``ms_ssim`` (1 - MS-SSIM), sums such as ``l1+ms_ssim``, or weights by name.
        data_range: the span of values for SSIM and PSNR; None = that of the training maps.
        width: channels of the head; None = 128 of ``unet``, 512 of ``upernet``.
        head: ``unet`` or ``upernet``.
        best: the metric whose best checkpoint is kept: ``ssim``, ``psnr``, ``pearson`` or ``-mae``.
    """

    ending = ".tif"

    def __init__(
        self,
        channels: Any = None,
        loss: Any = "l1",
        data_range: float | None = None,
        width: int | None = None,
        best: str = "ssim",
        head: str = "unet",
    ) -> None:
        if type(channels) is not int or not 0 < channels <= 4096:
            raise ValueError(f"channels must be an integer from 1 to 4096; got {channels!r}")
        if data_range is not None and not 0 < data_range < math.inf:
            raise ValueError(f"data_range must be a positive number or null; got {data_range!r}")
        super().__init__(channels, width, head)
        given = {name.replace("-", "_"): w for name, w in loss.items()} if isinstance(loss, dict) else loss
        self.terms = loss_terms(given.replace("-", "_") if isinstance(given, str) else given, ("l1", "mse", "ms_ssim"))
        each = [f"{kind}_{number}" for kind in ("mae", "pearson") for number in range(channels)] if channels > 1 else []
        self.best = metric(best, ("ssim", "psnr", "pearson", "mae", *each))
        self.data_range = data_range
        self.mean, self.std = torch.zeros(channels), torch.ones(channels)
        self.low, self.span = torch.zeros(channels), torch.ones(channels)

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        if "ms_ssim" in self.terms and min(cfg.data.size) < KERNEL:
            raise UsageError(f"data.image_size must be at least {KERNEL} with objective.loss=ms_ssim")
        count, total, squares = torch.zeros(3, self.channels, dtype=torch.float64)
        low, high = torch.full((self.channels,), math.inf), torch.full((self.channels,), -math.inf)
        similar = "ms_ssim" not in self.terms and self.best != "ssim"  # or a map has a window, which these need
        for target in self.some_targets(source, cfg):
            values = target.flatten(1)
            valid = values.isfinite()
            similar = similar or bool(_windows((~valid).view_as(target).float()).any())
            known = torch.where(valid, values, 0).double()
            count, total, squares = count + valid.sum(1), total + known.sum(1), squares + known.square().sum(1)
            low = torch.minimum(low, torch.where(valid, values, math.inf).amin(1))
            high = torch.maximum(high, torch.where(valid, values, -math.inf).amax(1))
        flat = [str(channel) for channel in range(self.channels) if not low[channel] < high[channel]]
        if flat:
            raise UsageError(f"the target maps have one value only, or none, in channel {', '.join(flat)}")
        if not similar:
            self._warn_of_ssim()
        mean = total / count
        self.mean, self.std = mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()
        self.low, self.span = low, high - low
        if self.data_range is not None:
            self.span = torch.full_like(self.span, self.data_range)

    def _warn_of_ssim(self) -> None:
        """Of training maps where each window touches a pixel without a value. Raises UsageError of the loss."""
        what = f"each window of {KERNEL}x{KERNEL} pixels in the target maps touches NaN"
        if "ms_ssim" in self.terms:
            raise UsageError(f"{what}, so that objective.loss=ms_ssim has nothing to learn from; give l1 or mse")
        print_once_rank0(f"warning: {what}, so that there is no ssim; objective.best=-mae chooses the best checkpoint")

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "low": self.low, "span": self.span}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.std, self.low, self.span = (state[name] for name in ("mean", "std", "low", "span"))

    def target(self, sample: Sample, source: Source, index: int) -> Tensor:
        """float32 ``[channels, H, W]`` as the file has them, NaN where there is no value."""
        given, name = map_of(sample, source, index)
        return value_map(given, name, self.channels, self.max_pixels)

    def loss_of(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each term is a mean over the values of a sample that are there, ``ms_ssim`` over its windows; 0 without."""
        mean, std = (self._column(name, output) for name in ("mean", "std"))
        valid = target.isfinite()
        truth = torch.where(valid, (target - mean) / std, 0)
        count = valid.sum((1, 2, 3)).clamp(min=1)
        parts = {}
        for name, of in (("l1", F.l1_loss), ("mse", F.mse_loss)):
            if name in self.terms:
                errors = torch.where(valid, of(output, truth, reduction="none"), 0)
                parts[name] = errors.sum((1, 2, 3)) / count
        if "ms_ssim" in self.terms:
            found, truth = (self._scaled(x * std + mean) for x in (torch.where(valid, output, truth), truth))
            parts["ms_ssim"] = 1 - ms_ssim(found, truth, valid)
        return sum(weight * parts[name] for name, weight in self.terms.items()), parts  # type: ignore[return-value]

    def _column(self, name: str, like: Tensor) -> Tensor:
        """An attribute ``[channels]`` as ``[1, channels, 1, 1]`` beside a tensor."""
        return self.on_device(name, like.device).to(like.dtype)[None, :, None, None]

    def _scaled(self, values: Tensor) -> Tensor:
        """Values in their own units ``[N, channels, H, W]`` to about 0..1."""
        return (values - self._column("low", values)) / self._column("span", values)

    def predict(self, output: Tensor) -> Tensor:
        """The values in their own units, ``[N, channels, H, W]``."""
        return output * self._column("std", output) + self._column("mean", output)

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        """``mae`` over all values in their own units; means over images of ``pearson``, ``ssim``, ``psnr`` in dB.

        Of several channels ``mae_N`` and ``pearson_N`` too. An image whose target has one value only has no Pearson
        coefficient, and one whose windows all touch a pixel without a value has no SSIM.
        """
        sums = torch.zeros(4, self.channels, dtype=torch.float64, device=world.device)
        whole = torch.zeros(5, dtype=torch.float64, device=world.device)
        for outputs, targets, _ in share:
            for output, target in zip(outputs, targets, strict=True):
                of_channels, of_image = self._image(output, target)
                sums += of_channels
                whole += of_image
        error, values, pearson, known = world.sum(sums).cpu()
        ssim, psnr, with_ssim, with_psnr, images = world.sum(whole).tolist()
        result = {
            "mae": float((error / values).nanmean()),
            "pearson": float((pearson / known).nanmean()),
            "ssim": ssim / with_ssim if with_ssim else math.nan,
            "psnr": psnr / with_psnr if with_psnr else math.nan,
        }
        if self.channels > 1:
            for name, each in (("mae", error / values), ("pearson", pearson / known)):
                result |= {f"{name}_{channel}": float(value) for channel, value in enumerate(each)}
        return {**result, "images": int(images)}

    def _image(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of an image: of errors, values, Pearson coefficients and their number ``[4, channels]``; SSIM, PSNR, how
        many there are of these, and 1.
        """
        from torchmetrics.functional import pearson_corrcoef
        from torchmetrics.functional.image import peak_signal_noise_ratio

        rows = []
        valid = target.isfinite()
        for found, truth, where in zip(output.double(), target.double(), valid, strict=True):
            found, truth = found[where], truth[where]
            varies = len(truth) > 1 and bool(truth.std() > 0)
            moves = varies and bool(found.std() > 0)
            coefficient = pearson_corrcoef(found, truth) if moves else truth.new_zeros(())
            rows.append(torch.stack([(found - truth).abs().sum(), where.sum(), coefficient, where.new_tensor(varies)]))
        truth = torch.where(valid, target, self._column("mean", target)[0])
        found, truth = (self._scaled(x[None]) for x in (torch.where(valid, output, truth), truth))
        ssim = psnr = truth.new_zeros(())
        windows, measured = False, bool(valid.any()) and min(truth.shape[-2:]) > KERNEL // 2
        if measured:
            (ssim,), _, (windows,) = _ssim(found, truth, (~valid[None]).to(truth.dtype))
            psnr = peak_signal_noise_ratio(found[0][valid], truth[0][valid], 1.0).clamp(max=MOST_PSNR)
        return torch.stack(rows, dim=1), torch.stack([ssim, psnr, *ssim.new_tensor([windows, measured, 1])])

    def error(self, target: Tensor, predicted: Tensor) -> float:
        """The mean absolute error in standard deviations of the training maps."""
        std = self.std.to(target)[:, None, None]
        return float(((predicted - target) / std).abs()[target.isfinite()].mean())

    def write(self, final: Tensor, file: IO[bytes]) -> None:
        """A TIFF of float32, one plane per channel."""
        with needed("predictions as TIFF need tifffile: pip install 'fcmae[tiff]'"):
            import tifffile
        planes = final.float().numpy()
        separate = "separate" if self.channels > 1 else None
        pixels = planes if self.channels > 1 else planes[0]
        buffer = io.BytesIO()  # tifffile wants a file with a name, or none
        tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig=separate)
        file.write(buffer.getbuffer())

    def panels(self, target: Tensor, predicted: Tensor) -> list[Tensor]:
        """Both as grey, or of three channels and more as red, green and blue; grey where there is no value."""
        shown = [self._scaled(x[None])[0][: 3 if self.channels >= 3 else 1] for x in (target, predicted)]
        return [x.clamp(0, 1).nan_to_num(0.5).expand(3, -1, -1) for x in shown]


def ms_ssim(found: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """MS-SSIM of each sample, ``[N]``, of values ``[N, C, H, W]`` in 0..1, over windows of ``valid`` pixels alone.

    Of images that are too small for five scales as many as fit, their exponents scaled to the same sum; of a sample
    those that have a window, and 1 without one.
    """
    scales = min(len(BETAS), 1 + int(math.log2(min(found.shape[-2:]) / KERNEL)))
    sums = [sum(BETAS[: scale + 1]) for scale in range(scales)]
    exponents = [beta * sum(BETAS) / sums[-1] for beta in BETAS[:scales]]
    with no_autocast(found.device):
        invalid, parts = (~valid).to(found.dtype), []
        for _ in range(scales):
            parts.append(_ssim(found, truth, invalid))
            found, truth, invalid = F.avg_pool2d(found, 2), F.avg_pool2d(truth, 2), F.max_pool2d(invalid, 2)
        result = finer = found.new_ones(len(found))
        for scale, (exponent, (similarity, contrast, exists)) in enumerate(zip(exponents, parts, strict=True)):
            whole = finer * similarity.clamp(min=LEAST) ** exponent
            if scale + 1 < scales:
                exists, whole = exists & ~parts[scale + 1][2], whole ** (sums[-1] / sums[scale])
            result = torch.where(exists, whole, result)
            finer = finer * contrast.clamp(min=LEAST) ** exponent
    return result


def _ssim(found: Tensor, truth: Tensor, invalid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SSIM and contrast of each sample, ``[N]``, of ``[N, C, H, W]`` in 0..1, and whether it has a window without an
    ``invalid`` pixel, over which these are means.

    As torchmetrics has it, which gives no map of the contrast: Gaussian windows, mirrored borders, and contrast of the
    windows that lie inside alone.
    """
    reach, channels = KERNEL // 2, found.shape[1]
    bell = torch.exp(-((torch.arange(-reach, reach + 1, dtype=found.dtype, device=found.device) / SIGMA) ** 2) / 2)
    bell = (bell / bell.sum())[None]
    x, y = (F.pad(values, [reach] * 4, mode="reflect") for values in (found, truth))
    stacked = torch.cat((x, y, x * x, y * y, x * y))
    means = F.conv2d(stacked, (bell.T @ bell).expand(channels, 1, KERNEL, KERNEL), groups=channels)
    mean_x, mean_y, square_x, square_y, product = means.split(len(found))
    xx, yy, xy = mean_x.pow(2), mean_y.pow(2), mean_x * mean_y
    upper = 2 * (product - xy) + C2
    lower = (square_x - xx).clamp(min=0) + (square_y - yy).clamp(min=0) + C2
    similarity = ((2 * xy + C1) * upper) / ((xx + yy + C1) * lower)
    counted = _windows(invalid)
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    exists = counted.flatten(1).any(1)
    return _mean_of(similarity, counted), _mean_of((upper / lower)[inside], counted[inside]), exists


def _windows(invalid: Tensor) -> Tensor:
    """Around which pixels of ``[..., H, W]`` a window has none that is ``invalid`` (1; 0 = valid)."""
    return F.max_pool2d(invalid, KERNEL, 1, KERNEL // 2) == 0


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N]``: the mean of those that count, 0 without one. If all do, the bits are ``mean``'s."""
    counted = counted.flatten(1)
    count = counted.sum(1)
    # Two tensors: a number divided by a tensor is multiplied by its reciprocal, and n * (1 / n) may not be 1.
    factor = torch.full_like(count, counted.shape[1]) / count.clamp(min=1)
    return torch.where(counted, values.flatten(1), 0).mean(1) * factor
