"""Fine-tuning does what the official code does: targets, average, drop path, head, and where its weights come from."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.layers import DropPath

from fcmae.checkpoints import checkpoint
from fcmae.cli import main
from fcmae.config import DataConfig, FinetuneConfig, LoaderConfig, compose, to_dict
from fcmae.data.sources import Sample
from fcmae.distributed import World
from fcmae.errors import CheckpointError, ConfigError, Interrupted
from fcmae.evaluation.classify import predictions
from fcmae.interchange.convert import import_weights
from fcmae.models.build import build_classifier, load
from fcmae.tasks import initial
from fcmae.tasks.finetuning import Finetuning, _shared
from fcmae.training.run import finetune
from tests.conftest import TINY_FINETUNE, read_golden, relative_error
from tests.results import newest

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def config(*overrides: str) -> FinetuneConfig:
    """Without ``init_from`` every key has a value."""
    cfg: FinetuneConfig = compose("finetune", [*TINY_FINETUNE[1:], *overrides])
    return cfg if cfg.init_from else cfg.settled({})


def write_classifier(path, cfg: FinetuneConfig, classes: int) -> dict[str, torch.Tensor]:
    """A checkpoint of fine-tuning with random weights, and those weights."""
    model = build_classifier(cfg.model, cfg.data.in_chans, classes, seed=3)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    weights = model.state_dict()
    state = {"task": "finetune", "config": to_dict(cfg), "classes": [f"n{i:05d}" for i in range(classes)]}
    checkpoint.write_atomically(path, {"format": checkpoint.FORMAT, **state, "model": weights, "ema": None})
    return weights


@pytest.fixture
def three_classes(tmp_path):
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (80 * i, 100, 200)).save(tmp_path / "images" / name / f"{i}.png")
    return f"data=imagefolder data.path={tmp_path}/images data.val_path={tmp_path}/images".split()


def test_the_loss_is_cross_entropy_with_the_soft_targets_of_mixup():
    """SoftTargetCrossEntropy of the official code: the mean of -sum(target * log softmax)."""
    task = Finetuning(config("augment.mixup=0.8", "augment.cutmix=1.0", "augment.label_smoothing=0.1"))
    imgs, labels, (keys, drawn) = torch.randn(8, 3, 32, 32), torch.arange(8), task.draw(0, range(8))
    model = task.model.eval()
    mixed, targets = task.mixup(imgs, labels, drawn)
    targets = 0.9 * targets + 0.1 / 10
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (targets > 0.02).sum(1).max() == 2  # two images each, and 0.1 / 10 on every class
    losses = -(targets * model(mixed).log_softmax(1)).sum(1)
    torch.testing.assert_close(task.loss(model, [imgs, labels, keys, drawn])[0], losses.mean())
    weight = torch.rand(8)
    torch.testing.assert_close(task.loss(model, [imgs, labels, keys, drawn], weight)[0], (weight * losses).mean())


def test_without_mixing_the_loss_is_label_smoothing():
    """LabelSmoothingCrossEntropy of the official code: 0.8 on the label, 0.2 shared by all classes."""
    task = Finetuning(config("augment.label_smoothing=0.2"))
    imgs, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    log_p = task.model.eval()(imgs).log_softmax(1)
    expected = -(0.8 * log_p[range(6), labels] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(task.loss(task.model, [imgs, labels, *task.draw(0, range(6))])[0], expected)


def test_drop_path_grows_linearly_over_all_blocks():
    cfg = compose("finetune", ["experiment=in1k/finetune_base"]).settled({}).model
    with torch.device("meta"):
        model = build_classifier(cfg, 3, 1000, seed=0)
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0
             for stage in model.stages for block in stage.blocks]  # fmt: skip
    assert rates == pytest.approx(torch.linspace(0, 0.1, 3 + 3 + 27 + 3).tolist(), abs=1e-7)


def test_the_head_starts_at_a_thousandth():
    cfg = compose("finetune", ["experiment=in1k/finetune_atto"]).settled({}).model
    model = build_classifier(cfg, 3, 1000, seed=0)
    assert model.head.fc.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert model.head.fc.bias.abs().max() == 0
    assert model.stages[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_average_is_the_official_one(tmp_path):
    """ema = decay * ema + (1 - decay) * weights after every optimizer step, from the initial weights on."""
    cfg = config("optim.ema_decay=0.75", "trainer.max_steps=1", "model.head_init_scale=0.001")
    before = {k: v.clone() for k, v in Finetuning(cfg).model.state_dict().items()}
    with pytest.raises(Interrupted):
        finetune(cfg, tmp_path)
    state = checkpoint.read(checkpoint.resolve(tmp_path))
    assert any(not torch.equal(before[k], state["model"][k]) for k in before)
    for name, average in state["ema"].items():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * state["model"][name], msg=name)


def test_a_classifier_of_other_classes_gives_its_backbone_and_not_its_head(tmp_path, three_classes):
    weights = write_classifier(tmp_path / "in22k.pt", config(), classes=7)
    task = Finetuning(config(*three_classes, f"init_from={tmp_path}/in22k.pt", "model.head_init_scale=0.001"))
    task.initialise()
    assert task.model.head.fc.weight.shape == (3, 24)
    assert task.model.head.fc.weight.abs().max() < 0.02
    for name, value in task.model.state_dict().items():
        assert name.startswith("head.fc.") or torch.equal(value, weights[name]), name
    assert task.notes[1] == f"{tmp_path}/in22k.pt is a classifier of 7 classes; its head is not used"


def test_a_batch_that_fits_few_labels_is_named():
    """Synthetic images have 10 classes."""
    few = ("data.length=40", "data.labels_per_class=3", "optim.global_batch_size=32")
    expected = "data.labels_per_class=3 leaves 30 training images, fewer than optim.global_batch_size=32; give "
    with pytest.raises(ConfigError, match=f"{expected}optim.global_batch_size=30"):
        Finetuning(config(*few))
    assert len(Finetuning(config(*few, "optim.global_batch_size=30")).source) == 30


def test_validation_images_may_lack_a_class(tmp_path, three_classes, capsys):
    """Finetune, evaluate, knn and probe name it; labels are matched by name."""
    for name in "ac":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (80, 100, 200)).save(tmp_path / "val" / name / "0.png")
    run, data = f"{tmp_path}/run", (*three_classes, f"data.val_path={tmp_path}/val")
    assert main([*TINY_FINETUNE, *data, f"hydra.run.dir={run}", "data.image_size=32"]) == 0
    assert "data.val_path lacks 1 of the 3 classes of data.path: b\n" in capsys.readouterr().err
    assert main(["evaluate", f"checkpoint={run}", f"per_class={run}/classes.json", "report=null"]) == 0
    printed = capsys.readouterr()
    assert f"data.val_path lacks 1 of the 3 classes of {run}/checkpoints/step_" in printed.err
    assert json.loads(printed.out)["images"] == 2
    per_class = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert {name: row["images"] for name, row in per_class.items()} == {"a": 1, "b": 0, "c": 1}
    for command in (("knn", "k=1"), ("probe", "epochs=1", "warmup_epochs=0")):
        assert main([*command, f"checkpoint={run}", "cache=null"]) == 0
        printed = capsys.readouterr()
        assert "data.val_path lacks 1 of the 3 classes of data.path: b\n" in printed.err
        assert json.loads(printed.out)
    (tmp_path / "val" / "d").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "d" / "0.png")
    assert main(["evaluate", f"checkpoint={run}"]) == 2
    assert "1 of the 3 classes of data.val_path is not among the 3 of" in capsys.readouterr().err


def test_training_images_that_are_also_validation_images_are_told(tmp_path, three_classes):
    images = f"{tmp_path}/images"
    said = "data.val_path={} shares images with data.path={}: training images are measured"
    assert Finetuning(config(*three_classes)).notes[-1] == said.format(images, images)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    shared = [(images, f"{images}/a"), (f"{images}/a", images), (images, f"{tmp_path}/link/")]
    for path, val_path in shared:
        assert _shared(DataConfig(path=["elsewhere", path], val_path=val_path)) == [said.format(val_path, path)]
    for name, path, val_path in (
        ("imagefolder", images, f"{images}_2"),
        ("webdataset", "s3://one/train", "s3://one/val"),
        ("webdataset", images, f"{images}/val"),
        ("table", f"{images}/a.csv", f"{images}/a.csv"),  # of which splits are read
    ):
        assert _shared(DataConfig(name=name, path=path, val_path=val_path)) == []
    assert _shared(DataConfig(path=images, val_path=f"{images}/a", num_images=2)) == []  # it may be others


def test_a_head_of_the_same_shape_is_not_used_either(tmp_path):
    weights = write_classifier(tmp_path / "other.pt", config(), classes=10)
    task = Finetuning(config(f"init_from={tmp_path}/other.pt"))
    task.initialise()
    assert not torch.equal(task.model.head.fc.weight, weights["head.fc.weight"])
    assert torch.equal(task.model.head.norm.weight, weights["head.norm.weight"])


def test_a_backbone_that_does_not_fit_is_refused(tmp_path):
    """By its config, else by its weights."""
    weights = write_classifier(tmp_path / "wide.pt", config("model.dims=[8,12,16,32]"), classes=10)
    with pytest.raises(ConfigError, match=r"^model.dims is \[8, 12, 16, 24\]; .*wide.pt has \[8, 12, 16, 32\]$"):
        Finetuning(config(f"init_from={tmp_path}/wide.pt"))
    state = {"task": "finetune", "config": to_dict(config()), "classes": ["0", "1"], "model": weights, "ema": None}
    checkpoint.write_atomically(tmp_path / "wrong.pt", {"format": checkpoint.FORMAT, **state})
    with pytest.raises(CheckpointError, match=r"wrong.pt do not fit the model .*of another shape: head.norm.bias"):
        Finetuning(config(f"init_from={tmp_path}/wrong.pt")).initialise()


UNTOLD = [o for o in TINY_FINETUNE[1:] if not o.startswith(("model", "data.image_size"))]
"""Without what ``init_from`` knows."""
OTHER = (
    *("model=demo", "model.dims=[8,12,16,24]", "model.depths=[1,1,1,1]"),
    *("data.in_chans=2", "data.bit_depth=12", "data.image_size=[32,48]", "data.mean=[0.3,0.4]", "data.std=[0.1,0.2]"),
)
TAKEN = (
    "taken from init_from: model.backbone=convnextv2_atto model.depths=[1, 1, 1, 1] model.dims=[8, 12, 16, 24] "
    "model.stem_stride=1 data.in_chans=2 data.bit_depth=12 data.dtype=uint data.image_size=[32, 48] "
    "data.normalize=dataset data.mean=[0.3, 0.4] data.std=[0.1, 0.2]"
)


def test_network_and_images_are_those_of_init_from_where_they_are_not_set(tmp_path):
    """A key is unset where no config file and no override sets it."""
    before = config(*OTHER)
    write_classifier(tmp_path / "own.pt", before, classes=10)
    task = Finetuning(compose("finetune", [*UNTOLD, f"init_from={tmp_path}/own.pt"]))
    assert (task.cfg.model, task.cfg.data) == (before.model, before.data)
    assert task.notes[-1] == TAKEN
    given = ("data.image_size=64", "data.bit_depth=8", "data.pad=2", "model.stem_stride=1", "data.mean=[0.3,0.4]")
    task = Finetuning(compose("finetune", [*UNTOLD, *given, f"init_from={tmp_path}/own.pt"]))
    assert task.cfg.data.size == (64, 64)
    assert task.cfg.data.std == [0.1, 0.2]
    assert task.notes[2:] == [
        f"data.pad is 2; {tmp_path}/own.pt was trained with 0",
        "taken from init_from: model.backbone=convnextv2_atto model.depths=[1, 1, 1, 1] model.dims=[8, 12, 16, 24] "
        "data.in_chans=2 data.dtype=uint data.normalize=dataset data.std=[0.1, 0.2]",
        f"data.bit_depth is 8; {tmp_path}/own.pt was trained with 12",
        f"data.image_size is [64, 64]; {tmp_path}/own.pt was trained with [32, 48]",
    ]


def test_pixels_without_a_value_are_those_of_init_from(tmp_path):
    """They reached the network as numbers, such as -9999, unless the command said it again."""
    write_classifier(tmp_path / "own.pt", config(*OTHER, "data.nodata=7"), classes=10)
    init = f"init_from={tmp_path}/own.pt"
    task = Finetuning(compose("finetune", [*UNTOLD, init]))
    assert task.cfg.data.nodata == 7
    assert task.notes[-1] == f"{TAKEN} data.nodata=7"
    task = Finetuning(compose("finetune", [*UNTOLD, init, "data.nodata=5"]))
    assert task.cfg.data.nodata == 5
    assert task.notes[-1] == f"data.nodata is 5; {tmp_path}/own.pt was trained with 7"
    for other in ("data.bit_depth=8", "data.pad=2"):
        task = Finetuning(compose("finetune", [*UNTOLD, init, other]))
        assert task.cfg.data.nodata is None
        assert f"data.nodata is null; {tmp_path}/own.pt was trained with 7" in task.notes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model=convnextv2_pico", "model.backbone is convnextv2_pico; {} has convnextv2_atto"),
        ("model.stem_stride=4", "model.stem_stride=4; {} has model.stem_stride=1"),
        ("model.depths=[1,1,2,1]", "model.depths is [1, 1, 2, 1]; {} has [1, 1, 1, 1]"),
        ("data.in_chans=3", "data.in_chans is 3; {} has 2. To adapt the stem, give init_channels=repeat|mean|new"),
        ("data.mean=[0.5,0.5]", "data.mean is [0.5, 0.5]; {} has [0.3, 0.4]"),
        ("data.std=[0.5,0.5]", "data.std is [0.5, 0.5]; {} has [0.1, 0.2]"),
    ],
)
def test_what_contradicts_init_from_is_refused(tmp_path, given, message):
    file = tmp_path / "own.pt"
    write_classifier(file, config(*OTHER), classes=10)
    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(file))}$"):
        Finetuning(compose("finetune", [*UNTOLD, given, f"init_from={file}"]))


def test_without_init_from_unset_keys_have_their_standard_values():
    cfg = Finetuning(compose("finetune", UNTOLD)).cfg
    assert (cfg.model.backbone, cfg.model.stem_stride, cfg.data.size) == ("convnextv2_atto", 4, (224, 224))
    assert (cfg.data.in_chans, cfg.data.mean) == (3, DataConfig().mean)
    assert type(cfg.data) is DataConfig
    with pytest.raises(ConfigError, match=r"data.mean must be 1 number, one per channel.*; got .*"):
        Finetuning(compose("finetune", [*UNTOLD, "data.in_chans=1"]))
    for wrong in ("data.mean=[0.5,nan]", "data.image_size=0", "data.bit_depth=99", "model.stem_stride=3"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            compose("finetune", [*UNTOLD, wrong])  # before anything is read


@pytest.mark.parametrize("gone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_with_a_checkpoint_of_its_own_does_not_look_at_init_from(tmp_path, monkeypatch, gone):
    """It may have been moved, replaced or damaged; what was taken from it is known. Resuming equals never stopping."""
    file = tmp_path / "pretrained.pt"
    common = (*UNTOLD, "optim.ema_decay=0.5", "trainer.eval_every_epochs=null", f"init_from={file}")
    write_classifier(file, config(*OTHER), classes=10)
    finetune(compose("finetune", common), tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(compose("finetune", [*common, "trainer.max_steps=4"]), tmp_path / "run")
    file.unlink() if gone else file.write_bytes(b"damaged")
    for overrides in (common, [o for o in common if not o.startswith("init_from")]):
        with monkeypatch.context() as patch:
            patch.setattr(initial, "load_initial", pytest.fail)
            finetune(compose("finetune", overrides), tmp_path / "run")
    states = [newest(tmp_path / name) for name in ("whole", "run")]
    for name, value in states[0]["ema"].items():
        assert torch.equal(value, states[1]["ema"][name]), name
    assert {**states[1]["config"], "init_from": None} == {**states[0]["config"], "init_from": None}
    with pytest.raises(CheckpointError, match="pretrained.pt"):
        finetune(compose("finetune", [*common, "trainer.resume=false"]), tmp_path / "run")


def test_only_weights_are_taken_from_a_checkpoint_with_an_optimizer(tmp_path):
    """A checkpoint of which most is moments: they are not brought to memory."""
    write_classifier(tmp_path / "own.pt", config(), classes=10)
    state = checkpoint.read(tmp_path / "own.pt")
    checkpoint.write_atomically(tmp_path / "own.pt", {**state, "optimizer": {"moments": torch.zeros(2**26)}})
    task = Finetuning(config(f"init_from={tmp_path}/own.pt"))
    before = anonymous_memory()
    task.initialise()
    assert anonymous_memory() - before < 2**26
    assert torch.equal(task.model.head.norm.weight, state["model"]["head.norm.weight"])


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_fine_tuning_at_another_size_works_and_is_stated(tmp_path):
    write_classifier(tmp_path / "small.pt", config(), classes=10)
    new = ("data.image_size=64", "trainer.max_steps=1", "data.length=8")
    cfg = config(f"init_from={tmp_path}/small.pt", *new)
    said = f"data.image_size is [64, 64]; {tmp_path}/small.pt was trained with [32, 32]"
    assert Finetuning(cfg).notes[-1] == said
    with pytest.raises(Interrupted):
        finetune(cfg, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "top1" in json.loads(lines[-1])


class GoldenImages:
    """The inputs of a golden file: normalised already, so float."""

    def __init__(self, imgs: torch.Tensor) -> None:
        self.imgs = imgs

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, index):
        return Sample(self.imgs[index], None)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_evaluation_gives_the_official_logits(tmp_path, batch_size):
    """An official checkpoint, imported, through what `fcmae evaluate` does to images and model."""
    _, golden = read_golden("convnextv2_classifier")
    params = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    torch.save({"model": params}, tmp_path / "official.pth")
    import_weights(tmp_path / "official.pth", "official", tmp_path / "imported.pt")
    imgs = golden["input.imgs"].float()
    data = DataConfig(image_size=list(imgs.shape[-2:]), crop_pct=1.0)
    parts = predictions(
        load(tmp_path / "imported.pt"), GoldenImages(imgs), data, LoaderConfig(workers=0), batch_size, "float32", CPU
    )
    logits, _, places = zip(*parts, strict=True)
    assert torch.equal(torch.cat(places), torch.arange(len(imgs)))
    assert relative_error(torch.cat(logits), golden["output.logits"]) < 1e-5


def test_a_run_does_not_resume_with_other_classes(tmp_path, capsys):
    """Of as many images: the weights of one class would be taken for those of another."""
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / name / f"{number}.png")
    given = [o for o in TINY_FINETUNE if not o.startswith(("data=", "data.length", "trainer.eval", "optim.global"))]
    run = [*given, "data=imagefolder", f"data.path={tmp_path}/images", f"hydra.run.dir={tmp_path}/run"]
    run += ["trainer.eval_every_epochs=null", "optim.global_batch_size=2", "trainer.max_steps=1"]
    assert main(run) == 75
    (tmp_path / "images" / "ant").rename(tmp_path / "images" / "cat")
    assert main(run) == 2
    assert "classes: 2, such as ant -> 2, such as bee" in capsys.readouterr().err
