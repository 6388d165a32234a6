"""The command line. ``pretrain finetune study evaluate knn probe prepare`` are Hydra commands, others take plain flags.

Exit codes: 0 done, 2 the user's mistake, 75 stopped early and resumable, 1 anything else.
"""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fcmae import interrupt, ranks
from fcmae.errors import EXIT_ERROR, EXIT_USAGE, ConfigError, FCMAEError, LostRankError, PeerError, UsageError, counted
from fcmae.files import check_checkpoint, check_output, json_text, output, write_output
from fcmae.imports import load
from fcmae.messages import ends_with_its_reader, print_rank0

COMMANDS = {
    "init": "a folder to start from, with a config for your images: FOLDER data.path=FOLDER [overrides]",
    "pretrain": "pretrain a ConvNeXt on unlabelled images [overrides]",
    "finetune": "train a classifier, segmenter or detector on labelled images: init_from=RUN [overrides]",
    "evaluate": "metrics of a fine-tuned network: checkpoint=RUN [overrides]",
    "knn": "k-NN accuracy of frozen features: checkpoint=RUN [overrides]",
    "probe": "accuracy of linear classifiers on frozen features: checkpoint=RUN [overrides]",
    "study": "what pretraining brings, by number of labels: init_from=RUN data.path=FOLDER [overrides]",
    "prepare": "images as shuffled tar files, or their mean and deviation: data.path=FOLDER out=FOLDER [overrides]",
    "reconstruct": "a picture of reconstructions: CHECKPOINT IMAGES... --out FILE.png",
    "embed": "features of images: CHECKPOINT IMAGES... --out FILE.npz|parquet",
    "predict": "predictions of a fine-tuned network: CHECKPOINT IMAGES... --out FILE.csv|npz|parquet|json|FOLDER",
    "export": "a checkpoint for another library: CHECKPOINT --to timm|transformers|official|viscy|onnx --out DIR",
    "import": "another library's weights as a checkpoint: PATH --from official|timm|transformers|viscy --out FILE",
    "status": "what runs and studies do: step, loss, speed, time left, last evaluation: RUN...",
    "ls": "a table of the runs and studies in a folder: FOLDER (default: runs)",
    "report": "a page that shows runs, side by side: RUN... --out FILE.html",
    "doctor": "check the installation and the engines; with data.path=FOLDER look at a data set",
    "bench": "measure speed: step | evaluate | start | scaling | kernels | data [overrides] [--json FILE]",
    "demo": "pretrain, evaluate and fine-tune on Fashion-MNIST in a few minutes",
}


FIRST = {
    "pretrain": "\n".join((
        "  fcmae doctor data.path=FOLDER                                    looks at your images",
        "  fcmae init my_project data.path=FOLDER                           writes a config and the next commands",
        "  fcmae pretrain experiment=own/small data.path=FOLDER             pretrains on them",
        "  fcmae pretrain data=synthetic data.length=64 debug=default       tries it without images",
    )),
    "finetune": "  fcmae finetune init_from=RUN data.path=LABELLED/train data.val_path=LABELLED/val",
}  # fmt: skip
"""What to type where a command was given nothing, on a terminal."""
ALLOW = "a class that may be called although only the checkpoint names it; may be given several times"


@ends_with_its_reader
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Without ``argv``, this is the program, and ends with it."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else EXIT_USAGE
    if args[0] == "--version":
        from fcmae import __version__

        print(f"fcmae {__version__}")
        return 0
    command, *rest = args
    if command in _TRAINING:
        interrupt.install(functools.partial(_tell, command))
    elif argv is None:
        interrupt.watch(functools.partial(_tell, command))
        interrupt.take_for_ctrl_c()
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {near[0]}? The" if near else "the"
            raise ConfigError(f"unknown command {command!r}; {hint} commands are {', '.join(COMMANDS)}")
        if command in _TOOLS:
            return _TOOLS[command](rest)
        if any(rest == [flag] for flag in ("-h", "--help")):
            print(load("fcmae.config:help_text")(command, COMMANDS[command]))
            return 0
        from fcmae.hydra_run import run  # after signals are handled

        return run(command, rest, _HYDRA[command], argv is None)
    except FCMAEError as error:
        if argv is None:
            interrupt.ignore()  # it takes up to two seconds to find out who says why
            if interrupt.received():
                interrupt.end_soon(error.exit_code)
        if not isinstance(error, PeerError) and _tells(error):
            for line in error.mistakes if isinstance(error, ConfigError) else [error]:
                print(f"fcmae {command}: {line}", file=sys.stderr)
            if not rest and command in FIRST and sys.stderr.isatty():
                print(FIRST[command], file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _tell(command, "interrupted")
        if argv is None:
            interrupt.end_soon(EXIT_ERROR)
        return EXIT_ERROR
    finally:
        if argv is None:
            interrupt.ignore()  # torchrun, for one, sends each signal twice; and one may come while Python ends
        elif command in _TRAINING:
            interrupt.uninstall()


def _tells(error: FCMAEError) -> bool:
    """Whether this rank prints an error that other ranks may have, too."""
    here = ranks.detect()
    if error.raised_by == "rank":
        distributed = sys.modules.get("fcmae.distributed")  # before it is imported the ranks have not met
        return distributed is None or distributed.is_first_to_say(str(error), isinstance(error, LostRankError))
    return (here.local_rank if error.raised_by == "machine" else here.rank) == 0


def _tell(command: str, line: str) -> None:
    print_rank0(f"fcmae {command}: {line}")


class _Parser(argparse.ArgumentParser):
    """Of a command with plain flags. A mistake is one line, without the usage."""

    def __init__(self, command: str) -> None:
        super().__init__(f"fcmae {command}", description=COMMANDS[command])

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help shows all flags)")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: fcmae COMMAND ...\n\n{lines}\n\n"
        f"Hydra commands ({', '.join(_HYDRA)}): KEY=VALUE overrides; `--cfg job` prints the config."
    )


def _call(target: str, cfg: Any, *args: Path) -> dict[str, Any] | None:
    """Runs a command's function and prints its result on rank 0. Returns the result if it is metrics."""
    result = _explained(target)(cfg, *args)
    if isinstance(result, dict):
        return _report(result, cfg.out)
    if result is not None and ranks.detect().rank == 0:
        print(result)
    return None


def _explained(target: str) -> Callable[..., Any]:
    """A command's function, in which the end of another rank or of a data worker is an error of one line."""
    return load("fcmae.distributed:lost_ranks_explained")()(load("fcmae.data.loading:explained")()(load(target)))


def _without_folder(target: str) -> Callable[[Any, Path], dict[str, Any] | None]:
    return lambda cfg, _: _call(target, cfg)


def _report(result: dict[str, Any], out: str | None) -> dict[str, Any]:
    """Prints metrics, and writes them to ``out`` if given."""
    line = json_text(result)
    print(line)
    if out is not None:
        write_output("out", out, line + "\n")
    return result


def _reconstruct(args: list[str]) -> int:
    parser = _Parser("reconstruct")
    parser.add_argument("checkpoint", help="a checkpoint of pretraining, RUN or RUN@STEP")
    what = "image files, folders, and data.KEY=VALUE and loader.KEY=VALUE for the images of a data config"
    parser.add_argument("images", nargs="+", help=what)
    parser.add_argument("--out", default="reconstruction.png", help="the picture to write (default: %(default)s)")
    rows = "rows at most, of images evenly spread over the list (default: %(default)s)"
    parser.add_argument("--max-images", type=int, default=16, help=rows)
    parser.add_argument("--mask-ratio", type=float, help="instead of the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    which = "one channel to show as grey, or three as red, green and blue, such as 0,2,4"
    parser.add_argument("--channels", type=_integers, metavar="N[,N,N]", help=which)
    parser.add_argument("--allow", action="append", default=[], metavar="CLASS", help=ALLOW)
    given = parser.parse_intermixed_args(args)
    kind = load("fcmae.evaluation.reconstruct:picture_format")("--out", given.out)
    among = [image for image in given.images if Path(given.out).resolve().is_relative_to(Path(image).resolve())]
    check_output("--out", given.out, [given.checkpoint, *([given.out] if among and Path(given.out).exists() else [])])
    options = {name: getattr(given, name) for name in ("max_images", "mask_ratio", "seed", "channels", "allow")}
    picture = load("fcmae.evaluation.run:reconstruct")(given.checkpoint, given.images, **options)
    with output("--out", given.out) as file:
        picture.image.save(file, kind)
    print(picture.display, file=sys.stderr)
    print(given.out)
    return 0


def _rows(command: str, args: list[str]) -> int:
    """``embed`` and ``predict``, whose flags are the same but for one."""
    parser = _Parser(command)
    parser.add_argument("checkpoint", help="a checkpoint, RUN or RUN@best|last|STEP; embed: encoder.safetensors too")
    what = "image files, folders, tar files, and data.KEY=VALUE and loader.KEY=VALUE for the checkpoint's config"
    parser.add_argument("images", nargs="+", help=what)
    parser.add_argument("--out", required=True, help="the file to write; for predicted maps a folder")
    if command == "embed":
        which = "mean over the image and norm; without the norm; of stages; with deviation; the last map (%(default)s)"
        layers = ["pooled", "mean", "stages", "stages_std", "patches"]
        parser.add_argument("--layer", choices=layers, default="pooled", help=which)
        parser.add_argument("--stages", type=_integers, metavar="N[,N]", help="stages of --layer stages (default: all)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per rank at once (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="float32, tf32, bf16, fp16 or auto (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the weights themselves, not their average")
    parser.add_argument("--allow", action="append", default=[], metavar="CLASS", help=ALLOW)
    given = vars(parser.parse_intermixed_args(args))
    check_checkpoint(given["checkpoint"])
    rows = _explained(f"fcmae.evaluation.embed:{command}")(given.pop("checkpoint"), given.pop("images"), **given)
    if hasattr(rows, "scores"):
        objects = counted(sum(map(len, rows.scores)), "object")
        print(f"{given['out']}: {counted(len(rows.paths), 'image')}, {objects}")
    elif hasattr(rows, "maps"):
        print(f"{given['out']}: {counted(len(rows.paths), 'image')}, a map each")
    elif rows is not None:
        shape = " x ".join(map(str, rows.values.shape[1:]))
        print(f"{given['out']}: {counted(len(rows.paths), 'image')}, {shape} values each")
    return 0


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 0,2,4; got {text!r}") from None


def _export(args: list[str]) -> int:
    parser = _Parser("export")
    parser.add_argument("checkpoint", help="a checkpoint, RUN or RUN@best|last|STEP; of pretraining the backbone")
    parser.add_argument("--to", required=True, choices=["timm", "transformers", "official", "viscy", "onnx"])
    parser.add_argument("--out", required=True, help="the directory to make")
    parser.add_argument("--no-check", action="store_true", help="do not load it with the other library and compare")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--license", metavar="TEXT", help="for the model card")
    parser.add_argument("--half", action="store_true", help="onnx: float16")
    parser.add_argument("--dynamic-size", action="store_true", help="onnx: any height and width")
    parser.add_argument("--planes", type=int, default=1, help="viscy: planes per channel, for its 3D stem")
    given = parser.parse_args(args)
    onnx_options = {name: True for name in ("half", "dynamic_size") if getattr(given, name)}
    if onnx_options and given.to != "onnx":
        raise UsageError("--half and --dynamic-size go with --to onnx only")
    if given.planes != 1 and given.to != "viscy":
        raise UsageError("--planes goes with --to viscy only")
    check_checkpoint(given.checkpoint)
    result = load("fcmae.interchange.convert:export")(
        given.checkpoint,
        given.to,
        given.out,
        check=not given.no_check,
        ema=not given.no_ema,
        license_name=given.license,
        onnx_options=onnx_options,
        planes=given.planes,
    )
    print(f"{given.out}: {result}")
    return 0


def _import(args: list[str]) -> int:
    parser = _Parser("import")
    parser.add_argument(
        "path", help="a file of the official code, a directory or file of timm or VisCy, or a directory of Transformers"
    )
    parser.add_argument("--from", dest="library", required=True, choices=["official", "timm", "transformers", "viscy"])
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, if the files do not hold them")
    parser.add_argument("--mean", type=float, nargs="+", help="of pixel values in 0..1, a number per channel")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--image-size", type=int, help="pixels per side")
    given = parser.parse_args(args)
    classes = None if given.classes is None else _lines(Path(given.classes))
    known = load("fcmae.interchange.network:Given")(classes, given.mean, given.std, given.image_size)
    for note in load("fcmae.interchange.convert:import_weights")(given.path, given.library, given.out, known):
        print(note, file=sys.stderr)
    print(given.out)
    return 0


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"--classes {file} cannot be read: {error}") from error


def _init(args: list[str]) -> int:
    parser = _Parser("init")
    parser.add_argument("folder", help="the folder to make")
    parser.add_argument("overrides", nargs="*", metavar="data.path=FOLDER", help="and other keys of the data config")
    given = parser.parse_args(args)
    print("\n".join(load("fcmae.project:create")(given.folder, given.overrides)))
    return 0


def _status(args: list[str]) -> int:
    from fcmae.status import describe, read_any

    parser = _Parser("status")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs and studies")
    print("\n".join([describe(read_any(run)) for run in parser.parse_args(args).runs]))
    return 0


def _ls(args: list[str]) -> int:
    from fcmae.status import find_runs, read_any, table

    parser = _Parser("ls")
    parser.add_argument("folder", nargs="?", default="runs", help="searched four levels deep (default: %(default)s)")
    folder = parser.parse_args(args).folder
    print(table([read_any(run) for run in find_runs(folder)], folder))
    return 0


def _report_page(args: list[str]) -> int:
    parser = _Parser("report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, finished or not, and studies")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")
    given = parser.parse_args(args)
    if Path(given.out).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out must be a file that ends in .html; got {given.out}")
    check_output("--out", given.out)
    load("fcmae.report.page:write")(given.runs, given.out)
    print(given.out)
    return 0


def _doctor(args: list[str]) -> int:
    parser = _Parser("doctor")
    parser.add_argument("--golden", nargs="+", default=[], metavar="FILE", help="golden safetensors files")
    what = "data.KEY=VALUE and loader.KEY=VALUE: look at these images instead"
    parser.add_argument("overrides", nargs="*", metavar="data.path=PATH", help=what)
    parser.add_argument("--images", type=int, default=2000, help="images to look at (default: %(default)s)")
    where = "where to write it (default: ~/.cache/fcmae/doctor/contact_sheet.png)"
    parser.add_argument("--contact-sheet", metavar="FILE.png", help=where)
    given = parser.parse_intermixed_args(args)
    if not given.overrides:
        return load("fcmae.doctor:run")([Path(file) for file in given.golden])
    if given.contact_sheet is not None:
        check_output("--contact-sheet", given.contact_sheet)
    return load("fcmae.doctor.dataset:run")(given.overrides, max(1, given.images), given.contact_sheet)


def _bench(args: list[str]) -> int:
    parser = _Parser("bench")
    what = "training steps, evaluation, how soon training starts, steps on several GPUs, kernels, or reading data"
    parser.add_argument("what", choices=["step", "evaluate", "start", "scaling", "kernels", "data"], help=what)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. models=[convnextv2_tiny] batch_size=64")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    given = parser.parse_intermixed_args(args)
    if given.json is not None:
        check_output("--json", given.json, json=True)
    load(f"fcmae.bench.{given.what}:run")(given.overrides, given.json)
    return 0


def _demo(args: list[str]) -> int:
    parser = _Parser("demo")
    parser.add_argument("--out", default="demo", help="the folder to write to (default: %(default)s)")
    parser.add_argument("--data", help="a folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take on two CPU cores (default: 8)")
    given = parser.parse_args(args)
    load("fcmae.demo:run")(Path(given.out), given.data, given.minutes)
    return 0


_HYDRA: dict[str, Callable[[Any, Path], dict[str, Any] | None]] = {
    "pretrain": functools.partial(_call, "fcmae.training.run:pretrain"),
    "finetune": functools.partial(_call, "fcmae.training.run:finetune"),
    "study": functools.partial(_call, "fcmae.studies.run:study"),
    **{name: _without_folder(f"fcmae.evaluation.run:{name}") for name in ("evaluate", "knn", "probe")},
    "prepare": _without_folder("fcmae.data.prepare.command:prepare"),
}
_TRAINING = ("pretrain", "finetune", "study")
_TOOLS: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "reconstruct": _reconstruct,
    "embed": functools.partial(_rows, "embed"),
    "predict": functools.partial(_rows, "predict"),
    "export": _export,
    "import": _import,
    "status": _status,
    "ls": _ls,
    "report": _report_page,
    "doctor": _doctor,
    "bench": _bench,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
