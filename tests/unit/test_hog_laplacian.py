"""The hog and laplacian targets against independent implementations in NumPy."""

import numpy as np
import pytest
import torch

from fcmae.masks.patches import patchify
from fcmae.targets import Hog, Laplacian, Pixels, Seen, part
from fcmae.targets.hog import have_neighbours, hog
from fcmae.targets.laplacian import laplacian


def hog_by_hand(image, bins, cell):
    """Pixel after pixel, ``[H, W]`` to ``[H / cell, W / cell, bins]``, as scikit-image with blocks of one cell."""
    height, width = image.shape
    counts = np.zeros((height // cell, width // cell, bins))
    for y, x in np.ndindex(height, width):
        dy = image[y + 1, x] - image[y - 1, x] if 0 < y < height - 1 else 0.0
        dx = image[y, x + 1] - image[y, x - 1] if 0 < x < width - 1 else 0.0
        degrees = np.rad2deg(np.arctan2(dy, dx)) % 180
        counts[y // cell, x // cell, int(degrees // (180 / bins)) % bins] += np.sqrt(dx**2 + dy**2)
    norms = np.linalg.norm(counts, axis=-1, keepdims=True)
    return counts / np.where(norms == 0, 1, norms)


def laplacian_by_hand(image):
    """As ``scipy.ndimage.laplace``, whose default mode repeats the pixels at the border."""
    height, width = image.shape
    out = np.zeros_like(image)
    for y, x in np.ndindex(height, width):
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            neighbour = image[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
            out[y, x] += neighbour - image[y, x]
    return out


@pytest.mark.parametrize(
    ("chans", "patch", "bins", "cell"), [(1, 16, 9, 8), (3, 16, 9, 8), (5, 12, 6, 4), (2, 8, 9, 8)]
)
def test_hog_is_the_histogram_of_every_cell(chans, patch, bins, cell):
    imgs = torch.randn(2, chans, 2 * patch, 3 * patch)
    target = Hog(patch, chans, bins=bins, cell=cell)
    given, valid = target(Seen(imgs))
    assert valid is None
    assert given.dtype == torch.float32
    side = patch // cell
    assert given.shape == (2, 6, target.dim) == (2, 6, side**2 * chans * bins)
    expected = np.stack([[hog_by_hand(c, bins, cell) for c in image] for image in imgs.double().numpy()])
    expected = expected.transpose(0, 2, 3, 1, 4).reshape(2, 2, side, 3, side, -1).swapaxes(2, 3).reshape(given.shape)
    np.testing.assert_allclose(given.numpy(), expected, atol=2e-5)


def test_hog_ignores_brightness_and_contrast_and_is_0_where_an_image_is_flat():
    imgs = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(hog(imgs * 7 + 3), hog(imgs), rtol=1e-3, atol=1e-4)
    assert torch.equal(hog(torch.full((1, 2, 16, 16), 0.3)), torch.zeros(1, 2, 9, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": 8}, "cell must divide the 4 px of a predicted patch; got 8"),
        ({"cell": 2.0}, "cell must be a positive integer; got 2.0"),
        ({"bins": 0}, "bins must be a positive integer; got 0"),
        ({"cell": 4, "loss": "ce"}, "loss must be one of mse, l1, smooth_l1, cosine; got 'ce'"),
    ],
)
def test_wrong_arguments_of_hog_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Hog(4, 3, **arguments)


@pytest.mark.parametrize("chans", [1, 4])
def test_laplacian_is_that_of_every_channel(chans):
    imgs = torch.randn(2, chans, 16, 24)
    expected = np.stack([[laplacian_by_hand(c) for c in image] for image in imgs.double().numpy()])
    np.testing.assert_allclose(laplacian(imgs).numpy(), expected, atol=1e-5)
    wanted = patchify(torch.from_numpy(expected).float(), 8)
    torch.testing.assert_close(Laplacian(8, chans, norm="none")(Seen(imgs))[0], wanted, rtol=1e-5, atol=1e-5)
    normalised = (wanted - wanted.mean(-1, keepdim=True)) / wanted.std(-1, keepdim=True)
    torch.testing.assert_close(Laplacian(8, chans)(Seen(imgs))[0], normalised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["patch", "channel", "none"])
def test_a_right_prediction_of_the_laplacian_draws_it(norm):
    imgs = torch.randn(2, 3, 16, 16)
    target = Laplacian(8, 3, norm=norm)
    torch.testing.assert_close(target.to_pixels(target(Seen(imgs))[0], imgs), laplacian(imgs), rtol=1e-4, atol=1e-4)
    assert Hog(8, 3).to_pixels(torch.zeros(2, 4, 27), imgs) is None


def test_a_slope_has_no_laplacian():
    slope = torch.arange(16.0).expand(1, 1, 16, 16)
    assert laplacian(slope)[..., 1:-1].abs().max() == 0
    assert Pixels(8, 1)(Seen(slope))[0].abs().max() > 1


def test_hog_leaves_out_gradients_at_pixels_without_a_value():
    imgs = torch.randn(1, 2, 32, 32)
    valid = torch.rand(1, 1, 32, 32) > 0.1
    valid[..., 8:16, :8] = False  # a cell of its own
    one = Hog(16, 2)(Seen(torch.where(valid, imgs, 0.0), valid))
    other = Hog(16, 2)(Seen(torch.where(valid, imgs, 1e3), valid))
    assert one[1].equal(other[1])
    assert one[1].dtype == torch.bool
    assert (~one[1]).sum() == 2 * 9
    assert one[0].equal(other[0])
    whole = Hog(16, 2)(Seen(imgs, torch.ones_like(valid)))
    assert whole[0].equal(Hog(16, 2)(Seen(imgs))[0])
    assert whole[1].all()


def test_a_pixel_without_a_value_takes_its_neighbours_out_of_the_laplacian():
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    valid[0, 0, 5, 5] = valid[0, 0, 0, 15] = False
    expected = valid.clone()
    for y, x in ((4, 5), (6, 5), (5, 4), (5, 6), (1, 15), (0, 14)):
        expected[0, 0, y, x] = False
    assert (valid & have_neighbours(valid)).equal(expected)


@pytest.mark.parametrize(
    "target", [Laplacian(8, 2), Laplacian(8, 2, norm="channel", loss="l1"), Hog(8, 2), Hog(8, 2, cell=4)]
)
def test_a_pixel_without_a_value_has_no_part_in_target_or_gradient(target):
    imgs, mask = torch.randn(2, 2, 16, 16), torch.tensor([[True, True, False, True]] * 2)
    valid = torch.rand(2, 1, 16, 16) > 0.1
    valid[0, :, :8, :8] = False  # a whole patch
    found = []
    for hole in (0.0, 1e3):
        pred = torch.linspace(-1, 1, 2 * 4 * target.dim).view(2, 4, -1).requires_grad_()
        seen = Seen(torch.where(valid, imgs, hole), valid)
        loss = part(target, seen, pred, mask)
        loss.backward()
        found.append((loss.detach(), pred.grad))
        wanted = target(seen)[1] & mask[..., None]
        assert ((pred.grad != 0) <= wanted).all()
        assert not wanted[0, 0].any()
    assert found[0][0].equal(found[1][0])
    assert found[0][1].equal(found[1][1])
