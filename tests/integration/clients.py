"""Run by test_clients.py in an environment of its own: prints what clients make of a folder of checkpoints."""

import json
import re
import sys
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from viscy_models import FullyConvolutionalMAE

import fcmae
from fcmae.interchange.convert import export, import_weights
from fcmae.interchange.network import Given, Network, difference

ROOT = Path(__file__).parents[2]


def maps_of(network: Network, imgs: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        return network.model.forward_intermediates(imgs, intermediates_only=True)


def viscy(path: Path, folder: Path, planes: int) -> dict[str, float]:
    """Differences of every stage, of the export's own check, and of what comes back from a checkpoint of VisCy's."""
    checked = export(path, "viscy", folder, planes=planes).error
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    model = FullyConvolutionalMAE(out_channels=1, **arguments).eval()
    model.encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    network = Network.read(path)
    imgs = network.fixed_input()
    with torch.inference_mode():
        stack = imgs.unflatten(1, (-1, planes))
        stages, _ = model.encoder(stack)
        image, _ = model(stack)
    assert image.shape == (2, 1, planes, *imgs.shape[2:])
    found = {"check": checked, "stages": difference(zip(stages, maps_of(network, imgs), strict=True))}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder.with_suffix(".ckpt"))
    given = Given(mean=network.cfg.data.mean, std=network.cfg.data.std)
    import_weights(folder.with_suffix(".ckpt"), "viscy", folder.with_suffix(".pt"), given)
    back = Network.read(folder.with_suffix(".pt"))
    return {**found, "back": difference(zip(maps_of(back, imgs), maps_of(network, imgs), strict=True))}


def theirs(folder: Path) -> float:
    """A network of VisCy's own, imported: the difference of its stages."""
    torch.manual_seed(0)
    arguments = {"encoder_blocks": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "stem_kernel_size": (5, 2, 2)}
    model = FullyConvolutionalMAE(2, 1, in_stack_depth=5, **arguments).eval()
    for value in model.encoder.parameters():
        value.data += 0.1 * torch.randn_like(value)
    torch.save({"state_dict": model.state_dict()}, folder / "theirs.ckpt")
    import_weights(folder / "theirs.ckpt", "viscy", folder / "theirs.pt", Given(mean=[0.0] * 10, std=[1.0] * 10))
    imgs = torch.randn(2, 10, 64, 64)
    with torch.inference_mode():
        stages, _ = model.encoder(imgs.unflatten(1, (2, 5)))
    return difference(zip(maps_of(Network.read(folder / "theirs.pt"), imgs), stages, strict=True))


def unet(path: Path, folder: Path) -> dict[str, float]:
    """smp.Unet on a directory of timm's: differences of the maps; with output stride 16 of those before the last."""
    export(path, "timm", folder)
    network = Network.read(path)
    imgs = network.fixed_input()
    found = {}
    for name, options in (("32", {}), ("16", {"output_stride": 16})):
        model = smp.Unet(f"tu-local-dir:{folder}", encoder_weights=True, in_channels=4, classes=3, **options).eval()
        with torch.inference_mode():
            maps = model.encoder(imgs)[2:]
            assert model(imgs).shape == (2, 3, *imgs.shape[2:])
        assert imgs.shape[3] // maps[-1].shape[3] == int(name)
        pairs = list(zip(maps, maps_of(network, imgs), strict=True))
        found[name] = difference(pairs if name == "32" else pairs[:-1])
        weights = {key.removeprefix("model."): value for key, value in model.encoder.state_dict().items()}
        ours = {
            key.replace("stages.", "stages_").replace("stem.", "stem_"): value for key, value in network.weights.items()
        }
        assert all(torch.equal(value, ours[key]) for key, value in weights.items())
    return found


def pretrained_at_16(path: Path) -> float:
    """The encoder of docs/transfer.md, for strides that timm cannot build."""
    page = (ROOT / "docs" / "transfer.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Encoder" in block)
    names: dict = {}
    exec(block.replace("runs/base", str(path)), names)
    model = names["model"].eval()
    network = Network.read(path)
    imgs = network.fixed_input()
    with torch.inference_mode():
        assert model(imgs).shape == (2, 3, *imgs.shape[2:])
        maps = model.encoder(imgs)[1:]
    assert imgs.shape[3] // maps[-1].shape[3] == 16
    return difference(zip(maps, maps_of(network, imgs), strict=True))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert Path(fcmae.__file__).is_relative_to(ROOT)
    result = {
        "viscy 2D": viscy(folder / "plane.pt", folder / "viscy_plane", 1),
        "viscy 3D": viscy(folder / "planes.pt", folder / "viscy_planes", 5),
        "viscy's own": {"stages": theirs(folder)},
        "smp": unet(folder / "timm.pt", folder / "timm"),
        "smp, pretrained at 16": {"stages": pretrained_at_16(folder / "stride16.pt")},
    }
    print(json.dumps(result))
