"""A plugin of pytest: `-p benchmarks.pytest_rows --rows FILE` writes each test's result to FILE as it is known.

With `--seconds N` no test begins after that time; they then run in random order, so that some of every kind do.
"""

import random
from pathlib import Path
from time import monotonic

import pytest

from benchmarks.results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, required=True)
    parser.addoption("--seconds", type=float)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Rows(Results(config.getoption("rows"))))
    if config.getoption("seconds") is not None:
        config.pluginmanager.register(Limited(monotonic() + config.getoption("seconds")))


class Rows:
    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down only where they are not fine
            lines = report.longreprtext.splitlines() if report.failed else []
            detail = next((line[2:].strip() for line in lines if line.startswith("E ")), "")
            self.results.add(test=report.nodeid, result=report.outcome, s=round(report.duration, 3), detail=detail)


class Limited:
    def __init__(self, end: float) -> None:
        self.end = end  # by `monotonic`

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        random.Random(0).shuffle(items)

    def pytest_runtest_setup(self) -> None:
        if monotonic() > self.end:
            pytest.skip("no time left")
