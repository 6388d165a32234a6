"""``fcmae export`` and ``fcmae import`` as functions: checkpoints of ours to and from other libraries' files."""

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fcmae.checkpoints.checkpoint import describe
from fcmae.errors import DiskError, ExportError, UsageError
from fcmae.files import check_output, delete_remains, is_full, temporary_path
from fcmae.interchange import model_card, official, onnx_format, timm_format, transformers_format, viscy_format
from fcmae.interchange.network import Check, Given, Network
from fcmae.interchange.preprocessing import check_normalisation
from fcmae.interchange.weights import explained
from fcmae.messages import say

IMPORTS: dict[str, ModuleType] = {
    "official": official,
    "timm": timm_format,
    "transformers": transformers_format,
    "viscy": viscy_format,
}
EXPORTS = (*IMPORTS, "onnx")
TOLERANCE = 1e-5
"""Largest difference of an export, as a share of the output's magnitude; ONNX has its own."""


def export(
    checkpoint: str | os.PathLike[str],
    to: str,
    folder: str | os.PathLike[str],
    *,
    check: bool = True,
    ema: bool = True,
    license_name: str | None = None,
    onnx_options: dict[str, bool] | None = None,
    planes: int = 1,
) -> Check:
    """Writes a directory for another library, whole or not at all, with a model card.

    Args:
        checkpoint: a checkpoint or a run's directory; of pretraining the backbone is exported, else the classifier.
        to: ``official``, ``timm``, ``transformers``, ``viscy`` or ``onnx``.
        folder: made; if it is there it must be empty.
        check: load what was written with the other library, where it is installed, and compare outputs.
        ema: the averaged weights, where the run kept some.
        license_name: for the model card.
        onnx_options: passed to the ONNX export: ``half``, ``dynamic_size``.
        planes: of VisCy's stacks, see :mod:`fcmae.interchange.viscy_format`.

    Raises UsageError for a network that the format cannot hold; ExportError if the outputs differ.
    """
    if to not in EXPORTS:
        raise UsageError(f"--to must be one of {', '.join(EXPORTS)}; got {to!r}")
    with _new_folder(Path(folder)) as temporary:
        network = Network.read(os.fspath(checkpoint), ema)
        say(describe(network.path, network.state))
        check_normalisation(network.cfg.data, to)
        if to == "onnx":
            result = _export_onnx(network, temporary, check, onnx_options or {})
        else:
            IMPORTS[to].export(network, temporary, **({"planes": planes} if to == "viscy" else {}))
            result = IMPORTS[to].check(network, temporary) if check else Check("--no-check", None)
            if result.error is not None and not result.error <= TOLERANCE:
                raise ExportError(f"{result}; must be at most {TOLERANCE:g}")
        model_card.write(network, temporary, to, result, license_name)
    return result


def import_weights(path: str | Path, library: str, out: str | Path, given: Given | None = None) -> list[str]:
    """Writes a checkpoint of ours from another library's file or directory.

    ``fcmae.load`` reads it and ``fcmae finetune init_from=`` starts from it.

    Args:
        path: a file of the ``official`` code; a directory or file of ``timm``'s; a directory of ``transformers``';
            a directory or file of ``viscy``'s encoder.
        out: the checkpoint's path.
        given: class names and normalisation, for files that do not hold them.

    Returns:
        What differs in the other library or could not be known, a line each.

    Raises WeightsError naming the keys that are missing, left over, or of another shape.
    """
    if library not in IMPORTS:
        raise UsageError(f"--from must be one of {', '.join(IMPORTS)}; got {library!r}")
    if os.path.lexists(out):
        raise UsageError(f"--out {out} exists; name a file that is new")
    check_output("--out", out)
    with explained(Path(path), f"weights of {library} as they should be"):
        imported = IMPORTS[library].load(Path(path), given or Given())
    try:
        imported.write(Path(out), library)
    except OSError as error:
        raise DiskError(f"--out {out} cannot be written: {error.strerror}") from error
    return imported.notes


def _export_onnx(network: Network, folder: Path, check: bool, options: dict[str, bool]) -> Check:
    error = onnx_format.export(network.model, network.cfg.data, folder, check=check, **options)
    if error is None:
        return Check("onnxruntime is not installed: pip install 'fcmae[onnx]'" if check else "--no-check", None)
    return Check(f"onnxruntime {importlib.metadata.version('onnxruntime')}", error)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``folder`` at the end, or is removed after an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder} exists; name a directory that is new or empty")
    hidden = folder.with_name(f".{folder.name}")
    delete_remains(hidden)
    temporary = temporary_path(hidden)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        temporary.rename(folder)
    except BaseException as error:
        at_fault = is_full(temporary, error)
        shutil.rmtree(temporary)
        if at_fault:
            raise DiskError(f"--out {folder} cannot be written: the disk is full") from error
        raise
