"""Config of ``fcmae prepare``."""

from dataclasses import dataclass, field

from fcmae.config.checks import check, check_one_of, check_positive, check_seed, mistake
from fcmae.config.data import DataConfig
from fcmae.config.loader import LoaderConfig
from fcmae.config.normalize import NORMALIZE


@dataclass
class PreparedDataConfig(DataConfig):
    """Group ``data``; only the keys about reading images have an effect."""

    stats: bool = False
    """Compute mean and standard deviation: of what was written to ``out``, or of the images where that is not set."""
    stats_samples: int | None = 10_000
    """Images to compute them from, drawn by the seed; None = all."""
    percentiles: list[float] = field(default_factory=lambda: [0.5, 99.5])
    """With normalize=percentile: those that become data.low and data.high, in percent of the pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            mistake(f"fcmae prepare reads all channels; leave out data.channels={self.channels}")
        if self.cache is not None:
            mistake(f"fcmae prepare reads every image once; leave out data.cache={self.cache}")
        check_positive("data.stats_samples", self.stats_samples)
        low, high = self.percentiles[:1], self.percentiles[1:]
        ok = len(self.percentiles) == 2 and 0 <= low[0] < high[0] <= 100
        check("data.percentiles", self.percentiles, ok, "[low, high] with 0 <= low < high <= 100")

    def _check_normalisation(self) -> None:
        """Nothing is normalised here."""
        check_one_of("data.normalize", self.normalize, NORMALIZE)
        self.mean, self.std = [0.0] * self.in_chans, [1.0] * self.in_chans


@dataclass
class PrepareConfig:
    """``fcmae prepare``."""

    data: PreparedDataConfig = field(default_factory=PreparedDataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    split: str = "train"
    """``train`` for the images of data.path, ``val`` for data.val_path; the tar files are named after it."""
    out: str | None = None
    """The folder for the tar files."""
    short_side: int | None = None
    """Larger images are resized to it, converted to data.in_chans and encoded again; None = keep the files."""
    encode: str = "jpeg"
    """How images are encoded again: ``jpeg``, or ``npy`` for all images as pixels, which need no decoding and take ten
    times the space."""
    quality: int = 90
    """JPEG quality of images that are encoded again; images that JPEG cannot hold become PNG or .npy."""
    samples_per_shard: int = 2000
    """Images per tar file."""
    shuffle: bool = True
    """Write the images in an order drawn by the seed."""
    seed: int = 0
    """Seeds the order and the images of data.stats_samples."""
    dry_run: bool = False
    """Only estimate the size and the time."""

    def __post_init__(self) -> None:
        check_one_of("split", self.split, ("train", "val"))
        check_one_of("encode", self.encode, ("jpeg", "npy"))
        check("quality", self.quality, 1 <= self.quality <= 100, "from 1 to 100")
        for name in ("short_side", "samples_per_shard"):
            check_positive(name, getattr(self, name))
        check("short_side", self.short_side, None in (self.short_side, self.data.nodata), "null with data.nodata")
        check_seed(self.seed)
        ok = bool(self.out) or self.data.stats or self.dry_run
        check("out", self.out, ok, "a folder to write to (none is needed with data.stats=true or dry_run=true)")
