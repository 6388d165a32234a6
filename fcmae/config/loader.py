"""Group ``loader``: how samples are read, and what happens if one cannot be read."""

from dataclasses import dataclass

from fcmae.config.checks import check, check_not_negative, check_one_of, check_positive, check_ratio

MAX_WORKERS = 512
"""Per rank: more than any machine has use for."""


@dataclass
class LoaderConfig:
    """Group ``loader``: how samples are read. Nothing here changes what training computes from readable images."""

    workers: int | None = None
    """Loader processes per rank; None = from the cores this process may use; 0 = load in the training process."""
    prefetch: int = 2
    """Micro-batches that each loader process reads ahead."""
    relist: bool = False
    """List folders and tar files again although nothing seems to have changed since."""
    on_error: str = "raise"
    """If an image cannot be read: ``raise`` an error, or ``skip`` it and take another one."""
    max_bad: float = 0.001
    """With ``skip``: the largest share of an epoch's samples that may be replaced; the run stops at more."""
    max_pixels: int = 89_478_485
    """Images with more pixels are refused: a small file can expand to fill the memory. The default is Pillow's."""
    cache_dir: str | None = None
    """The folder for copies of files at URLs; None = ~/.cache/fcmae/remote. A local disk is best."""
    cache_size: float = 50.0
    """GiB of these copies; the least recently used ones make room for new ones. Files that have none are read in parts,
    each time. 0 = keep none."""
    retry_seconds: float = 300.0
    """How long a read from a URL is tried again while the server does not answer."""

    def __post_init__(self) -> None:
        ok = self.workers is None or 0 <= self.workers <= MAX_WORKERS
        check("loader.workers", self.workers, ok, f"from 0 to {MAX_WORKERS}, or null")
        check_one_of("loader.on_error", self.on_error, ("raise", "skip"))
        check_ratio("loader.max_bad", self.max_bad)
        check_positive("loader.prefetch", self.prefetch)
        check_not_negative("loader.cache_size", self.cache_size)
        check_not_negative("loader.retry_seconds", self.retry_seconds)
        check_positive("loader.max_pixels", self.max_pixels)
