"""A plugin of pytest: a line for every test as it ends, with its seconds and, where it fails, with the whole message.

    python -m pytest -p benchmarks.tell_tests ...

What is stopped by a signal half way has told all that it knows by then, down to the tests that were still running.
"""

import signal
import time
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that reports, not the workers of xdist
        config.pluginmanager.register(Teller(config))


class Teller:
    def __init__(self, config: pytest.Config) -> None:
        self.plugins: Any = config.pluginmanager
        self.running: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        signal.signal(signal.SIGTERM, self.stop)

    def say(self, text: str) -> None:
        terminal: Any = self.plugins.get_plugin("terminalreporter")
        terminal.write_line(text, flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str]:
        """In place of the dots."""
        return report.outcome if report.when == "call" or not report.passed else "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext.strip()
            reason = (crash.message if crash else text) or "no message"
            self.say(f"FAILED {name} in {report.when}: {' '.join(reason.split())[:300]}")
            self.say("\n".join(f"    {line}" for line in text.splitlines()))
        if report.when == "teardown":
            self.running.pop(name, None)
            self.say(f"{self.seconds.pop(name):6.1f} s {name}")

    def stop(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if capture := self.plugins.get_plugin("capturemanager"):
            capture.suspend_global_capture()
        for name, start in sorted(self.running.items(), key=lambda item: item[1]):
            self.say(f"STOPPED {name} after {time.monotonic() - start:.1f} s")
        signal.raise_signal(signal.SIGTERM)
