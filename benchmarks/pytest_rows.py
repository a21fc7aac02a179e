"""A plugin of pytest: `-p benchmarks.pytest_rows --rows FILE` writes each test's result to FILE as it is known."""

from pathlib import Path

import pytest

from benchmarks.results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Rows(Results(config.getoption("rows"))))


class Rows:
    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down only where they are not fine
            lines = report.longreprtext.splitlines() if report.failed else []
            detail = next((line[2:].strip() for line in lines if line.startswith("E ")), "")
            self.results.add(test=report.nodeid, result=report.outcome, s=round(report.duration, 3), detail=detail)
