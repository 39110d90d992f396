"""Changes of the node that several containers want: the last one's end puts the first value back."""

from __future__ import annotations

from pathlib import Path

import pytest

from crio_native.errors import StepFailed
from crio_native.pods import tuning
from crio_native.pods.high_performance import Wishes


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """48 CPUs."""
    monkeypatch.setattr(tuning, "_CPU", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(tuning, "_all_cpus", lambda: (1 << 48) - 1)
    monkeypatch.setattr(tuning, "_restart", lambda mask: None)
    for cpu in range(4):
        for name, value in ((tuning._LATENCY, "0"), (tuning._GOVERNOR, "powersave")):
            path = tmp_path / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True)
            path.write_text(value)
    (tmp_path / "affinity").write_text("ffff,ffffffff\n")
    return tmp_path


def tuned(node: Path) -> tuning.Tuning:
    return tuning.Tuning(node / "records", str(node / "irqbalance"), "disable", node / "affinity")


def state(node: Path, cpu: int) -> tuple[str, str, str]:
    here = node / f"cpu{cpu}"
    return (here / tuning._LATENCY).read_text(), (here / tuning._GOVERNOR).read_text(), (node / "affinity").read_text()


def test_the_first_value_comes_back_with_the_last_end(node: Path) -> None:
    one, two = (
        Wishes((0, 1), latency="n/a", no_interrupts=True),
        Wishes((1, 2), latency="7", governor="performance", no_interrupts=True),
    )
    tuned(node).apply("one", one)
    assert state(node, 1) == ("n/a", "powersave", "ffff,fffffffc")
    tuned(node).apply("two", two)
    assert state(node, 1) == ("7", "performance", "ffff,fffffff8")
    tuned(node).release("one")
    assert state(node, 0) == ("0", "powersave", "ffff,fffffff9")
    assert state(node, 1) == ("7", "performance", "ffff,fffffff9")
    tuned(node).release("two")
    tuned(node).release("two")
    assert state(node, 1) == ("0", "powersave", "ffff,ffffffff")
    assert list((node / "records").iterdir()) == []


def test_a_refusal_undoes_what_was_done(node: Path) -> None:
    (node / "cpu2" / tuning._LATENCY).unlink()
    (node / "cpu2" / tuning._LATENCY).mkdir()
    with pytest.raises(StepFailed, match="cpu2"):
        tuned(node).apply("one", Wishes((0, 2), latency="5"))
    assert state(node, 0)[0] == "0"
    assert list((node / "records").glob("*")) == []


def test_a_cpu_that_has_gone_keeps_nothing_else_from_coming_back(node: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned(node).apply("one", Wishes((0, 2, 3), latency="5"))
    (node / "cpu2" / tuning._LATENCY).unlink()
    (node / "cpu2" / tuning._LATENCY).mkdir()
    tuned(node).release("one")
    assert (state(node, 0)[0], state(node, 3)[0]) == ("0", "0")
    assert "cpu2" in caplog.text
    assert list((node / "records").iterdir()) == []


def test_irqbalance_without_a_list_gets_one(node: Path) -> None:
    (node / "irqbalance").write_text("OTHER=1")
    tuned(node).apply("one", Wishes((33,), no_interrupts=True))
    assert (node / "irqbalance").read_text() == 'OTHER=1\nIRQBALANCE_BANNED_CPUS="0002,00000000"\n'
    assert (node / "affinity").read_text() == "fffd,ffffffff"
