"""How the workers of one run (pytest-xdist's, `-n 2`) share the tests: by module, and guests of the rig by boot.

A module's tests share daemons and registries, so one worker has them all.  Those that run in a guest are one worker's
for each kind of guest, whatever their modules, or the same guest would be booted again and again.  Loaded only where
workers are asked for.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from xdist.scheduler import LoadScopeScheduling

from .vm.plugin import configuration

GUEST = "@guest "  # in what a worker tells of its items: begins the kind of the guest


class ByModuleOrGuest(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """Hands out what belongs together as one piece."""

    def _split_scope(self, nodeid: str) -> str:
        name, _, guest = nodeid.partition(GUEST)
        return guest or name.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByModuleOrGuest:
    config.option.loadscopereorder = False  # guests first: theirs are the longest pieces
    return ByModuleOrGuest(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> Generator[None]:
    """The scheduler, in another process, sees nothing of an item but its id: the guest is told in it, just there."""
    with pytest.MonkeyPatch.context() as patch:
        for item in session.items:
            if wanted := configuration(item):
                patch.setattr(item, "_id", f"{item.nodeid}{GUEST}{wanted}")
        yield
