"""Every attack fails against the executor, and succeeds against the one without the defence that it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from .attacks import ATTACKS, Attack
from .conftest import laboratory

pytestmark = pytest.mark.root

each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


@each_attack
def test_ours_withstands(attack: Attack, tools: Path) -> None:
    with laboratory("", tools) as lab:
        assert not attack.succeeds(lab)
        assert lab.made_outside() == set()


@each_attack
def test_a_weakened_build_does_not(attack: Attack, tools: Path) -> None:
    """Else the attack would prove nothing."""
    with laboratory(attack.weakness, tools) as lab:
        assert attack.succeeds(lab)
