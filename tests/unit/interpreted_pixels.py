"""The Triton kernels of pixels against plain torch, on the CPU; test_depthwise.py runs this file."""

import pytest
import torch

from fcmae.data.pixels import augmented, operations
from fcmae.data.pixels.augmented import Erased
from fcmae.data.pixels.transforms import normalize
from fcmae.kernels import pixels_triton
from fcmae.kernels.operations_triton import changed

FILL = (124, 116, 104)
ARGUMENTS = {
    "brightness": [1.7],
    "color": [1.6],
    "contrast": [0.3],
    "desaturate": [0.3],
    "posterize": [3, 9],
    "rotate": [24.3],
    "sharpness": [1.8],
    "shear_x": [0.27],
    "shear_y": [-0.3],
    "solarize": [100],
    "solarize_add": [60],
    "translate_x_abs": [5.2],
    "translate_x_rel": [0.41],
    "translate_y_abs": [-3.3],
    "translate_y_rel": [-0.405],
}


def test_operations_equal_plain_torch():
    """Every operation alone, and one after the other; also on images of one value, which have no contrast."""
    lists = [[(name, value)] for name in operations.GROUPS for value in ARGUMENTS.get(name, [0])]
    lists += [[("auto_contrast", 0), ("rotate", -30.0)], [], [("equalize", 0), ("sharpness", 0.1), ("color", 0.0)]]
    flat = [[("equalize", 0)], [("auto_contrast", 0)], [("contrast", 1.9)]]
    imgs = torch.randint(0, 256, (len(lists) + len(flat), 3, 18, 21), dtype=torch.uint8)
    imgs[:, :, 4:9] //= 3
    imgs[-len(flat) :] = 7
    expected = operations.apply_operations(imgs.clone(), lists + flat, FILL)
    found = changed(imgs, lists + flat, FILL, operations.MATRICES)
    for number, done in enumerate(lists + flat):
        assert torch.equal(found[number], expected[number]), done


def test_no_operation_changes_nothing():
    imgs = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert torch.equal(changed(imgs, [[], []], FILL, operations.MATRICES), imgs)


def test_erased_rectangles_equal_plain_torch():
    erased = [(0, Erased(2, 3, 7, 11, key=123456789012345678)), (3, Erased(0, 0, 20, 61, key=2**63 - 5))]
    erased.append((4, Erased(19, 60, 1, 1, key=77)))
    imgs = torch.randn(5, 3, 20, 61)
    expected = augmented.erase(imgs.clone(), erased)
    table = torch.tensor([[number, *rectangle] for number, rectangle in erased])
    pixels_triton.erase(imgs, table, augmented._normal(torch.device("cpu")))
    assert torch.equal(imgs, expected)


@pytest.mark.parametrize(("dtype", "white"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)])
def test_normalised_pixels_equal_plain_torch(dtype, white):
    imgs = (torch.rand(2, 3, 40, 51) * white).to(dtype)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shift, scale = (white * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    assert torch.equal(pixels_triton.normalized(imgs, shift, scale), normalize(imgs, mean, std, "float32"))
