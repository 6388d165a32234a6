"""Compares the engines with each other and with golden files of the official code."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fcmae.checkpoints.torch_file import open_safetensors
from fcmae.engines import ENGINES, available_engines, get_engine
from fcmae.errors import UsageError
from fcmae.interchange import official
from fcmae.models import FCMAE, create_backbone
from fcmae.precision import set_tf32
from fcmae.targets import Pixels

TOLERANCE = 1e-5
"""Largest relative error, ||a - b|| / ||b||, of float32 results that should be equal."""

ANY_V2 = "convnextv2_atto"
"""A timm name; golden files have their own depths and widths."""


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||`` in float64, or the plain norm where the reference is 0."""
    difference = (value.double().cpu() - reference.double().cpu()).norm().item()
    norm = reference.double().norm().item()
    return difference / norm if norm > 0 else difference


def agree(golden: list[Path]) -> int:
    """Prints a line for each comparison. Returns the number that failed."""
    set_tf32("float32")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    failed = 0
    for device in devices:
        for line in _missing_engines(device):
            print(line)
        for label, error in _engines_agree(device):
            failed += _line(f"{device} {label}", error)
        for file in golden:
            for label, error in _golden_errors(file, device):
                failed += _line(f"{device} {file.name} {label}", error)
    print(f"{failed} checks failed: relative error > {TOLERANCE:g}" if failed else "everything agrees")
    return failed


def _missing_engines(device: str) -> Iterator[str]:
    """A line for each engine that cannot run on the device."""
    for name in ENGINES:
        try:
            get_engine(name, device)
        except ImportError as error:
            yield f"skip {device} {error}"


def _line(label: str, error: float) -> int:
    ok = error <= TOLERANCE  # False for NaN
    print(f"{'ok  ' if ok else 'FAIL'} {label}: relative error {error:.1e}")
    return 0 if ok else 1


def _results(model: FCMAE, imgs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Loss, prediction and every gradient, by name."""
    model.zero_grad()
    out = model(imgs, mask)
    out.loss.backward()
    grads = {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "pred": out.pred.detach(), **grads}


def _engines_agree(device: str) -> Iterator[tuple[str, float]]:
    """The worst relative error of each engine against the masked one, for a V2 and a V1 backbone."""
    for name in ("convnextv2_atto", "convnext_atto"):
        torch.manual_seed(0)
        model = FCMAE(name, decoder_embed_dim=32, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.2)
        model.to(device)
        imgs = torch.randn(3, 3, 96, 128, device=device)
        mask, _ = model.random_mask(imgs)
        model.engine = ENGINES["masked"]
        reference = _results(model, imgs, mask)
        for engine, function in available_engines(device).items():
            if engine == "masked":
                continue
            model.engine = function
            ours = _results(model, imgs, mask)
            yield f"engine {engine} = masked, {name}", max(relative_error(ours[k], reference[k]) for k in reference)


def _golden_errors(file: Path, device: str) -> Iterator[tuple[str, float]]:
    """The relative error of each result in a golden file for each engine; for gradients the largest."""
    try:
        with open_safetensors(file) as tensors:
            meta = json.loads((tensors.metadata() or {})["meta"])
            golden = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not a golden file (safetensors with JSON metadata `meta`): {error}") from error
    params = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    if "output.loss" in golden:
        yield from _golden_pretraining(golden, params, meta, device)
    elif "output.logits" in golden:
        yield from _golden_classifier(golden, params, meta, device)
    else:
        raise UsageError(f"{file} has neither output.loss nor output.logits")


def _golden_pretraining(
    golden: dict[str, Tensor], params: dict[str, Tensor], meta: dict, device: str
) -> Iterator[tuple[str, float]]:
    imgs = golden["input.imgs"].float().to(device)
    mask = golden["input.mask"].bool().to(device)
    model = FCMAE(
        ANY_V2,
        in_chans=imgs.shape[1],
        mask_ratio=meta["mask_ratio"],
        targets={"pixels": partial(Pixels, norm="patch" if meta["norm_pix_loss"] else "none")},
        decoder_embed_dim=meta["decoder_embed_dim"],
        decoder_depth=meta["decoder_depth"],
        grn_scope=meta.get("grn_scope", "batch").split()[0],
        depths=meta["depths"],
        dims=meta["dims"],
    )
    model.load_state_dict(official.from_pretraining(params, model.state_dict()))
    model.to(device)
    keep = int((~mask[0]).sum())
    for name, engine in available_engines(device).items():
        model.engine = engine
        results = _results(model, imgs, mask)
        yield f"{name} loss", relative_error(results["loss"], golden["output.loss"].squeeze())
        pred = golden["output.pred"].flatten(2).transpose(1, 2)
        yield f"{name} prediction", relative_error(results["pred"], pred)
        with torch.no_grad():
            visible = engine(
                model.backbone, imgs, mask, keep=keep, patch_size=model.mask_patch_size, grn_scope=model.grn_scope
            )[-1]
        encoder = golden["output.encoder"].flatten(2).transpose(1, 2)
        yield f"{name} encoder output", relative_error(visible.flatten(0, 3), encoder[~mask.cpu()])
        like = {n: results.get(f"grad.{n}", torch.zeros_like(v)) for n, v in model.state_dict().items()}
        grads = official.to_pretraining(like)
        errors = {n: relative_error(g, golden[f"grad.{n}"]) for n, g in grads.items()}
        worst = max(errors, key=lambda n: errors[n])
        yield f"{name} worst of {len(errors)} gradients ({worst})", errors[worst]


def _golden_classifier(
    golden: dict[str, Tensor], params: dict[str, Tensor], meta: dict, device: str
) -> Iterator[tuple[str, float]]:
    imgs = golden["input.imgs"].float().to(device)
    model = create_backbone(
        ANY_V2, in_chans=imgs.shape[1], num_classes=meta["num_classes"], depths=meta["depths"], dims=meta["dims"]
    )
    model.load_state_dict(official.from_classifier(params, model.state_dict()))
    model.to(device).eval()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(imgs), pre_logits=True)
        yield "classifier pooled features", relative_error(pooled, golden["output.pooled"])
        yield "classifier logits", relative_error(model(imgs), golden["output.logits"])
