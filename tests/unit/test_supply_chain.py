"""What may run code or reach outside: rules for the source, classes that files name, markup, names in archives."""

import ast
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from fcmae import opening
from fcmae.config import EvaluateConfig, FinetuneConfig, PrepareConfig
from fcmae.config.loader import LoaderConfig
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.prepare.command import prepare
from fcmae.errors import UsageError
from fcmae.evaluation.run import evaluate, reconstruct
from fcmae.files import replacing
from fcmae.interchange.convert import export
from fcmae.models.build import load
from fcmae.project import create
from fcmae.report.page import write as write_page
from fcmae.tasks.initial import find_start
from tests import interchange
from tests.bad_files import add_file, encoded, picture
from tests.interchange import classifier

ROOT = Path(__file__).parents[2]
SOURCES = [file for folder in ("fcmae", "benchmarks", "launch") for file in (ROOT / folder).rglob("*.py")]
LOADERS = {"fcmae/__init__.py", "fcmae/imports.py", "fcmae/plugins.py"}
"""Files that import by a name that is not written in them; fcmae/plugins.py by names from configs."""
IMPORTS = ("import_module", "resolve_name", "exec_module", "__import__", "run_path", "run_module")


def broken(source, file="a.py"):
    """The rules that a file breaks, which ruff has no rules for."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("allow_pickle", "False") != "False":
            found.append("allow_pickle")
        if name.split(".")[-1] in IMPORTS and file not in LOADERS:
            found.append("import by name")
        if name.startswith("subprocess.") and node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant):
            found.append("a command that is not a list")
    return found


def test_the_source_obeys_the_rules():
    assert len(SOURCES) > 200
    names = {file: str(file.relative_to(ROOT)) for file in SOURCES}
    assert {names[file]: rules for file in SOURCES if (rules := broken(file.read_text(), names[file]))} == {}


FORBIDDEN = {
    "S102": "exec(x)",
    "S301": "import pickle\npickle.loads(x)",
    "S302": "import marshal\nmarshal.loads(x)",
    "S306": "import tempfile\ntempfile.mktemp()",
    "S307": "eval(x)",
    "S506": "import yaml\nyaml.load(x)",
    "S602": "import subprocess\nsubprocess.run(x, shell=True)",
    "S604": "run(x, shell=True)",
    "S605": "import os\nos.system(x)",
}


def test_the_rules_are_there():
    """Ours, and those of ruff in pyproject.toml, for what is forbidden."""
    bad = "torch.load(x)\ntorch.load(x, weights_only=False)\nnp.load(x, allow_pickle=True)\nsubprocess.run(f'a {b}')"
    assert sorted(set(broken(bad + "\nimportlib.import_module(x)"))) == [
        "a command that is not a list",
        "allow_pickle",
        "import by name",
        "torch.load without weights_only=True",
    ]
    code = "\n".join(FORBIDDEN.values())
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", "fcmae/a.py", "-"]
    told = subprocess.run(ruff, input=code, capture_output=True, text=True, cwd=ROOT)
    assert FORBIDDEN.keys() <= {entry["code"] for entry in json.loads(told.stdout)}


@pytest.fixture
def evil(tmp_path):
    """A class whose import leaves a file."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Evil:\n    pass\n")
    yield f"{tmp_path}/evil.py:Evil"
    assert not (tmp_path / "touched").exists()
    assert not [name for name in sys.modules if "evil" in name]


def refusals(path, folder):
    """What commands that read a checkpoint say, where they refuse it."""
    calls = {
        "load": lambda: load(path),
        "start": lambda: find_start(FinetuneConfig(init_from=str(path))),
        "export": lambda: export(path, "timm", folder / "out", check=False),
        "evaluate": lambda: evaluate(EvaluateConfig(checkpoint=str(path), device="cpu")),
        "reconstruct": lambda: reconstruct(str(path), ["data.name=synthetic", "data.length=1"]),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except UsageError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("key", ["objective", "everything else"])
def test_a_class_that_a_checkpoint_of_fine_tuning_names_is_not_imported(key, evil, tmp_path):
    def change(state):
        config, given = state["config"], {"_target_": evil}
        if key == "objective":
            config["objective"] = given
        else:
            config["logger"]["sinks"] = {"evil": given}
            config["data"].update(source=given, val_source=given, transforms=[given])

    said = refusals(classifier(tmp_path, change), tmp_path)
    blamed = {name for name, line in said.items() if f"names the class {evil}" in line}
    assert blamed == ({"load", "evaluate", "reconstruct"} if key == "objective" else {"evaluate"})
    for name in blamed:
        assert f"allow=[{evil}]" in said[name]


def test_a_class_that_a_checkpoint_of_pretraining_names_is_not_imported(evil, tmp_path, monkeypatch):
    to_dict = interchange.to_dict

    def config(cfg):
        return {**to_dict(cfg), "mask": {"_target_": evil}, "target": {"evil": {"_target_": evil, "weight": 1.0}}}

    monkeypatch.setattr(interchange, "to_dict", config)
    interchange.pretrained(tmp_path / "step_00000007.pt")
    said = refusals(tmp_path / "step_00000007.pt", tmp_path)
    assert f"names the class {evil} as its " in said["reconstruct"]
    assert f"--allow {evil} or allow=[{evil}]" in said["reconstruct"]


SCRIPT = "<script>alert(1)"


def test_markup_in_the_name_of_a_folder_is_text(tmp_path):
    run = tmp_path / SCRIPT
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, SCRIPT: 1.0}) + "\n")
    (run / f"{SCRIPT}.json").write_text(json.dumps({SCRIPT: 50.0}))
    write_page([str(run)], str(tmp_path / "page.html"))
    assert SCRIPT not in (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in (tmp_path / "page.html").read_text()
    path = classifier(tmp_path / f"{SCRIPT}2", lambda state: state["config"].update(init_from=f"a/{SCRIPT}"))
    export(path, "timm", tmp_path / "out", check=False)
    assert "<script" not in (tmp_path / "out" / "README.md").read_text()


def test_a_project_in_a_folder_of_any_name_is_text_and_yaml(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(picture(64, 64), "PNG"))
    for name in (SCRIPT, "a: [b", "${oc.env:HOME}", "x\ny: 1", "`id`"):
        create(str(tmp_path / name), [f"data.path={tmp_path / 'images'}"])
        assert not set("<`$") & set((tmp_path / name / "README.md").read_text().split("\n")[0])
        config = (tmp_path / name / "conf" / "experiment" / "project.yaml").read_text()
        assert set("<$`:[") & set(yaml.safe_load(config)["name"]) == set()


OUTSIDE = ("../../evil.png", "/evil.png", "a/../../../evil.png", "c:\\evil.png")


def test_names_in_archives_and_tables_stay_inside_on_prepare(tmp_path, capsys):
    """Names of an archive's files name nothing outside, whatever they are; those of a table are refused."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(OUTSIDE):
            add_file(tar, name.replace("evil", f"evil{number}"), encoded(picture(8, 8), "PNG"))
    (tmp_path / "secret.png").write_bytes(encoded(picture(8, 8), "PNG"))
    before = {file for file in tmp_path.rglob("*") if not file.name.startswith(".")}
    out = tmp_path / "below" / "out"
    how = {"out": str(out), "loader": LoaderConfig(workers=1)}
    prepare(PrepareConfig(data=PreparedDataConfig(name="webdataset", path=str(tmp_path / "a.tar")), **how))
    made = {file for file in tmp_path.rglob("*") if not file.name.startswith(".")} - before - {out.parent}
    assert all(file.is_relative_to(out) for file in made)
    with tarfile.open(out / "train-000000.tar") as tar:
        names = tar.getnames()
    assert len(names) == len(OUTSIDE)
    assert all(not name.startswith("/") and ".." not in name for name in names)
    (tmp_path / "table").mkdir()
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "table" / "a.csv").write_text(f"image\n{name}\n")
        with pytest.raises(UsageError, match="names files outside of"):
            prepare(PrepareConfig(data=PreparedDataConfig(name="table", path=str(tmp_path / "table/a.csv")), **how))
    (tmp_path / "table" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "table" / "a.csv").write_text("image\nlink.png\n")
    with pytest.raises(UsageError, match="names files outside of"):
        prepare(PrepareConfig(data=PreparedDataConfig(name="table", path=str(tmp_path / "table/a.csv")), **how))


def test_temporary_files_are_private(tmp_path, monkeypatch):
    """Random names that nobody can prepare, not more readable than what they become, in folders of this user alone."""
    names = []
    for permissions in (0o600, 0o644):
        with replacing(tmp_path / "file", permissions) as file:
            (name,) = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
            names.append(name)
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~permissions == 0
    assert names[0] != names[1]
    monkeypatch.setattr("fcmae.files.random_token", lambda: "known")
    (tmp_path / "precious").write_text("precious")
    with replacing(tmp_path / "file") as file:
        (name,) = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError), replacing(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "precious").read_text() == "precious"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opening.cache_folder.cache_clear()
    assert stat.S_IMODE(opening.cache_folder("locks").stat().st_mode) == 0o700
    opening.cache_folder.cache_clear()
    made = opening.private_folder(tmp_path / "file" / "not a folder")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.rmdir()
