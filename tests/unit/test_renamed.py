"""Keys with a new name: old names are answered with the new ones, and old configs are read."""

import pytest

from fcmae.config import FinetuneConfig, PrepareConfig, PretrainConfig, compose, from_dict, to_dict, upgraded
from fcmae.config.recipe import check_recipe
from fcmae.config.renamed import RENAMED
from fcmae.errors import ConfigError, UsageError


def keys(schema) -> set[str]:
    config = to_dict(schema)
    return {f"{group}.{key}" for group, value in config.items() if isinstance(value, dict) for key in value} | {*config}


KNOWN = keys(PretrainConfig()) | keys(FinetuneConfig())


@pytest.mark.parametrize("old", RENAMED)
def test_the_command_line_answers_with_the_new_name(old):
    new = RENAMED[old]
    assert new in KNOWN
    assert old not in KNOWN
    for given in (f"{old}=1", f"+{old}=1"):
        with pytest.raises(ConfigError) as caught:
            compose("pretrain", ["data=synthetic", given])
        assert caught.value.mistakes == [f"{old} is now {new}"]


def test_a_file_of_the_user_is_answered_likewise(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrainer:\n  precision: bf16\n")
    with pytest.raises(ConfigError, match=r"^experiment/mine: trainer.precision is now precision$"):
        compose("pretrain", [f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])


def test_commands_with_a_checkpoint_answer_likewise():
    for command in ("evaluate", "knn", "probe"):
        with pytest.raises(ConfigError, match=r"^data.workers is now loader.workers$"):
            compose(command, ["checkpoint=RUN", "data.workers=2"])
    with pytest.raises(ConfigError, match=r"^workers is now loader.workers$"):
        compose("prepare", ["data.path=A", "out=B", "workers=2"])
    assert PrepareConfig(out="B").loader.workers is None


def old_config(**changed):
    """As version 0.1.0 wrote it: every renamed key has its old name."""
    config = to_dict(PretrainConfig())
    config |= {group: {**config[group], **values} for group, values in changed.items()}
    for old, new in RENAMED.items():
        group, _, name = new.rpartition(".")
        owner = config[group] if group else config
        if name in owner and old != "workers":
            before, _, key = old.rpartition(".")
            config[before][key] = owner.pop(name)
    del config["loader"]
    return config


def test_a_config_with_the_old_names_is_read():
    old = old_config(model={"grn_scope": "batch"}, loader={"workers": 3, "on_error": "skip"}, optim={"ema_decay": 0.5})
    assert old["trainer"]["global_batch_size"] == 4096
    assert old["data"]["workers"] == 3
    cfg = from_dict(PretrainConfig, upgraded(old))
    assert (cfg.model.grn_scope, cfg.loader.workers, cfg.loader.on_error) == ("batch", 3, "skip")
    assert (cfg.optim.ema_decay, cfg.optim.global_batch_size, cfg.precision) == (0.5, 4096, "auto")
    assert upgraded(to_dict(cfg)) == to_dict(cfg)
    assert old["data"]["workers"] == 3, "it is a copy"


def test_a_recipe_is_compared_across_the_names():
    old = upgraded(old_config(optim={"global_batch_size": 8}, loader={"workers": 3}))
    check_recipe(old, upgraded(old_config(optim={"global_batch_size": 8}, loader={"workers": 0})))
    with pytest.raises(UsageError, match=r"  optim.global_batch_size: 8 -> 4096"):
        check_recipe(old, to_dict(PretrainConfig()))


def test_parts_of_a_config_are_upgraded():
    """Exports and hand-written files hold some groups only."""
    assert upgraded({"data": {"workers": 1, "pad": 2}}) == {"data": {"pad": 2}, "loader": {"workers": 1}}
    assert upgraded({"trainer": None, "data": [1]}) == {"trainer": None, "data": [1]}
