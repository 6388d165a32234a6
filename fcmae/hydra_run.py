"""Runs a command under Hydra, here or in a sweep: composes its config and reports the mistakes in it."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcmae import config, interrupt, sweep
from fcmae import ranks as launch
from fcmae.errors import ConfigError, FCMAEError, Interrupted, UsageError
from fcmae.imports import load
from fcmae.messages import print_rank0

Action = Callable[[Any, Path], dict[str, Any] | None]
"""A command: takes its typed config and its run directory, and returns its metrics, if any."""


def run(command: str, overrides: list[str], action: Action, alone: bool = False) -> int:
    """Composes the command's config with Hydra, and calls ``action`` with the typed result and the run directory.

    Args:
        alone: this process does nothing else, so it may hide GPUs that the command does not use.
    """
    _check_overrides(command, overrides)
    # Otherwise Hydra prints errors itself, in several lines, and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    config.register_schema(command)
    OmegaConf.register_new_resolver("start_time", _start_time, replace=True)

    begun, started = False, time.time()
    failures: list[FCMAEError] = []

    @hydra.main(config_path=str(config.conf_dir()), config_name=command, version_base="1.3")
    def job(composed: DictConfig) -> float | None:
        nonlocal begun
        begun = True
        if HydraConfig.get().mode != RunMode.RUN:
            return _run_job_of_sweep(command, composed, overrides, action)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            typed: Any = config.to_typed(composed, config.COMMANDS[command], lambda cfg: check_places(cfg, run_dir))
            if alone and _device(typed) == "cpu":
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch's optimizers would open a GPU to look at its stream
            action(typed, run_dir)
        except FCMAEError as error:
            failures.append(error)  # raised here, Hydra would print a line of its own
            _remove_created(run_dir, started)
        return None

    vars(sys.modules["hydra.main"])["get_args_parser"] = options
    program = sys.argv
    first = ["--multirun"] * _is_sweep(overrides)  # Hydra takes no option between overrides
    rest = [override for override in overrides if override not in MULTIRUN]
    sys.argv = [f"fcmae {command}", *first, *config.quoted(rest)]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told) if _prints_package(overrides) else contextlib.nullcontext():
            job()
    except FCMAEError:
        raise
    except SystemExit as ended:
        if not ended.code or not told.getvalue():
            raise
        raise ConfigError(f"--package: {' '.join(told.getvalue().split())}") from ended
    except HydraException as error:
        raise ConfigError(_mistakes(command, overrides, error)) from error
    except OSError as error:
        if begun:
            raise
        what = "the sweep cannot be started" if _is_sweep(overrides) else "hydra.run.dir cannot be created"
        refused = UsageError(f"{what}: {error.filename}: {error.strerror}")
        refused.raised_by = "machine"
        raise refused from error
    except Exception as error:
        if begun or type(error).__name__ in JOB_ERRORS:
            raise
        # Hydra's, OmegaConf's, YAML's, or a launcher's
        raise ConfigError(_mistakes(command, overrides, error)) from error
    finally:
        sys.argv = program
        if Folders.sweep is not None:
            folder, Folders.sweep = Folders.sweep, None
            sweep.report(folder)
    if failures:
        raise failures.pop()  # a frame of its traceback may be frozen (see quick_imports) and would keep it
    return 0


def _remove_created(run_dir: Path, started: float) -> None:
    """Removes the run directory, and the folders above it, that Hydra has created for a command that is refused."""
    with contextlib.suppress(OSError):  # it is not empty, or another process has removed it
        os.chdir(HydraConfig.get().runtime.cwd)  # from where hydra.job.chdir went
        if run_dir.stat().st_mtime >= started and run_dir != Path.cwd():
            run_dir.rmdir()
            for above in run_dir.parents:
                if above in Folders.missing:
                    above.rmdir()


def _run_job_of_sweep(command: str, composed: DictConfig, overrides: list[str], action: Action) -> float | None:
    """May run in another process, on another machine. Raises what the job raises: the launcher collects it.

    Returns the job's score for sweepers that search, see :func:`fcmae.sweep.score`.
    """
    job = HydraConfig.get()
    run_dir, number = Path(job.runtime.output_dir), int(job.job.num)

    def also(cfg: Any) -> None:
        for named in sweep.number_outputs(cfg, number, overrides):
            print_rank0(f"job {number}: {named}")
        check_places(cfg, run_dir)

    def task() -> None:
        typed: Any = config.to_typed(composed, config.COMMANDS[command], also)
        metrics.update(action(typed, run_dir) or {})

    with sweep.recorded(run_dir, number, list(job.overrides.task)) as metrics:
        _submitted(task) if "SUBMITIT_EXECUTOR" in os.environ else task()
        result = dict(metrics)
    return sweep.score(run_dir, result)


class Folders(Callback):
    """Hydra calls it before it makes the folder of a run or, in the process that launches the jobs, of a sweep."""

    missing: Collection[Path] = ()
    """Missing folders above the run's folder."""
    sweep: Path | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        Folders.missing = ()
        with contextlib.suppress(OmegaConfBaseException):  # it cannot be resolved, which Hydra says better
            above = Path.cwd().joinpath(config.hydra.run.dir).parents
            Folders.missing = {folder for folder in above if not folder.exists()}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Folders.sweep = Path(config.hydra.sweep.dir)


def _device(cfg: Any) -> str | None:
    return getattr(getattr(cfg, "trainer", cfg), "device", None)


def _mistakes(command: str, overrides: list[str], error: Exception) -> str:
    """All mistakes in overrides that Hydra cannot compose, one per line; with options only the one that Hydra found."""
    if any(override.startswith("-") for override in overrides):
        return config.explain(error)
    return config.every_mistake(command, config.quoted(overrides), error, lambda cfg: check_places(cfg, Path()))


def check_places(cfg: Any, run_dir: Path) -> None:
    """With several ranks a folder may be missing on one machine only; that is reported after the ranks have met."""
    if launch.detect().size == 1 or config.mistaken():
        config.check_places(cfg, run_dir)


JOB_ERRORS = ("FailedJobError", "UncompletedJobError")
"""submitit's, with the traceback of a job."""


def _check_overrides(command: str, overrides: list[str]) -> None:
    """Raises ConfigError for overrides that Hydra would misread, or would refuse without a clear message."""
    sweep = _is_sweep(overrides)
    if sweep and {"-c", "--cfg"} & {override.partition("=")[0] for override in overrides}:
        raise ConfigError("--cfg prints the config of one run and cannot be used with -m")
    given = [override.partition("=")[2] for override in overrides if override.startswith("hydra.run.dir=")]
    if given and given[-1] in ("", "null", "''", '""'):
        raise ConfigError(f"hydra.run.dir must be a folder; got {given[-1]!r}")
    if any(override.startswith("hydra.mode=") for override in overrides):
        raise ConfigError("hydra.mode cannot be set; -m starts a sweep")
    if given and sweep:
        raise ConfigError("hydra.run.dir cannot be used with -m; set hydra.sweep.dir, the folder of all its runs")
    if mistakes := [*_unknown_options(overrides), *config.misread(command, overrides)]:
        raise ConfigError("\n".join(mistakes))


def options() -> argparse.ArgumentParser:
    """Hydra's parser of options. From Python 3.14 on argparse expands a help text where it is added, and refuses one
    of Hydra 1.3 that is an object, made into text when it is shown."""
    container: Any = argparse._ActionsContainer
    check = getattr(container, "_check_help", None)
    if check is None:
        return _refusing(hydra_utils.get_args_parser())
    container._check_help = lambda *_: None
    try:
        return _refusing(hydra_utils.get_args_parser())
    finally:
        container._check_help = check


def _refusing(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose errors are ours: they are shown with escapes for what a terminal would act on."""

    def error(message: str) -> NoReturn:
        raise ConfigError(message)

    parser.error = error  # type: ignore[method-assign]
    return parser


def _unknown_options(overrides: list[str]) -> list[str]:
    """Options that Hydra does not have, for which it would print its usage, and ``KEY = VALUE``."""
    known = options()._option_string_actions
    lines = []
    for override in overrides:
        option = override.partition("=")[0]
        if option == "":
            lines.append(f"{override}: not an override; write KEY=VALUE without spaces around =")
        elif re.match(r"--?[a-zA-Z]", option) and not any(name.startswith(option) for name in known):
            lines.append(f"{option}: unknown option; settings are written KEY=VALUE, such as data.path=photos")
    return lines


def _prints_package(overrides: list[str]) -> bool:
    """Whether Hydra prints a part of the config, or in a line of its own that there is no such part."""
    options = {override.partition("=")[0] for override in overrides}
    return bool(options & {"-p", "--package"}) and bool(options & {"-c", "--cfg"})


MULTIRUN = ("-m", "--multirun")


def _is_sweep(overrides: list[str]) -> bool:
    return any(override in MULTIRUN for override in overrides)


def _submitted(task: Callable[[], object]) -> None:
    """Runs a job that submitit started. If it is stopped it saves, and then submitit requeues it."""
    interrupt.install()
    try:
        task()
    except Interrupted:
        received = interrupt.received()
        interrupt.uninstall()
        if received:
            signal.raise_signal(signal.Signals[received])
        raise
    finally:
        interrupt.uninstall()


def _start_time() -> str:
    if launch.detect().size == 1:
        return launch.now()  # without importing torch
    return load("fcmae.distributed:start_time")()
