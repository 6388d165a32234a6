"""Mistakes on the command line: one line, exit code 2."""

import pytest

from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN

MISTAKES = {
    "config of a sweep": (
        ("pretrain", "-m", "seed=1,2", "--cfg", "job"),
        "--cfg prints the config of one run",
    ),
    "interpolation": (
        ("pretrain", "data=synthetic", "hydra.run.dir=${foo}"),
        "hydra.run.dir: Interpolation key 'foo' not found",
    ),
    "benchmark without a model": (("bench", "step", "models=[]"), "models must be one model or more, in a list"),
    "size of a benchmark": (
        ("bench", "step", "image_size=33"),
        "image height 33 is not a multiple of the patch",
    ),
    "folder of weights": (("import", ".", "--from", "official", "--out", "new.pt"), "no file . but a folder"),
    "no run directory": (("pretrain", "hydra.run.dir="), "hydra.run.dir must be a folder; got ''"),
    "run directory of a sweep": (
        ("pretrain", "-m", "seed=1,2", "hydra.run.dir=x"),
        "cannot be used with -m; set hydra.sweep",
    ),
    "run directory below a file": (("pretrain", "hydra.run.dir=/dev/null/x"), "cannot be created: /dev/null/x: Not a"),
    "output": (("knn", "checkpoint=.", "out=/dev/null/x"), "out /dev/null/x cannot be written: "),
    "picture": (("reconstruct", "x", "y", "--out", "a.foo"), "--out must be a file whose name says its"),
    "benchmark": (("bench", "step", "--json", "/dev/null/x"), "--json /dev/null/x cannot be written"),
    "command": (("pretrian",), "unknown command 'pretrian'; did you mean pretrain? The commands are init, pretrain"),
    "key": (("pretrain", "data=synthetic", "optim.lrr=1"), "optim.lrr: unknown key"),
    "range": (
        ("pretrain", "data=synthetic", "model.mask_ratio=2"),
        "model.mask_ratio must be a number in (0, 1); got 2.0",
    ),
    "no data": (("pretrain",), "data.path is not set"),
    "folder": (("pretrain", "data.path=/nowhere"), "data.path: /nowhere is not a folder"),
    "size": ((*TINY_PRETRAIN, "data.image_size=36"), "the nearest sizes that fit are 32 and 40"),
    "backbone": ((*TINY_PRETRAIN, "model.backbone=convnextv2_ato"), "did you mean convnextv2_atto"),
    "batch": ((*TINY_PRETRAIN, "optim.global_batch_size=99"), "at most 24"),
    "checkpoint": (("evaluate", "checkpoint=nowhere"), "no checkpoint or run directory nowhere"),
    "init": ((*TINY_FINETUNE, "init_from=nowhere"), "no checkpoint or run directory nowhere"),
    "mixup": (
        (*TINY_FINETUNE, "augment.mixup=1", "trainer.micro_batch_size=1"),
        "must be at least 2 with augment.mixup",
    ),
    "cuda graph": (
        ("pretrain", "trainer.device=cpu", "trainer.cuda_graph=true", "data=synthetic"),
        "trainer.cuda_graph must be false or null with a CPU; got True",
    ),
    "cuda graph of fine-tuning": (
        ("finetune", "trainer.device=cpu", "trainer.cuda_graph=true", "data=synthetic"),
        "trainer.cuda_graph must be false or null with a CPU; got True",
    ),
    "golden": (("doctor", "--golden", "nowhere.safetensors"), "is not a golden file"),
}


def test_a_mistake_in_a_file_of_ones_own_config_names_it(fcmae, tmp_path):
    (tmp_path / "own" / "data").mkdir(parents=True)
    for text, message in (
        ("a: b: c", 'data/mine.yaml", line 1, column 5'),
        ("- a", "data/mine must hold keys and values; got a list"),
    ):
        (tmp_path / "own" / "data" / "mine.yaml").write_text(text)
        done = fcmae("pretrain", "--config-dir=own", "data=mine", check=2)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(capfd, case):
    from fcmae.cli import main

    args, message = MISTAKES[case]
    assert main(list(args)) == 2
    err = capfd.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
    assert "Traceback" not in err
