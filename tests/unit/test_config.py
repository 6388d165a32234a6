import pytest
import yaml
from omegaconf import OmegaConf

from fcmae.config import COMMANDS, KnnConfig, PretrainConfig, compose, conf_dir, from_dict, quoted, to_dict
from fcmae.errors import ConfigError

BAD = {
    "unknown key": ("optim.lrr=1", r"optim.lrr: unknown key; did you mean optim.lr or optim.blr\?"),
    "unknown key at the top": ("foo=1", r"foo: unknown key; docs/config.md lists all keys, and --cfg job"),
    "key of another group": ("optim.epochs=3", r"optim.epochs: unknown key; did you mean schedule.epochs\? "),
    "key without its group": ("mask_ratio=0.5", r"mask_ratio: unknown key; did you mean model.mask_ratio\? "),
    "part of a key": ("batch_size=9", r"did you mean trainer.micro_batch_size or optim.global_batch_size\? "),
    "folder of a run": ("out=runs/photos", r"out: unknown key; did you mean hydra.run.dir\? "),
    "key of a small group": ("monitor.knn=1", r"monitor.knn: unknown key; must be one of val_loss, val_images"),
    "wrong type": ("optim.blr=fast", r"^optim.blr must be a number; got 'fast'"),
    "wrong type of a flag": ("trainer.resume=maybe", r"trainer.resume: .*maybe.* not a valid bool"),
    "added key": ("+data.foo=1", r"^data.foo: unknown key; .*docs/config.md"),
    "added key at the top": ("+foo=1", r"^foo: unknown key; docs/config.md"),
    "infinite epochs": ("schedule.epochs=inf", r"schedule.epochs must be a positive number.*; got inf"),
    "infinite interval": (
        "trainer.checkpoint_every_epochs=inf",
        r"checkpoint_every_epochs must be a positive number; got inf",
    ),
    "infinite timeout": (
        "trainer.hang_timeout=inf",
        r"hang_timeout must be a number of seconds up to 1e7; got inf",
    ),
    "infinite rate": ("optim.lr=inf", r"optim.lr must be a positive number.*; got inf"),
    "infinite std": ("data.std=[inf,1,1]", r"data.std must be 3 positive numbers.*; got \[inf, 1.0, 1.0\]"),
    "std of zero": ("data.std=[0,0,0]", r"data.std must be 3 positive numbers.*; got \[0.0, 0.0, 0.0\]"),
    "mean that is none": ("data.mean=[nan,1,1]", r"data.mean must be 3 numbers.*; got \[nan, 1.0, 1.0\]"),
    "infinite ratio": ("data.crop_ratio=[1,inf]", r"data.crop_ratio must be .*; got \[1.0, inf\]"),
    "large image": ("data.image_size=1000000", r"data.image_size must be an integer from 1 to 16384.*; got 1000000"),
    "large seed": ("seed=99999999999999999999", r"seed must be an integer from 0 to 2\*\*63 - 1.*; got 9+"),
    "no mask": ("model.mask_ratio=0", r"model.mask_ratio must be a number in \(0, 1\).*; got 0.0"),
    "experiment of another command": (
        "experiment=in1k/finetune_base",
        r"^experiment/in1k/finetune: this command has no key model.head_init_scale; it is for fcmae finetune",
    ),
    "unknown option": (
        "model=resnet50",
        "model must be one of convnext.*convnextv2_base.*; got 'resnet50'",
    ),
    "no target": ("target=[]", r"target must be one or several different targets; got \[\]"),
    "a target twice": ("target=[pixels,hog,pixels]", r"target must be .* different targets; got \[pixels,hog,pixels\]"),
    "a target that is none": (
        "target=pixel",
        "target is 'pixel'; did you mean pixels. It must be one of channels, hog, ",
    ),
    "a number for true": ("data.rot90=3", "data.rot90 must be true or false; got 3"),
    "a number for true, false or null": ("trainer.cuda_graph=-1.5", "trainer.cuda_graph must be true or false; got -1"),
    "mask ratio": ("model.mask_ratio=1.0", r"model.mask_ratio must be a number in \(0, 1\).*; got 1.0"),
    "depths": ("model.depths=[1,2]", r"model.depths must be 4 positive integers.*; got \[1, 2\]"),
    "image size": ("data.image_size=[224]", r"data.image_size must be an integer from 1.*; got \[224\]"),
    "mean": ("data.mean=[0.5]", r"data.mean must be 3 numbers, one per channel \(data.in_chans=3; .*; got \[0.5\]"),
    "crop": ("data.crop_scale=[0.5,0.2]", r"data.crop_scale must be .*; got \[0.5, 0.2\]"),
    "precision": (
        "precision=int8",
        r"precision must be one of auto, float32, tf32, bf16, fp16.*; got 'int8'",
    ),
    "engine": ("engine.name=dense", r"engine.name must be one of packed, masked.*; got 'dense'"),
    "warm-up": (
        "schedule.warmup_epochs=900",
        r"warmup_epochs must be from 0 to schedule.epochs \(800\); got 900",
    ),
    "seed": ("seed=-1", r"seed must be .*; got -1"),
    "betas": ("optim.betas=[0.9]", r"optim.betas must be two numbers in \[0, 1\); got \[0.9\]"),
    "syntax": ("optim blr", r"optim blr"),
    "quotes": ("name=a(b", r"^name=a\(b: not an override \(.*\); values with spaces or brackets are quoted: 'KEY="),
    "group of no name": ("data=null", r"a group such as data, optim or trainer must be set to a name"),
    "many workers": ("loader.workers=10000", r"loader.workers must be from 0 to 512, or null.*; got 10000"),
    "empty path": ("data.path=", r"data.path must be a path, or a list of paths.*; got ''"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_with_the_full_key(case):
    override, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        compose("pretrain", [override])
    assert "\n" not in str(caught.value)


def test_a_typed_config_survives_a_checkpoint():
    cfg = compose("pretrain", ["model=demo", "data=fashion_mnist", "data.image_size=[32,64]"])
    assert cfg.data.image_size == (32, 64)
    assert from_dict(PretrainConfig, to_dict(cfg)) == cfg


def test_from_dict_names_the_full_key():
    with pytest.raises(ConfigError, match=r"data.pth: unknown key|data.data.pth"):
        from_dict(PretrainConfig, {"data": {"pth": "x"}})


def test_data_of_a_checkpoint_is_overridden_by_what_is_given():
    own = compose("pretrain", ["model=demo", "data=fashion_mnist"]).data
    cfg = compose("knn", ["checkpoint=x", "data.path=/y"])
    assert isinstance(cfg, KnnConfig)
    merged = cfg.merge_data(own)
    assert (merged.path, merged.in_chans, merged.mean) == ("/y", 1, [0.25])
    with pytest.raises(ConfigError, match=r"data.in_chans must be an integer; got 'many'"):
        compose("knn", ["checkpoint=x", "data.in_chans=many"]).merge_data(own)


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("pretrain", "monitor.knn_k=[]", r"monitor.knn_k must be a positive integer, or a list of them.*; got \[\]"),
        ("pretrain", "monitor.knn_every_epochs=0", "monitor.knn_every_epochs must be a positive number.*; got 0.0"),
        ("knn", "k=[10,0]", r"k must be a positive integer, or a list of them.*; got \[10, 0\]"),
        ("knn", "layer=max", "layer must be one of pooled, mean, stages, stages_std.*; got 'max'"),
        ("knn", "layer=stages stages=[0,1]", r"stages must be a list of different stages, from 1.*; got \[0, 1\]"),
        ("probe", "stages=[3]", r"stages must be unset unless layer=stages or stages_std.*; got \[3\]"),
        ("probe", "pooling=norm", r"pooling is now layer; pooled stands for norm"),
        ("probe", "blr=[]", r"blr must be a positive number, or a list of them.*; got \[\]"),
        ("probe", "optimizer=lamb", "optimizer must be one of lars, sgd, adamw.*; got 'lamb'"),
        ("probe", "warmup_epochs=91", "warmup_epochs must be from 0 to epochs.*; got 91"),
        ("probe", "blr=-0.1", r"blr must be a positive number, or a list of them.*; got -0.1"),
        ("probe", "train_batch_size=1", "train_batch_size must be 2 or more.*; got 1"),
    ],
)
def test_ranges_of_evaluation(command, override, message):
    with pytest.raises(ConfigError, match=message):
        compose(command, [*override.split(), *(["checkpoint=x"] if command != "pretrain" else [])])


@pytest.mark.parametrize("command", ["evaluate", "knn", "probe"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loader.on_error=ignore", "loader.on_error must be one of raise, skip.*; got 'ignore'"),
        ("loader.workers=-1", "loader.workers must be from 0 to 512.*; got -1"),
        ("data.image_size=many", r"data.image_size must be .*; got 'many'"),
        ("data.source={count: 5}", "data.source must be null, or _target_.*; got {'count': 5}"),
    ],
)
def test_data_that_is_given_is_checked_before_the_checkpoint_is_read(command, override, message):
    with pytest.raises(ConfigError, match=message):
        compose(command, ["checkpoint=x", override])


def test_one_k_is_a_list_of_one():
    assert compose("knn", ["checkpoint=x", "k=5"]).k == [5]
    assert compose("knn", ["checkpoint=x"]).k == [10, 20]


@pytest.mark.parametrize("command", ["evaluate", "knn", "probe"])
def test_a_checkpoint_is_required(command):
    with pytest.raises(ConfigError, match="checkpoint must be a run's directory.*; got ''"):
        compose(command)


def test_every_key_of_every_group_file_is_in_the_schema():
    """A group option nobody composes must not rot."""
    for group in ("model", "data", "optim", "schedule", "engine", "trainer", "monitor", "logger", "augment"):
        schema = OmegaConf.structured(COMMANDS["finetune" if group == "augment" else "pretrain"])
        for file in (conf_dir() / group).glob("*.yaml"):
            assert OmegaConf.merge(schema, {group: yaml.safe_load(file.read_text())}) is not None


@pytest.mark.parametrize(
    "path",
    ["my photos (2024)", "a=b", "naïve", "train-{0000..0146}.tar", "it's", "a\\b", "x[1]", "a b\\'c", "photos", "a:b"],
)
def test_a_path_is_taken_as_the_shell_hands_it_on(path):
    assert compose("pretrain", [f"data.path={path}"]).data.path == path


def test_lists_sweeps_and_quoted_paths_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    same = ["data.path=[a,b]", "init_from=a,b", "data.path='a b'", "optim.lr=a(", "data.path=null", "-m", "+seed=1"]
    assert quoted(same) == same
    assert quoted(["data.path=[a b,'c d',\"e f\",~/g(h)]"]) == ["data.path=['a b','c d',\"e f\",'/home/me/g(h)']"]
    assert quoted(["data.path=~/x"]) == ["data.path='/home/me/x'"]
    (tmp_path / "a,b").mkdir()
    assert quoted(["data.path=a,b"]) == ["data.path='a,b'"]


@pytest.mark.parametrize("experiment", ["in1k/pretrain_1600ep", "budget/atto_pretrain", "fashion_mnist/pretrain"])
def test_fine_tuning_refuses_a_recipe_of_pretraining(experiment):
    with pytest.raises(ConfigError, match="this command has no key model.mask_ratio"):
        compose("finetune", [f"experiment={experiment}"])
