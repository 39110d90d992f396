"""pytest's side of the rig: outside, items marked ``vm`` take their reports from a guest; inside, they are sent.

The hooks are imported by ``tests/conftest.py``.  Reports travel in pytest's own serialised form, so the outer session
shows the inner tracebacks, captured output and durations as if the test had run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator

import pytest

from .guest import Configuration, Guest, GuestEnded
from .packages import RigUnavailable, rig

CHANNEL = "CRIO_NATIVE_VM"  # environment variable in the guest: the device that reports are written to
# One item's bound.  Below pytest-timeout's own, whose alarm would come between two reports and end the session.
ITEM_SECONDS = 110
FORWARDED = ("CRIO_NATIVE_MUST_WORK", "LANG", "LC_ALL", "PATH")

MUST_WORK = os.environ.get("CRIO_NATIVE_MUST_WORK") == "1"  # a test that cannot run here is then a failure

in_vm = CHANNEL in os.environ


def configuration(item: pytest.Item) -> Configuration | None:
    """What guest the item wants; None for one that runs here."""
    marker = None if in_vm else item.get_closest_marker("vm")
    return Configuration(**marker.kwargs) if marker else None


class Outside:
    """The session's guests, one configuration after the other, each booted when its first item comes up."""

    def __init__(self) -> None:
        self._guest: Guest | None = None
        self._booted: Configuration | None = None
        self._unread: list[pytest.TestReport] = []
        self._broken: dict[Configuration, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Items of one guest follow each other, before all that run here: the fixtures of those end with the last."""
        items.sort(key=lambda item: [0, wanted] if (wanted := configuration(item)) else [1])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        wanted = configuration(item)
        if wanted is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, wanted):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if nextitem is None or configuration(nextitem) != wanted:
            self._stop()
        return True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Fetch the rig's files now: the tests that run here cut the network off (`tests/apart`)."""
        if any(configuration(item) for item in session.items):
            with contextlib.suppress(RigUnavailable):  # said by each item when it comes up
                rig()

    def pytest_sessionfinish(self) -> None:
        self._stop()

    def _reports(self, item: pytest.Item, wanted: Configuration) -> Iterator[pytest.TestReport]:
        """The item's reports as they come, the teardown's last; or one that says why there are none."""
        deadline = time.monotonic() + ITEM_SECONDS
        try:
            if self._guest is None or self._booted != wanted:
                self._boot(item, wanted)
            last = ""
            while last != "teardown":
                report = self._next_report(item, deadline)
                last = report.when or ""
                yield report
        except RigUnavailable as error:
            yield _unavailable(item, str(error))
        except GuestEnded as error:
            console = self._guest.console() if self._guest else ""
            self._stop()
            yield _failed(item, str(error), console)

    def _boot(self, item: pytest.Item, wanted: Configuration) -> None:
        """A guest for this item and all later ones of its kind (after a guest's crash that is: for the rest)."""
        self._stop()
        if wanted in self._broken:
            raise GuestEnded(self._broken[wanted])
        items = item.session.items
        ids = [other.nodeid for other in items[items.index(item) :] if configuration(other) == wanted]
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        environment |= {CHANNEL: "/dev/tty1", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:{rig().tree}/sbin"
        # importing hypothesis would cost as much as the boot; a test that uses it does not need its plugin
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *ids]
        self._guest = Guest(rig(), wanted, command, environment)
        self._booted = wanted
        self._broken[wanted] = "an earlier guest of this kind ended before its first report"

    def _next_report(self, item: pytest.Item, deadline: float) -> pytest.TestReport:
        """The item's next report; those of others are kept for them."""
        while True:
            for index, report in enumerate(self._unread):
                if report.nodeid == item.nodeid:
                    return self._unread.pop(index)
            assert self._guest and self._booted
            message = self._guest.read(deadline)
            if "end" in message:
                raise GuestEnded(f"pytest in the guest ended with status {message['end']} before this test did")
            self._broken.pop(self._booted, None)
            data = message["report"]
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if isinstance(report.longrepr, list):  # a skip's place and reason: JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            self._unread.append(report)

    def _stop(self) -> None:
        if self._guest:
            self._guest.kill()
        self._guest = self._booted = None
        self._unread.clear()


class Inside:
    """Sends each report out, as one line of JSON."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._channel = os.open(os.environ[CHANNEL], os.O_WRONLY | os.O_NOCTTY)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        line = json.dumps({"report": data}, default=str).encode() + b"\n"
        while line:
            line = line[os.write(self._channel, line) :]


def _failed(item: pytest.Item, message: str, console: str = "") -> pytest.TestReport:
    sections = [("guest console", console)] if console else []
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call", sections)


def _unavailable(item: pytest.Item, reason: str) -> pytest.TestReport:
    if MUST_WORK:
        return _failed(item, reason)
    path, line, _ = item.location
    return pytest.TestReport(
        item.nodeid, item.location, {}, "skipped", (path, line or 0, f"Skipped: {reason}"), "setup"
    )
