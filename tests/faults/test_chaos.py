"""Random faults in some commands at once; ``make chaos`` is the long form, over all of them."""

import pytest

from tests.conftest import run_python
from tests.faults.runs import SHORT


@pytest.mark.timeout(1800)
def test_random_faults(tmp_path):
    """What is checked is in tests/chaos: equal results, nothing left behind, each end told in a line."""
    some = ("events=8", "only=pretrain,prepare,embed", "ranks=2") if SHORT else ("events=40", "minutes=5")
    done = run_python(tmp_path, "-m", "tests.chaos", *some, "jobs=2", check=None)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
