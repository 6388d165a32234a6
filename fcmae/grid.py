"""Sizes of the grid of patches. Without torch, so that a config can be checked at once."""


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Raises ValueError, naming the sizes that fit, unless both sides are multiples of ``patch_size``.
    """
    for name, size in (("height", height), ("width", width)):
        if size < patch_size or size % patch_size:
            below = size // patch_size * patch_size
            fits = [str(s) for s in (below, below + patch_size) if s]
            raise ValueError(
                f"image {name} {size} is not a multiple of the patch of {patch_size} px; "
                f"the nearest {'sizes that fit are' if len(fits) > 1 else 'size that fits is'} {' and '.join(fits)}"
            )
    return height // patch_size, width // patch_size


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches, ``int(L * (1 - mask_ratio))`` as in MAE: 49 patches at 0.6 keep 19.

    Raises ValueError if none would stay visible or the ratio is outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1); got {mask_ratio}")
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {num_patches} patches visible; use larger images, a smaller total "
            "stride (model.strides)" + f" or a ratio up to {1 - 1 / num_patches:.4g}" * (num_patches > 1)
        )
    return keep
