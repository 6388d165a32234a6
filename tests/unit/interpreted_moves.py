"""The Triton kernel of moves against plain torch, on the CPU; test_depthwise.py runs this file."""

import torch

from fcmae.data.pixels import operations


def test_equals_plain_torch():
    from fcmae.kernels.moves_triton import moved

    imgs = torch.randint(0, 256, (6, 3, 18, 21), dtype=torch.uint8)
    made = [("rotate", 24.3), ("rotate", -30.0), ("shear_x", 0.27), ("shear_y", -0.3), ("translate_x_rel", 0.41)]
    made.append(("translate_y_rel", -0.405))
    places = torch.tensor([operations.MATRICES[name](value, 18, 21) for name, value in made], dtype=torch.float64)
    fill = torch.tensor([124, 116, 104], dtype=torch.int32)
    expected = operations.moved_by_torch(imgs, places, fill, "xy")
    assert torch.equal(moved(imgs, places, fill), expected)
    for number, axes in ((2, "x"), (3, "y"), (4, "x"), (5, "y")):
        alone = slice(number, number + 1)
        assert torch.equal(operations.moved_by_torch(imgs[alone], places[alone], fill, axes), expected[alone])
