"""``python -m tests.fuzz [NAME ...] [--seed N] [--cases N]``: runs fuzzing targets, see :mod:`tests.fuzz`.

NAME is the beginning of a target's name; ``--list`` shows all. What was found before comes first. Exit code 1 if
anything went wrong.
"""

import argparse
import functools
import gc
import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from tests.fuzz import configs, files, left, weights
from tests.fuzz.mutate import read_folder, write_folder
from tests.fuzz.target import Target, run
from tests.hostile import measure

CORPUS = Path(__file__).parent / "corpus"
SHORT = 100
"""The short form runs one of so many cases."""
TARGETS: dict[str, Target] = {**files.TARGETS, **weights.TARGETS, **left.TARGETS, **configs.TARGETS}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="per target; default: all, or with FUZZ=short some")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = {name: t for name, t in TARGETS.items() if not given.names or name.startswith(tuple(given.names))}
    if given.list:
        print(*chosen, sep="\n")
        return 0
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a forked process would copy all that is imported
    short = os.environ.get("FUZZ") == "short"
    began = _cpu()
    total = wrong = 0
    for name, target in chosen.items():
        cases = given.cases or (-(-target.cases // SHORT) if short else target.cases)
        again = found_again(name)
        found = len(again)
        for case, reason in again.items():
            print(f"{name}, corpus/{name}/{case}: {reason}", flush=True)
        for number, taken in run(name, target, cases, given.seed):
            reason = target.wrong(taken)
            if not number and not taken.said.startswith("read"):
                reason = f"the sound files are refused: {taken.said}"
            if reason:
                found += 1
                print(f"{name} {number}: {reason}", flush=True)
                if number:
                    _keep(name, given.seed, number)
        print(f"{name}: {cases} cases, {found} wrong; {_cpu() - began:.0f} CPU seconds so far", flush=True)
        total, wrong = total + cases, wrong + found
    print(f"{total} cases, {wrong} wrong, {_cpu() - began:.0f} CPU seconds")
    return int(wrong > 0)


def found_again(name: str) -> dict[str, str]:
    """The cases of a target's corpus that are wrong, and why."""
    target, folder = TARGETS[name], CORPUS / name
    if not folder.is_dir():
        return {}
    if target.needs is not None:
        target.needs()
    cases = {case.name: target.case(functools.partial(read_folder, case)) for case in sorted(folder.iterdir())}
    wrong = {case: target.wrong(taken) for case, taken in measure(cases).items()}
    return {case: reason for case, reason in wrong.items() if reason}


def _keep(name: str, seed: int, number: int) -> None:
    """Adds a case to the corpus."""
    folder = CORPUS / name / f"{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, TARGETS[name].changed(name, seed, number))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main())
