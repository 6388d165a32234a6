"""The real commands, as a user runs them, on tiny data."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fcmae as package
from fcmae.checkpoints import checkpoint
from fcmae.evaluation.class_metrics import NAMES
from tests.conftest import GOLDEN, TINY_FINETUNE, TINY_PRETRAIN, run_python
from tests.results import assert_same, metrics_of, newest


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A finished pretraining run of 9 steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_python(folder, "-m", "fcmae.cli", *TINY_PRETRAIN, "trainer.eval_every_epochs=1", "hydra.run.dir=run")
    return folder / "run"


def test_a_run_directory_has_everything(pretrained):
    assert [line["step"] for line in metrics_of(pretrained)] == list(range(1, 10))
    assert metrics_of(pretrained)[-1]["loss"] < metrics_of(pretrained)[0]["loss"]
    assert (pretrained / "config.yaml").read_text().startswith("name: pretrain\n")
    assert len(list((pretrained / "checkpoints").iterdir())) == 2
    pictures = sorted((pretrained / "reconstructions").iterdir())
    assert [p.name for p in pictures] == [f"reconstruction_{step:08d}.png" for step in (3, 6, 9)]
    files = {"checkpoints", "config.yaml", "encoder.safetensors", "metrics.jsonl", "reconstructions"}
    files |= {"data_sheet.json", "events.jsonl"}
    assert {p.name for p in pretrained.iterdir()} == files
    assert any("checkpoint_stall_seconds" in line for line in metrics_of(pretrained))


def test_the_encoder_alone_is_a_timm_model(pretrained):
    encoder = load_file(pretrained / "encoder.safetensors")
    assert_same(encoder, package.load(pretrained).backbone.state_dict())


def test_load_rebuilds_the_model_from_the_checkpoint_alone(pretrained):
    model = package.load(pretrained)
    assert isinstance(model, package.FCMAE)
    assert_same(model.state_dict(), newest(pretrained)["model"])


def test_killed_and_resumed_equals_never_killed(fcmae, pretrained, tmp_path):
    """In the middle of an epoch too: 3 steps an epoch, stopped after 4 and 8."""
    for steps in (4, 8):
        stopped = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", f"trainer.max_steps={steps}", check=75)
        assert f"stopped at trainer.max_steps={steps} of 9" in stopped.stderr
    # what a SIGKILL leaves: a checkpoint cut off, a line half written
    torn = tmp_path / "run" / "checkpoints" / "step_00000099.pt"
    torn.write_bytes(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].read_bytes()[:5000])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run")
    assert "step_00000099.pt cannot be read" in done.stderr
    assert "trying the one before" in done.stderr
    assert "resumed at step 8" in done.stderr
    torn.unlink(missing_ok=True)
    resumed, undisturbed = newest(tmp_path / "run"), newest(pretrained)
    assert_same(resumed["model"], undisturbed["model"])
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == list(range(1, 10))
    assert [m["loss"] for m in metrics_of(tmp_path / "run")] == [m["loss"] for m in metrics_of(pretrained)]


def test_begun_anew_nothing_of_the_first_run_is_lost(fcmae, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    names = ("config.yaml", "metrics.jsonl", "encoder.safetensors", "reconstructions")
    for again in ("", "2"):
        done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", "trainer.resume=false", "seed=1")
        for name in names:
            assert f"{name} is no longer used: renamed to {name}.unused{again}" in done.stderr
    for name in (*names[:3], "checkpoints/step_00000009.pt"):
        assert (tmp_path / "run" / f"{name}.unused").read_bytes() == (pretrained / name).read_bytes()
    pictures = (folder.iterdir() for folder in (tmp_path / "run" / "reconstructions.unused", pretrained / names[3]))
    assert len({tuple(sorted((path.name, path.read_bytes()) for path in paths)) for paths in pictures}) == 1
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == list(range(1, 10))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "encoder.safetensors"])
def test_a_folder_with_files_of_others_is_no_run_directory(fcmae, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("my: own")
    done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=mine", check=2)
    assert f"hydra.run.dir={tmp_path}/mine has {name}, which fcmae did not write; give a new folder" in done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == {name: "my: own"}


def test_a_run_is_not_kept_among_its_images(fcmae, tmp_path):
    for i in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    done = fcmae(*TINY_PRETRAIN, "data.name=imagefolder", "data.path=images", "hydra.run.dir=images/run", check=2)
    assert f"hydra.run.dir={tmp_path}/images/run must not be in data.path=images, w" in done.stderr


def test_other_images_and_a_shorter_schedule_are_no_way_to_go_on(fcmae, tmp_path):
    fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", "trainer.max_steps=5", check=75)
    done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", "data.length=32", check=2)
    assert "  data.length: 24 -> 32\n  training images: 24 -> 32\n" in done.stderr
    shorter = ("schedule.epochs=1", "trainer.allow_changed_recipe=true")
    done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", *shorter, check=2)
    assert f"schedule.epochs=1 ends at step 3; the run in {tmp_path}/run is at step 5" in done.stderr


@pytest.mark.parametrize("overrides", [("loader.workers=2",), ("trainer.micro_batch_size=2",), ("engine=masked",)])
def test_what_is_not_the_recipe_does_not_change_the_result(fcmae, pretrained, tmp_path, overrides):
    fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", *overrides)
    ours, expected = (newest(run)["model"] for run in (tmp_path / "run", pretrained))
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_equal_one(fcmae, pretrained, tmp_path):
    done = fcmae(*TINY_PRETRAIN, "hydra.run.dir=run", ranks=2)
    assert "Warning" not in done.stderr
    losses = [m["loss"] for m in metrics_of(tmp_path / "run")]
    assert losses == pytest.approx([m["loss"] for m in metrics_of(pretrained)], rel=1e-5)


def test_ranks_share_one_run_directory(fcmae, tmp_path):
    fcmae(*TINY_PRETRAIN, "trainer.max_steps=1", ranks=2, check=None)
    assert len(list((tmp_path / "runs" / "pretrain").iterdir())) == 1


def test_finetune_evaluate_and_knn(fcmae, pretrained, tmp_path):
    mixing = ("augment.mixup=0.8", "augment.cutmix=1.0", "augment.label_smoothing=0.1", "model.drop_path_rate=0.2")
    fcmae(*TINY_FINETUNE, f"init_from={pretrained}", "hydra.run.dir=fine", "optim.ema_decay=0.5", *mixing)
    run_dir = tmp_path / "fine"
    state = newest(run_dir)
    assert state["classes"] == [str(i) for i in range(10)]
    logged = [m for m in metrics_of(run_dir) if "top1" in m][-1]
    assert logged.keys() == {"step", *NAMES, *(f"ema_{name}" for name in NAMES)}
    result = json.loads(
        fcmae("evaluate", "checkpoint=fine@last", "out=result.json", "batch_size=5", "report=null").stdout
    )
    assert result == {**{k: logged[k] for k in logged if k != "step"}, "images": 24}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    same = fcmae("knn", f"checkpoint={pretrained}", "data.length=30", "k=1")
    knn = json.loads(same.stdout)
    assert (knn["knn1"], knn["copies"]) == (100.0, 30)  # gallery and test images are the same
    assert "warning: 30 of 30 validation images have the features of a training image" in same.stderr
    refused = fcmae("knn", f"checkpoint={pretrained}", "data.length=30", "k=[1,31]", check=2).stderr
    assert "fcmae knn: k must be at most 30, the number of images to compare with; got [1, 31]" in refused


def test_no_command_overwrites_what_it_reads(fcmae, pretrained, tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "photo.png", tmp_path / "folder" / "a.png")
    checkpoint_file = sorted((pretrained / "checkpoints").iterdir())[-1]
    (tmp_path / "labels.csv").write_text("a,1")
    before = {path: path.read_bytes() for path in (*tmp_path.rglob("*.*"), checkpoint_file)}
    for args, key in (
        (
            ("reconstruct", str(pretrained), "photo.png", "--out", "photo.png"),
            "--out must be another file; 'photo.png' is",
        ),
        (
            ("reconstruct", str(pretrained), "folder", "--out", "folder/a.png"),
            "--out must be another file; 'folder/a.png' is",
        ),
        (
            ("knn", f"checkpoint={checkpoint_file}", f"out={checkpoint_file}"),
            f"out must be another file; '{checkpoint_file}' is",
        ),
        (
            ("knn", f"checkpoint={pretrained}", "out=photo.png"),
            "out must be a new file or JSON; 'photo.png' is something else",
        ),
        (
            ("evaluate", "checkpoint=x", "labels=labels.csv", "per_class=labels.csv"),
            "per_class must be another file; 'labels.csv' is",
        ),
        (
            ("evaluate", "checkpoint=x", "per_class=a.json", "confusion=./a.json"),
            "confusion must be another file; './a.json' is",
        ),
    ):
        assert f"fcmae {args[0]}: {key}" in fcmae(*args, check=2).stderr
    assert {path: path.read_bytes() for path in before} == before


def test_finetune_resumes_bit_exactly(fcmae, tmp_path):
    common = (*TINY_FINETUNE, "optim.ema_decay=0.9", "model.drop_path_rate=0.2", "augment.mixup=0.8")
    common += ("augment.on=gpu", "augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.25")
    said = fcmae(*common, "hydra.run.dir=whole").stderr
    assert "augment.on=gpu: without a GPU the training process augments" in said
    fcmae(*common, "hydra.run.dir=parts", "trainer.max_steps=4", check=75)
    fcmae(*common, "hydra.run.dir=parts")
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    assert_same(whole["ema"], parts["ema"])


ONE_READER = """
import sys
from fcmae import ranks as launch
from fcmae.cli import main
from fcmae.checkpoints import checkpoint
from fcmae.evaluation.class_metrics import NAMES

if launch.detect().rank > 0:
    checkpoint.header = checkpoint.resolve = checkpoint.read = None
sys.exit(main(sys.argv[1:]))
"""


def test_the_first_rank_alone_reads_what_fine_tuning_starts_from(fcmae, pretrained, tmp_path):
    args = (*TINY_FINETUNE, f"init_from={pretrained}", "schedule.epochs=1")
    (tmp_path / "one_reader.py").write_text(ONE_READER)
    run_python(tmp_path, "one_reader.py", *args, "hydra.run.dir=ranks", ranks=2)
    fcmae(*args, "hydra.run.dir=alone")
    losses = [[m["loss"] for m in metrics_of(tmp_path / name) if "loss" in m] for name in ("ranks", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_finetuning_starts_from_the_pretrained_encoder(fcmae, pretrained, tmp_path):
    fcmae(*TINY_FINETUNE, f"init_from={pretrained}", "optim.lr=1e-12", "schedule.min_lr=0", "hydra.run.dir=fine")
    encoder = {
        name.removeprefix("backbone."): value
        for name, value in newest(pretrained)["model"].items()
        if name.startswith("backbone.stages")
    }
    tuned = newest(tmp_path / "fine")["model"]
    for name, value in encoder.items():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-9)


def test_own_images_without_labels(fcmae, tmp_path):
    """Grey pictures of another shape in a nested folder."""
    folder = tmp_path / "pictures" / "microscope"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 70), dtype=np.uint8)).save(folder / f"{i}.png")
    own = ("data=imagefolder", "data.path=pictures", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.25]")
    sizes = ("data.image_size=[32,48]", "optim.global_batch_size=4", "schedule.warmup_epochs=0")
    fcmae(*TINY_PRETRAIN, *own, *sizes, "hydra.run.dir=run")
    fcmae("reconstruct", "run", "--out", "grid.png", "pictures", "--max-images", "3")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 3 * 32


def test_finetuning_without_validation_images(fcmae, tmp_path):
    """As on ImageNet-22K, which has none."""
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / label / f"{i}.png")
    args = (*TINY_FINETUNE, "data=imagefolder", "data.path=train", "data.image_size=32", "optim.global_batch_size=4")
    missing = fcmae(*args, "hydra.run.dir=run", check=2).stderr
    assert "data.val_path is not set" in missing
    assert "trainer.eval_every_epochs=null" in missing
    fcmae(*args, "trainer.eval_every_epochs=null", "hydra.run.dir=run")
    assert newest(tmp_path / "run")["step"] == 2 * 2
    assert not any("top1" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_loggers_write_where_they_should(fcmae, tmp_path):
    pytest.importorskip("tensorboard")
    overrides = ("logger.wandb=offline", "logger.tensorboard=true", "hydra.run.dir=run", "schedule.epochs=1")
    fcmae(*TINY_PRETRAIN, *overrides)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert all(part in events.read_bytes() for part in (b"images_per_second", b"reconstruction", b"\x89PNG"))
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_precisions(fcmae, tmp_path):
    for precision in ("bf16", "fp16"):
        fcmae(*TINY_PRETRAIN, f"precision={precision}", f"hydra.run.dir={precision}", "schedule.epochs=1.0")
        assert metrics_of(tmp_path / precision)[-1]["loss"] == pytest.approx(1.0, abs=0.2)


def test_a_run_of_the_other_kind_is_left_alone(fcmae, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    done = fcmae(*TINY_FINETUNE, "hydra.run.dir=run", check=2)
    assert done.stderr.count("run holds a run of fcmae pretrain; give fcmae finetune another hydra.run") == 1


def test_a_changed_recipe_is_gone_on_with(fcmae, tmp_path):
    """Where it is allowed: another precision, other groups of parameters."""
    args = (*TINY_FINETUNE, "hydra.run.dir=run", "trainer.allow_changed_recipe=true")
    fcmae(*args, "trainer.max_steps=2", check=75)
    fcmae(*args, "trainer.max_steps=4", "optim.weight_decay=0", "precision=fp16", check=75)
    assert newest(tmp_path / "run")["scaler"]
    fcmae(*args, "optim.weight_decay=0.3", "optim.betas=[0.8,0.9]", "optim.layer_decay=0.7")
    state = newest(tmp_path / "run")
    assert state["step"] == 6
    groups = state["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert len({group["lr_scale"] for group in groups}) > 1


def test_a_classifier_has_no_decoder_and_a_decoder_no_classifier(capsys, pretrained, tmp_path):
    from fcmae.cli import main

    assert main(["evaluate", f"checkpoint={pretrained}"]) == 2
    assert "has no classifier" in capsys.readouterr().err
    wrong = [*TINY_FINETUNE, "model.dims=[8,12,16,32]", f"init_from={pretrained}", f"hydra.run.dir={tmp_path}"]
    assert main(wrong) == 2
    error = capsys.readouterr().err
    assert "fcmae finetune: model.dims is [8, 12, 16, 32]; " in error
    assert error.endswith("has [8, 12, 16, 24]\n")


def test_a_checkpoint_with_code_in_it_is_refused(capsys, tmp_path):
    from fcmae.cli import main

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    state = {"format": checkpoint.FORMAT, "code": Code()}
    checkpoint.write_atomically(tmp_path / "step_00000001.pt", state)  # a correct checksum around it
    assert main(["evaluate", f"checkpoint={tmp_path}/step_00000001.pt"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_cfg_job_prints_the_composed_config(fcmae):
    printed = fcmae("pretrain", "--cfg", "job", "experiment=fashion_mnist/pretrain").stdout
    assert "global_batch_size: 1024" in printed
    assert "image_size: 128" in printed


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 2)])
def test_a_non_finite_gradient_stops_before_the_step(fcmae, tmp_path, ranks, micro):
    """A NaN in sample 5's image, whichever rank reads it."""
    code = (
        "import sys, torch, fcmae.data.sources as s\n"
        "read = s.Synthetic.__getitem__\n"
        "bad = lambda self, i: s.Sample(read(self, i).image.float() / (0 if i == 5 else 1), None)\n"
        "s.Synthetic.__getitem__ = bad\n"
        "from fcmae.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    script = tmp_path / "poisoned.py"
    script.write_text(code)
    overrides = ("trainer.log_every=100", "trainer.checkpoint_every_epochs=3", f"trainer.micro_batch_size={micro}")
    done = run_python(tmp_path, str(script), *TINY_PRETRAIN, *overrides, "hydra.run.dir=run", ranks=ranks, check=1)
    assert "is not finite; the weights are those before it" in done.stderr
    report = json.loads(next((tmp_path / "run").glob("nonfinite_step_*.json")).read_text())
    assert report["step"] < 3  # sample 5 is in the first epoch, seen at the end of it
    assert "synthetic[5]" in [sample["sample"] for sample in report["samples"]]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_doctor_on_the_golden_files(fcmae):
    done = fcmae("doctor", "--golden", *map(str, sorted(GOLDEN.glob("*.safetensors"))))
    assert "everything agrees" in done.stdout


def test_optional_packages_are_not_needed_to_train(tmp_path):
    code = (
        "import sys\n"
        "for name in ('wandb', 'MinkowskiEngine', 'matplotlib', 'tensorboard', 'triton'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "from fcmae.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "blocked.py").write_text(code)
    run_python(tmp_path, "blocked.py", *TINY_PRETRAIN, "schedule.epochs=1.0")
