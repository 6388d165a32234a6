"""AdamW with the parameter groups of the paper: no decay on vectors, layer-wise learning rates."""

import re
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.config import OptimConfig
from fcmae.engines.convnext import stages

BLOCKS_PER_GROUP = 3
"""Blocks of stage 3 that share a learning rate with ``group`` layer decay (official ``optim_factory.py``)."""


def layer_index(name: str, depths: tuple[int, ...], kind: str) -> tuple[int, int]:
    """How deep a backbone parameter lies, and how deep the head does.

    Args:
        name: as timm names it, e.g. ``stages.2.blocks.5.mlp.fc1.weight``.
        depths: blocks in each stage.
        kind: ``single``, every block a layer; or ``group``, every stage one, and every three blocks of stage 3 one.

    Returns:
        The parameter's layer counted from the input, and the head's.
    """
    group = kind == "group"
    groups = -(-depths[2] // BLOCKS_PER_GROUP)
    head = len(depths) + groups if group else sum(depths) + 1
    if name.startswith(("head", "norm_pre")):
        return head, head
    if name.startswith("stem"):
        return (0 if group else 1), head
    match = re.match(r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
    if match is None:
        raise ValueError(f"{name!r} is not a parameter of a ConvNeXt backbone")
    stage, block = int(match[1]), int(match[2] or 0)
    if not group:
        return sum(depths[:stage]) + block + 1, head
    if stage == 2:
        return 3 + block // BLOCKS_PER_GROUP, head
    return (stage + 1 if stage < 2 else stage + groups), head


def layer_scale(name: str, depths: tuple[int, ...], decay: float, kind: str) -> float:
    """The factor on a backbone parameter's learning rate, ``decay ** (layers up to the head)``."""
    index, head = layer_index(name, depths, kind)
    return decay ** (head - index)


def param_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal learning-rate scale and weight decay.

    Vectors (biases, norms, GRN, layer scale, mask token) are not decayed. Layer decay is for fine-tuning.

    Returns:
        AdamW groups with ``params``, ``weight_decay``, ``lr_scale`` and ``names``.
    """
    depths: tuple[int, ...] = ()
    if cfg.layer_decay is not None:
        backbone = getattr(model, "backbone", model)
        if hasattr(model, "decoder") or not isinstance(backbone, ConvNeXt):
            raise ValueError(f"optim.layer_decay must be null in pretraining; got {cfg.layer_decay}")
        depths = tuple(len(stage.blocks) for stage in stages(backbone))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad or name.startswith("backbone.head."):  # no part of pretraining
            continue
        decay = cfg.weight_decay if param.ndim > 1 else 0.0
        scale = 1.0
        if cfg.layer_decay is not None:
            scale = layer_scale(name.removeprefix("backbone."), depths, cfg.layer_decay, cfg.layer_decay_type)
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(param)
        group["names"].append(name)
    return list(groups.values())


def create_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over :func:`param_groups`; the loop sets the learning rates."""
    betas = (cfg.betas[0], cfg.betas[1])
    return torch.optim.AdamW(param_groups(model, cfg), lr=0.0, betas=betas, fused=True)


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """The norm of all gradients, which are scaled down to the norm ``largest`` if it is larger."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params], foreach=True)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(params, largest, norm, foreach=True)
    return norm


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Puts the moments of a saved state dict back, parameter by parameter.

    The groups stay as they are: their weight decay, betas and scales follow from the config, which may have changed.
    """
    moments = {name: saved["state"][index] for index, name in _names(saved) if index in saved["state"]}
    own = optimizer.state_dict()
    own["state"] = {index: moments[name] for index, name in _names(own) if name in moments}
    optimizer.load_state_dict(own)


def _names(state: dict[str, Any]) -> list[tuple[int, str]]:
    """The number that each parameter has in an optimizer's state dict, and its name."""
    return [pair for group in state["param_groups"] for pair in zip(group["params"], group["names"], strict=True)]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
