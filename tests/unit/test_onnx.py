"""ONNX files: equal to the model in onnxruntime, for other batches and sizes, and in float16 without overflow."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.convnext import ConvNeXt

from fcmae.config import DataConfig
from fcmae.errors import FCMAEError, UsageError
from fcmae.interchange import onnx_format
from tests.conftest import relative_error
from tests.unit.test_engines import small_backbone

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHALLOW = (1, 1, 1, 1)
"""Blocks per stage: tracing takes a second for each."""


def data_of(model: ConvNeXt, size: int | list[int] = 64) -> DataConfig:
    chans = model.in_chans
    return DataConfig(in_chans=chans, image_size=size, mean=[0.5] * chans, std=[0.25] * chans)


def run(file: Path, imgs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"pixel_values": imgs.numpy()})]


def run_literally(file: Path, imgs: torch.Tensor) -> torch.Tensor:
    """The first output as the file says, each operator in the type of its inputs.

    onnxruntime's CPU provider has hardly any float16 operators and computes in float32 instead, so it cannot show an
    overflow; the reference implementation of ONNX does what a float16 device does.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"pixel_values": imgs.numpy()})
    return torch.from_numpy(outputs[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnextv2_atto", {"num_classes": 5}),
        ("convnextv2_tiny", {"num_classes": 5, "in_chans": 4, "patch_size": 2}),
        ("convnext_tiny", {"num_classes": 5, "in_chans": 1, "patch_size": 1}),
    ],
)
def test_a_classifier_of_any_batch_and_size(tmp_path, name, kwargs):
    model = small_backbone(name, depths=SHALLOW, **kwargs).eval()
    difference = onnx_format.export(model, data_of(model), tmp_path, dynamic_size=True)
    assert difference < 1e-5
    for batch, height, width in ((1, 64, 96), (5, 96, 70)):
        imgs = torch.randn(batch, model.in_chans, height, width)
        (logits,) = run(tmp_path / "model.onnx", imgs)
        assert relative_error(logits, model(imgs)) < 1e-5


def test_a_backbone_has_features_and_their_map_and_a_training_model_stays_one(tmp_path, monkeypatch):
    """The file is written before it is compared, here with a tolerance that it cannot meet."""
    monkeypatch.setitem(onnx_format.TOLERANCE, torch.float32, 0)
    model = small_backbone("convnextv2_atto", depths=SHALLOW, drop_path_rate=0.5).train()
    with pytest.raises(FCMAEError, match="must be within 0 of the model; it differs by"):
        onnx_format.export(model, data_of(model, [32, 64]), tmp_path)
    assert all(module.training for module in model.modules())

    file = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(file)
    assert [output.name for output in file.graph.output] == ["features", "feature_map"]
    assert [axis.dim_param or axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        *(3, 32, 64),
    ]
    imgs = torch.randn(4, 3, 32, 64)
    features, feature_map = run(tmp_path / "model.onnx", imgs)
    assert feature_map.shape == (4, 24, 1, 2)
    model.eval()
    assert relative_error(feature_map, model.forward_features(imgs)) < 1e-5
    assert relative_error(features, model.forward_head(model.forward_features(imgs), pre_logits=True)) < 1e-5

    # what its input is, and not where it was made
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(metadata["image_size"]) == [32, 64]
    assert json.loads(metadata["mean"]) == [0.5] * 3
    assert json.loads(metadata["std"]) == [0.25] * 3
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


@pytest.mark.slow
def test_float16_keeps_norms_in_float32(tmp_path):
    """Activations near 300 have squares beyond float16's 65,504: a file of the model in float16 overflows."""
    model = small_backbone("convnextv2_atto", depths=SHALLOW, num_classes=5).eval()
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.mlp.fc1.weight.mul_(100)
                block.mlp.fc2.weight.mul_(0.01)
    imgs = torch.randn(1, 3, 64, 64).half()
    expected = model(imgs.float())

    naive = tmp_path / "naive.onnx"
    torch.onnx.export(copy.deepcopy(model).half(), (imgs,), naive, input_names=["pixel_values"], verbose=False)
    assert not run_literally(naive, imgs).isfinite().any()

    before = copy.deepcopy(model.state_dict())
    layers = str(model)
    assert onnx_format.export(model, data_of(model), tmp_path, half=True) < 1e-2
    for logits in (run(tmp_path / "model.onnx", imgs)[0], run_literally(tmp_path / "model.onnx", imgs)):
        assert logits.dtype == torch.float16
        assert relative_error(logits, expected) < 1e-2

    assert str(model) == layers
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.dtype == torch.float32, key


@pytest.mark.slow
def test_large_weights_are_beside_the_file_and_without_onnxruntime_it_says_that_nothing_was_checked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(onnx_format, "PROTOBUF_LIMIT", 0)
    model = small_backbone("convnextv2_atto").eval()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert onnx_format.export(model, data_of(model, 32), tmp_path) is None
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "was not checked: onnxruntime is missing" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    imgs = torch.randn(1, 3, 32, 32)
    features, _ = run(tmp_path / "model.onnx", imgs)
    assert relative_error(features, model(imgs)) < 1e-5


def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch):
    model = small_backbone("convnextv2_atto", in_chans=4)
    with pytest.raises(UsageError, match="data.in_chans is 3; the model has 4 channels"):
        onnx_format.export(model, DataConfig(), tmp_path)
    for missing in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(UsageError, match=rf"needs {missing}; pip install 'fcmae\[onnx\]'"):
                onnx_format.export(model, data_of(model), tmp_path)
