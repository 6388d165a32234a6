"""``make release``: checks that this commit can be released, builds wheel and sdist, tries the wheel, tags the commit.

Uploads nothing and needs no secret.
"""

import datetime
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_WHEEL = ("fcmae/conf/pretrain.yaml", "fcmae/launchers/slurm/srun.sbatch", "fcmae/cli.py")
IN_SDIST = ("pyproject.toml", "tests/conftest.py", "docs/config.md", "conf/pretrain.yaml", "README.md")


def problems(version: str, changelog: str, status: str, tags: list[str], today: str) -> list[str]:
    """What is to do before a release, a line each.

    Args:
        status: of ``git status --porcelain``.
        tags: of the repository.
    """
    found = []
    if status:
        found.append(f"commit or remove these files first:\n{status}")
    if f"v{version}" in tags:
        found.append(f"v{version} is tagged; set another __version__ in fcmae/version.py")
    heading = re.search(rf"^## \[{re.escape(version)}\] - (.*)$", changelog, re.MULTILINE)
    if heading is None:
        found.append(f"CHANGELOG.md must have the heading ## [{version}] - {today}")
    elif heading[1] != today:
        found.append(f"CHANGELOG.md: the date of {version} must be {today}; got {heading[1]}")
    return found


def lacking(names: list[str], needed: tuple[str, ...]) -> list[str]:
    """The files of ``needed`` that an archive with ``names`` does not hold."""
    return [name for name in needed if not any(other == name or other.endswith(f"/{name}") for other in names)]


def main() -> int:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "fcmae" / "version.py").read_text())[1]  # type: ignore[index]
    found = problems(
        version,
        (ROOT / "CHANGELOG.md").read_text(),
        _git("status", "--porcelain"),
        _git("tag").split(),
        datetime.date.today().isoformat(),
    )
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", str(ROOT)], check=True)
    wheel, sdist = next((ROOT / "dist").glob("*.whl")), next((ROOT / "dist").glob("*.tar.gz"))
    missing = lacking(zipfile.ZipFile(wheel).namelist(), IN_WHEEL)
    with tarfile.open(sdist) as archive:
        missing += lacking(archive.getnames(), IN_SDIST)
    if missing:
        print(f"missing in the packages: {', '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, str(wheel)], check=True
        )
        run = f"import sys; sys.path.insert(0, {folder!r}); from fcmae.cli import main; sys.exit(main(['--version']))"
        said = subprocess.run([sys.executable, "-I", "-c", run], check=True, capture_output=True, text=True, cwd=folder)
    if said.stdout.strip() != f"fcmae {version}":
        print(f"the wheel says {said.stdout.strip()!r}; expected fcmae {version}", file=sys.stderr)
        return 1
    _git("tag", "--annotate", f"v{version}", "--message", f"fcmae {version}")
    print(f"built {wheel.name} and {sdist.name}, tagged v{version}; docs/release.md says what is left to do")
    return 0


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
