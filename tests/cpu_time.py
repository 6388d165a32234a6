"""CPU seconds of the tests, those of their processes included: wall time says little on a machine with other work.

``--durations=N`` prints the N tests that took most; the sum is always printed.
"""

import resource
from collections.abc import Iterator

import pytest

from tests import preloaded

SECONDS: dict[str, float] = {}
"""By test; processes that a test started are counted where they ended."""


def cpu_seconds() -> float:
    """User and system time so far: this process, its children that have ended, and the server of processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + preloaded.cpu_seconds()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    begin = cpu_seconds()
    result = yield
    SECONDS[item.nodeid] = SECONDS.get(item.nodeid, 0.0) + cpu_seconds() - begin
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.getoption("durations")
    if count:
        terminalreporter.section(f"CPU seconds, the {count} largest")
        for name, seconds in sorted(SECONDS.items(), key=lambda item: -item[1])[:count]:
            terminalreporter.write_line(f"{seconds:7.1f} {name}")
    terminalreporter.write_line(f"CPU seconds, user and system: {cpu_seconds():.0f}")
