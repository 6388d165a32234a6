"""What ``precision=auto`` chooses, on which machine, and what a resumed run makes of it."""

from pathlib import Path

import pytest
import torch
import yaml

from fcmae import precision
from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.config import compose
from fcmae.config.recipe import check_recipe
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.models import FCMAE
from fcmae.training.setup import settle_precision
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN

PACKAGE = Path(precision.__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = [arg for arg in TINY_PRETRAIN if not arg.startswith("precision")]


@pytest.fixture(autouse=True)
def _tf32_as_before():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.fixture(params=[True, False], ids=["new GPU", "old GPU"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return request.param


def test_auto_on_the_cpu(capsys):
    assert precision.settle("precision", "auto", CPU) == "float32"
    assert capsys.readouterr().err == "precision=auto takes float32 on the CPU\n"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_auto_on_a_gpu(has_bf16, capsys):
    assert precision.settle("precision", "auto", GPU) == ("bf16" if has_bf16 else "fp16")
    assert capsys.readouterr().err == f"precision=auto takes {'bf16' if has_bf16 else 'fp16'} on a GPU\n"
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_ranks_take_what_all_of_them_compute(has_bf16, capsys):
    """The other rank's GPU is an old one."""
    old = precision.BY_DEMAND.index("fp16")
    assert precision.settle("precision", "auto", GPU, smallest=lambda own: min(own, old)) == "fp16"
    assert precision.settle("precision", "auto", GPU, smallest=lambda own: min(own, old), main=False) == "fp16"
    assert capsys.readouterr().err.count("precision=auto takes fp16") == 1


def test_bf16_is_refused_by_every_rank_where_one_lacks_it(has_bf16):
    if has_bf16:
        assert precision.settle("precision", "bf16", GPU) == "bf16"
    with pytest.raises(UsageError, match=r"^precision=bf16: a GPU.* does not compute bf16; .* takes fp16$"):
        precision.settle("precision", "bf16", GPU, smallest=lambda own: min(own, 1))


def test_fp8_is_refused_by_every_rank_where_one_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert precision.settle("precision", "fp8", GPU) == "fp8"
    assert precision.settle("precision", "auto", GPU, recorded="fp8") == "fp8"
    with pytest.raises(UsageError, match=r"^precision=fp8: a GPU.* is no NVIDIA GPU of .* 9.0 or more; .* takes bf16$"):
        precision.settle("precision", "fp8", GPU, smallest=lambda own: min(own, 0) if own == 1 else own)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UsageError, match="the run so far used it; precision=bf16 trainer.allow_changed_recipe=true"):
        precision.settle("precision", "auto", GPU, recorded="fp8")
    with pytest.raises(UsageError, match="^precision=fp8: the CPU, or the device of another rank, is no NVIDIA GPU"):
        precision.settle("precision", "fp8", CPU)
    with pytest.raises(UsageError, match="^precision=fp8 needs an NVIDIA GPU .* here is the CPU; .* takes float32$"):
        precision.check_float8("fp8", CPU)
    precision.check_float8("auto", CPU)


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("pretrain", ["engine=masked"], "engine.name must be packed with precision=fp8"),
        ("finetune", [], "precision must be auto, float32, tf32, bf16 or fp16 in fine-tuning; got 'fp8'"),
        ("knn", ["checkpoint=run"], "precision must be one of auto, float32, tf32, bf16, fp16; got 'fp8'"),
    ],
)
def test_fp8_is_of_the_packed_engine_in_pretraining(command, given, said):
    with pytest.raises(ConfigError, match=said):
        compose(command, ["precision=fp8", *given])
    assert compose("pretrain", ["precision=fp8"]).precision == "fp8"


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("convnextv2_atto", {}, "a multiple of 16; got one of 40"),
        ("convnext_tiny", {}, "needs ConvNeXt V2"),
        ("convnextv2_femto", {"ls_init_value": 1e-6}, "without layer scale"),
        ("convnextv2_femto", {"kernel_sizes": 9}, "at most 7 and mask patches of at most 16 .* got 9 and 8"),
        ("convnextv2_femto", {"mask_patch_size": 96}, "at most 7 and mask patches of at most 16 .* got 7 and 24"),
        ("convnextv2_femto", {"engine": "masked"}, "needs engine=packed; with another one set precision=bf16"),
    ],
)
def test_fp8_is_refused_for_networks_that_cannot(name, how, said):
    pytest.importorskip("triton")
    with pytest.raises(UsageError, match=said):
        FCMAE(name, **how).check_float8()
    FCMAE("convnextv2_femto").check_float8()


def test_a_run_in_fp8_is_not_resumed_in_another_engine(monkeypatch):
    """Its precision is known after its config was checked."""
    monkeypatch.setattr(precision, "settle", lambda *_, recorded, **__: recorded)
    cfg, resumed = compose("pretrain", ["engine=masked"]), {"config": {"precision": "fp8"}}
    with pytest.raises(UsageError, match="needs engine=packed"):
        settle_precision(cfg, World(0, 1, 0, 1, CPU), resumed, FCMAE("convnextv2_femto", engine="masked"))


def test_evaluation_in_fp8_is_in_bf16():
    assert not precision.has_float8_products()
    with precision.training(CPU, "fp8"):
        assert precision.has_float8_products()
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with precision.training(CPU, "bf16"), precision.autocast(CPU, "fp8"):
        assert not precision.has_float8_products()


def test_auto_stays_what_the_run_used(has_bf16, capsys):
    assert precision.settle("precision", "auto", CPU, recorded="bf16") == "bf16"
    assert "takes bf16 as in the run so far" in capsys.readouterr().err
    assert precision.settle("precision", "auto", CPU, recorded="auto") == "float32"  # imported weights
    assert precision.settle("precision", "float32", CPU, recorded="bf16") == "float32"  # and the recipe differs
    if not has_bf16:
        with pytest.raises(UsageError, match="the run so far used it; .*=fp16 trainer.allow_changed_recipe=true"):
            precision.settle("precision", "auto", GPU, recorded="bf16")


@pytest.mark.parametrize("name", precision.PRECISIONS[1:])
def test_autocast(name):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    with precision.autocast(CPU, name):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype == precision.dtype_of(name)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "knn", "probe"])
def test_auto_is_the_default(command):
    cfg = compose(command, ["checkpoint=run"] if command in ("evaluate", "knn", "probe") else [])
    assert cfg.precision == "auto"


def test_one_module_chooses():
    """Autocast, TF32 and its relatives are set nowhere else."""
    for file in PACKAGE.rglob("*.py"):
        if file.name != "precision.py":
            for word in ("allow_tf32", "fp32_precision", "matmul_precision", "torch.autocast("):
                assert word not in file.read_text(), file


def recorded(run: Path) -> tuple[str, str]:
    """In config.yaml, and in the newest checkpoint."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    state = checkpoint.read(checkpoint.resolve(run))
    return config["precision"], state["config"]["precision"]


@pytest.mark.slow
def test_a_run_records_what_it_chose_and_goes_on_with_it(tmp_path, capsys):
    """Also one of a version whose default was bf16 on a CPU."""
    new, old = f"hydra.run.dir={tmp_path}/new", f"hydra.run.dir={tmp_path}/old"
    assert main([*PLAIN, new, "trainer.max_steps=1"]) == 75
    assert recorded(tmp_path / "new") == ("float32", "float32")
    assert main([*PLAIN, old, "trainer.max_steps=1", "precision=bf16"]) == 75
    assert main([*PLAIN, old, "trainer.max_steps=2"]) == 75
    assert recorded(tmp_path / "old") == ("bf16", "bf16")
    assert "precision=auto takes bf16 as in the run so far" in capsys.readouterr().err
    assert main([*PLAIN, old, "trainer.max_steps=3", "precision=float32"]) == 2
    assert "precision: 'bf16' -> 'float32'" in capsys.readouterr().err
    check_recipe({"precision": "auto"}, {"precision": "float32"})  # imported weights


def test_fine_tuning_and_evaluation_settle_it_too(tmp_path, capsys):
    args = [arg for arg in TINY_FINETUNE if not arg.startswith("precision")]
    assert main([*args, f"hydra.run.dir={tmp_path}/run", "schedule.epochs=1", "schedule.warmup_epochs=0"]) == 0
    assert recorded(tmp_path / "run") == ("float32", "float32")
    assert main(["evaluate", f"checkpoint={tmp_path}/run", "report=null"]) == 0
    assert capsys.readouterr().err.count("\nprecision=auto takes float32 on the CPU\n") == 1


def test_full_precision_ends_with_its_block():
    torch.backends.cuda.matmul.allow_tf32 = True
    with precision.full_precision(torch.device("cuda")):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
