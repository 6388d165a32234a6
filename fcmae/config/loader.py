"""Group ``loader``: how samples are read, and what happens to those that cannot be."""

from dataclasses import dataclass

from fcmae.config.checks import check, check_one_of, check_positive, check_ratio

MAX_WORKERS = 512
"""Per rank: more than any machine has use for."""


@dataclass
class LoaderConfig:
    """Group ``loader``: how samples are read. Nothing here changes what training computes from readable images."""

    workers: int | None = None
    """Loader processes per rank; None = from the cores this process may use; 0 = load in the training process."""
    prefetch: int = 2
    """Micro-batches that each loader process is ahead."""
    relist: bool = False
    """List folders and tar files again although nothing seems to have changed since."""
    on_error: str = "raise"
    """At an image that cannot be read: ``raise``, or ``skip``: another one takes its place."""
    max_bad: float = 0.001
    """With ``skip``: the share of an epoch's samples that may be replaced before the run stops after all."""
    max_pixels: int = 89_478_485
    """Images with more pixels cannot be read: a small file may claim to be large enough to fill the memory. The default
    is Pillow's."""

    def __post_init__(self) -> None:
        ok = self.workers is None or 0 <= self.workers <= MAX_WORKERS
        check("loader.workers", self.workers, ok, f"from 0 to {MAX_WORKERS}, or null")
        check_one_of("loader.on_error", self.on_error, ("raise", "skip"))
        check_ratio("loader.max_bad", self.max_bad)
        check_positive("loader.prefetch", self.prefetch)
        check_positive("loader.max_pixels", self.max_pixels)
