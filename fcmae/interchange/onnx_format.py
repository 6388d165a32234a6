"""A dense model as an ONNX file, in float32 or in float16 that does not overflow.

GRN takes a norm over all positions (arXiv 2301.00808, section 3.2) and LayerNorm a variance over all channels. In
float16 the squares pass 65,504 from activations of 256 on, and a runtime that computes what the file says gets infinity
(ConvNeXt-V2 issue 66: TensorRT). So the float16 file has casts to float32 around these layers, and nothing else has to
be configured in the runtime.
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.config import DataConfig
from fcmae.errors import FCMAEError, UsageError
from fcmae.interchange import preprocessing
from fcmae.interchange.network import difference
from fcmae.messages import say

FILE_NAME = "model.onnx"
INPUT = "pixel_values"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Largest difference from the float32 model, relative to the largest magnitude in an output, by the file's type."""
PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes of weights up to which they fit into model.onnx beside the graph; more of them go to model.onnx.data."""

_NORMS = (GlobalResponseNorm, nn.LayerNorm)


def export(
    model: ConvNeXt,
    data: DataConfig,
    folder: Path,
    *,
    half: bool = False,
    dynamic_size: bool = False,
    check: bool = True,
) -> float | None:
    """Writes ``folder/model.onnx`` in the opset that is the installed exporter's default; ``model`` is not changed.

    The input ``pixel_values`` is ``[batch, C, H, W]``, normalised with ``data.mean`` and ``data.std``. A classifier has
    the output ``logits`` ``[batch, classes]``; a backbone without a classifier has ``features`` ``[batch, D]``, pooled
    and normed, and ``feature_map`` ``[batch, D, H / stride, W / stride]``, the last stage. The file's metadata hold
    size, mean, std and crop.

    Args:
        model: a dense timm ConvNeXt, V1 or V2, on any device.
        data: its channels and image size, ``[H, W]`` of the input.
        folder: made if it is not there. Weights of more than 2 GB are put beside the file, in ``model.onnx.data``.
        half: float16 input, weights and outputs; GRN and LayerNorm are computed in float32.
        dynamic_size: any height and width from the total stride on, not only ``data.size``.
        check: runs the file on a fixed input with onnxruntime on the CPU.

    Returns:
        The largest difference between the file's and the float32 model's outputs, relative to the largest magnitude in
        that output; None if it was not checked, which is said in a line if onnxruntime is missing.

    Raises UsageError if onnx or onnxscript are missing or ``data`` does not fit the model, and FCMAEError if the
    difference is beyond :data:`TOLERANCE`.
    """
    _require_exporter()
    if model.in_chans != data.in_chans:
        raise UsageError(f"data.in_chans is {data.in_chans}; the model has {model.in_chans} channels")
    reference = _Outputs(copy.deepcopy(model).cpu().float()).eval()
    program = _trace(_with_half_weights(reference) if half else reference, data, half, dynamic_size)
    file = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    _save(program, data, file)
    if not check:
        return None
    dtype = torch.float16 if half else torch.float32
    error = _difference(reference, file, data, dtype)
    if error is not None and not error <= TOLERANCE[dtype]:  # NaN is not within it either
        raise FCMAEError(f"{FILE_NAME} must be within {TOLERANCE[dtype]:g} of the model; it differs by {error:.1e}")
    return error


class _Outputs(nn.Module):
    """A ConvNeXt with the outputs of the file, under their names."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model
        self.names = ["logits"] if model.num_classes else ["features", "feature_map"]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        feature_map = self.model.forward_features(pixel_values)
        pooled = self.model.forward_head(feature_map)
        return (pooled,) if self.model.num_classes else (pooled, feature_map)


class _InFloat32(nn.Module):
    """A layer with float32 parameters, for inputs and outputs of any floating type."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(x.dtype)


def _with_half_weights(model: _Outputs) -> _Outputs:
    """A copy in float16 whose GRN and LayerNorm layers, shared with ``model``, compute in float32."""
    half = copy.deepcopy(model).half()
    for name, module in model.named_modules():
        if isinstance(module, _NORMS):
            half.set_submodule(name, _InFloat32(module))
    return half.eval()


def _trace(model: _Outputs, data: DataConfig, half: bool, dynamic_size: bool) -> Any:
    """The ``torch.onnx.ONNXProgram`` of ``model``."""
    height, width = data.size
    axes = {0: "batch"}
    if dynamic_size:
        # A map that happens to be one site wide in the example would be taken for one that always is.
        height, width = 2 * height, 2 * width
        axes |= {2: "height", 3: "width"}
    example = torch.zeros(2, data.in_chans, height, width, dtype=torch.float16 if half else torch.float32)
    return torch.onnx.export(
        model,
        (example,),
        input_names=[INPUT],
        output_names=model.names,
        dynamo=True,
        dynamic_shapes={INPUT: axes},
        verbose=False,
    )


def _save(program: Any, data: DataConfig, file: Path) -> None:
    """Writes the program without the traces of where it was made, and with what the user of the file must know."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from fcmae.version import __version__

    ClearMetadataAndDocStringPass()(program.model)
    mean, std = map(list, preprocessing.mean_and_std(data))
    program.model.metadata_props.update(
        {
            "fcmae": __version__,
            "image_size": json.dumps(data.size),
            "mean": json.dumps(mean),
            "std": json.dumps(std),
            **{name: json.dumps(value) for name, value in preprocessing.extra(data).items()},
        }
    )
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(file, external_data=weights > PROTOBUF_LIMIT)


def _difference(reference: _Outputs, file: Path, data: DataConfig, dtype: torch.dtype) -> float | None:
    """How much the file's outputs in onnxruntime differ."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        say(f"{FILE_NAME} was not checked: onnxruntime is missing; pip install 'fcmae[onnx]'")
        return None
    # Another batch, and with a dynamic size another size, than it was traced with.
    imgs = torch.randn(3, data.in_chans, *data.size, generator=torch.Generator().manual_seed(0)).to(dtype)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(reference.names, {INPUT: imgs.numpy()})
    with torch.inference_mode():
        expected = reference(imgs.float())
    return difference(zip(map(torch.from_numpy, found), expected, strict=True), least=1e-30)


def _require_exporter() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting to ONNX needs {' and '.join(missing)}; pip install 'fcmae[onnx]'")
