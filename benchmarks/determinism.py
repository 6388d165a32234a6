"""The price of trainer.deterministic: `fcmae bench step` without and with it, each in a process of its own.

    python benchmarks/determinism.py models=[convnextv2_base] engines=[packed] batch_size=256

Takes the overrides of `fcmae bench step`. cuBLAS reads its settings once per process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(overrides: list[str], deterministic: bool, folder: Path) -> dict[tuple[str, str], float]:
    """Images per second by (model, engine)."""
    out = folder / f"{deterministic}.json"
    command = [sys.executable, "-m", "fcmae.cli", "bench", "step", *overrides]
    subprocess.run([*command, f"deterministic={str(deterministic).lower()}", "--json", str(out)], check=True)
    results = json.loads(out.read_text())["results"]
    return {(result["model"], result["engine"]): result["images_per_second"] for result in results}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fast, same = (measure(sys.argv[1:], value, Path(folder)) for value in (False, True))
    for (model, engine), speed in fast.items():
        paid = 1 - same[model, engine] / speed
        print(f"{model} {engine}: {speed:.0f} img/s, deterministic {same[model, engine]:.0f} img/s ({paid:.1%} less)")


if __name__ == "__main__":
    main()
