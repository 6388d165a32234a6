"""Mistakes of a command that can be found before data is read are reported together, one line each."""

import pytest

from fcmae import cli
from fcmae.cli import main
from fcmae.config import compose, from_dict
from fcmae.config.data import DataConfig
from fcmae.config.model import TIMM_TOTAL_STRIDE
from fcmae.engines import total_stride
from fcmae.errors import ConfigError
from fcmae.models import create_backbone


def told(capfd, *args):
    assert main(list(args)) == 2
    lines = capfd.readouterr().err.splitlines()
    start = f"fcmae {args[0]}: "
    assert all(line.startswith(start) for line in lines), lines
    return [line.removeprefix(start) for line in lines]


TOGETHER = {
    "values of all groups, and folders": (
        "pretrain data.path=/nowhere data.image_size=33 optim.lr=-1 seed=-1 schedule.epochs=0 data.mean=[1] "
        "monitor.knn_every_epochs=1 data.val_path=/nor/here",
        [
            "data.mean must be 3 numbers, one per channel (data.in_chans=3; fcmae prepare data.stats=true prints them)",
            "optim.lr must be a positive number; got -1.0",
            "schedule.epochs must be a positive number; got 0.0",
            "schedule.warmup_epochs must be from 0 to schedule.epochs (0); got 40.0",
            "seed must be an integer from 0 to 2**63 - 1; got -1",
            "data.image_size: image height 33 is not a multiple of the patch of 32 px; the nearest sizes that fit are "
            "32 and 64",
            "data.path: /nowhere is not a folder",
            "data.val_path: /nor/here is not a folder",
        ],
    ),
    "keys, types, files and values": (
        "pretrain data=synthetic optim.lrr=1 optim.blr=fast model=resnet model.mask_ratio=1 optim(=1 +data.foo=1",
        [
            "optim.lrr: unknown key",
            "optim.blr must be a number; got 'fast'",
            "model must be one of convnext",
            "optim(=1: not an override",
            "data.foo: unknown key",
            "model.mask_ratio must be a number in (0, 1); got 1.0",
        ],
    ),
    "a value whose check is followed by others": (
        "pretrain data=synthetic data.image_size=[1,2,3] data.hflip=2",
        [
            "data.image_size must be an integer from 1 to 16384, or [height, width]; got [1, 2, 3]",
            "data.hflip must be a number from 0 to 1; got 2.0",
        ],
    ),
    "what does not fit each other": (
        "pretrain data=synthetic model.mask_patch_size=48 trainer.device=cpu trainer.cuda_graph=true "
        "precision=fp16 optim.global_batch_size=9 data.crops_per_image=2 trainer.micro_batch_size=1 "
        "monitor.knn_k=30 monitor.knn_gallery=20",
        [
            "monitor.knn_k must be at most monitor.knn_gallery (20); got 30",
            "trainer.cuda_graph must be false or null with a CPU and precision=fp16; got True",
            "optim.global_batch_size must be a multiple of data.crops_per_image (2); got 9",
            "trainer.micro_batch_size must be at least 2 with data.crops_per_image=2; got 1",
            "model.mask_patch_size must be a multiple of 32, the total stride with model.stem_stride=4; got 48",
        ],
    ),
    "strides, and a list without brackets": (
        "pretrain data=synthetic data.image_size=40 model.strides=[64,2,2,2] trainer.log_every=1,2",
        [
            "trainer.log_every must be one value; got 1,2. Write a list as trainer.log_every=[1,2]; -m starts a run "
            "with each value",
            "model.strides must be three to five strides of 1 to 8",
        ],
    ),
    "no strides": (
        "pretrain data=synthetic data.image_size=40 model.strides=[]",
        ["model.strides must be three to five strides of 1 to 8"],
    ),
    "fine-tuning": (
        "finetune data=synthetic init_from=/nowhere trainer.cuda_graph=true trainer.device=cpu model.num_classes=1 "
        "data.decode_on=gpu augment.mixup=0.8 trainer.micro_batch_size=1",
        [
            "model.num_classes must be 2 or more; got 1",
            "data.decode_on must be cpu in fine-tuning; got 'gpu'",
            "trainer.micro_batch_size must be at least 2 with augment.mixup or augment.cutmix (pairs); got 1",
            "trainer.cuda_graph must be false or null with a CPU; got True",
            "init_from: no checkpoint or run directory /nowhere",
        ],
    ),
    "k-NN": (
        "knn checkpoint=/nowhere@best k=[5,30] gallery=20 loader.on_error=foo out=/dev/null/x precision=int8",
        [
            "precision must be one of auto",
            "loader.on_error must be one of raise, skip; got 'foo'",
            "k must be at most gallery (20); got [5, 30]",
            "checkpoint: no checkpoint or run directory /nowhere@best",
            "out /dev/null/x cannot be written: ",
        ],
    ),
    "accuracy": (
        "evaluate checkpoint=. labels=/nowhere.csv batch_size=0",
        ["batch_size must be a positive number; got 0", "labels: no file /nowhere.csv"],
    ),
    "a linear probe": (
        "probe checkpoint= blr=[a] epochs=-1",
        [
            "checkpoint must be a run",
            "blr must be a positive",
            "epochs must be a positive",
            "warmup_epochs must be from 0",
        ],
    ),
    "prepare": (
        "prepare data.path=/nowhere quality=0",
        [
            "quality must be from 1 to 100; got 0",
            "out must be a folder",
            "data.path: /nowhere is not a folder",
        ],
    ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_mistakes_are_told_together(capfd, case):
    command, expected = TOGETHER[case]
    lines = told(capfd, *command.split())
    missing = [start for start in expected if not any(line.startswith(start) for line in lines)]
    assert (missing, len(lines)) == ([], len(expected)), lines


def test_from_python_they_are_one_error():
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", ["data=synthetic", "optim.lr=-1", "seed=-1"])
    assert caught.value.mistakes == [
        "optim.lr must be a positive number; got -1.0",
        "seed must be an integer from 0 to 2**63 - 1; got -1",
    ]
    with pytest.raises(ConfigError) as caught:
        from_dict(DataConfig, {"hflip": 2, "bit_depth": 2})
    assert len(caught.value.mistakes) == 2
    with pytest.raises(ConfigError, match=r"data.hflip must be a number from 0 to 1; got 2$"):
        DataConfig(hflip=2)


def test_what_a_run_with_checkpoints_was_initialised_from_is_not_needed(capfd, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    args = ("finetune", "data=synthetic", "init_from=/nowhere", "optim.lr=-1", f"hydra.run.dir={tmp_path}")
    assert told(capfd, *args) == ["optim.lr must be a positive number; got -1.0"]


def test_folders_of_one_machine_are_told_after_the_ranks_have_met(monkeypatch, capfd):
    """Another machine may have them. With other mistakes they are reported at once, since all ranks end."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(cli._HYDRA, "pretrain", lambda *_: print("begun"))
    args = ["pretrain", "data.path=/nowhere", "hydra.run.dir=."]
    assert main(args) == 0
    assert capfd.readouterr().out == "begun\n"
    assert told(capfd, *args, "seed=-1")[1:] == ["data.path: /nowhere is not a folder"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report", "run"], "the following arguments are required: --out"),
        (["ls", "a", "b"], "unrecognized arguments: b"),
        (["bench", "foo"], "argument what: invalid choice: 'foo'"),
        (["reconstruct", "run", "a.png", "--channels", "a,b"], "argument --channels: must be integers such as 0,2,4"),
        (["embed", "run", "a.png", "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    ],
)
def test_a_wrong_flag_is_one_line_without_the_usage(capfd, args, message):
    (line,) = told(capfd, *args)
    assert line.startswith(message)
    assert line.endswith(f"(fcmae {args[0]} --help shows all flags)")


@pytest.mark.parametrize("name", ["foo", "in1k/finetune_bas", "fashion_mnist"])
def test_experiments_are_named_the_closest_first(capfd, name):
    (line,) = told(capfd, "finetune", "data=synthetic", f"experiment={name}")
    start, end = (
        f"Could not find 'experiment/{name}'; the nearest are ",
        " (docs/recipes.md and conf/experiment have all)",
    )
    assert line.startswith(start)
    names = line.removeprefix(start).removesuffix(end).split(", ")
    assert len(names) == 5
    assert name == "foo" or names[0] in ("in1k/finetune_base", "fashion_mnist/pretrain")


@pytest.mark.parametrize("stem_stride", TIMM_TOTAL_STRIDE)
def test_the_total_stride_is_that_of_the_network(stem_stride):
    kwargs = {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4], "patch_size": stem_stride}
    assert total_stride(create_backbone("convnextv2_atto", **kwargs)) == TIMM_TOTAL_STRIDE[stem_stride]


def test_a_command_that_fails_early_leaves_no_folder(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mistake in ("data.path=/nowhere", "optim.lr=-1"):
        told(capfd, "pretrain", "data=synthetic", "data.name=imagefolder", mistake, f"hydra.run.dir={tmp_path}/run")
        assert list(tmp_path.iterdir()) == []
    told(capfd, "evaluate", "checkpoint=nowhere")
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (32, "leaves none of 1 patches visible; use larger images, a smaller total stride (model.strides)"),
        (
            64,
            "leaves none of 4 patches visible; use larger images, a smaller total stride (model.strides) or a ratio",
        ),
    ],
)
def test_images_that_are_too_small_say_what_helps(capfd, size, expected):
    (line,) = told(capfd, "pretrain", "data=synthetic", f"data.image_size={size}", "model.mask_ratio=0.9")
    assert expected in line
    assert line.endswith("0.75" if size == 64 else "(model.strides)")
