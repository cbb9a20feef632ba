"""What every test runs under: the hypothesis profiles, and the rule that CI skips nothing."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

CI = os.environ.get("CI") == "true"

# No deadline: the first call of a torch function costs many times the second. In CI the examples are the same in every
# run, so that a red run means a changed project; at home each run looks for new ones.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if CI else "dev"))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Under CI=true a skip is a failure: what CI does not run, nobody knows to work."""
    expected_failure = hasattr(report, "wasxfail")  # pytest reports an xfail as skipped
    if CI and report.skipped and not expected_failure:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and under CI=true nothing may be. {reason}"


# Outermost (tryfirst), to see the report as pytest's own skip and xfail handling left it.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
