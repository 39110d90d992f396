"""No option is only decoration: something reads it, or a warning says why nothing does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crio_native
from crio_native.config import load
from crio_native.config.schema import Named, Option, members
from crio_native.config.tables import Config

# How the program's code calls a table when it reads an option of it.
TABLE_NAMES = {
    "Config": {"config"},
    "RootTable": {"crio"},
    "ApiTable": {"api"},
    "RuntimeTable": {"runtime", "settings", "table"},
    "RuntimeHandler": {"handler", "settings", "_settings", "default"},
    "Workload": {"workload", "w"},
    "WorkloadResources": {"limits"},
    "ImageTable": {"image"},
    "NetworkTable": {"network"},
    "MetricsTable": {"metrics", "table"},
    "StatsTable": {"stats"},
    "CheckpointRestoreTable": {"checkpoint_restore"},
}
ONE_VALUE = {"crio.image.default_transport"}  # nothing but its default is accepted


def options(cls: type, at: str) -> Iterator[tuple[str, str, Option]]:
    """(key, table class, option) of all."""
    for name, member in members(cls).items():
        key = at if name == "crio" else f"{at}.{name}"
        if isinstance(member, Option):
            yield key, cls.__name__, member
        else:
            yield from options(member.cls if isinstance(member, Named) else member, key)


def reads() -> set[tuple[str, str]]:
    """(what it is read of, attribute) of every attribute that the program reads; `getattr` by a literal counts."""
    root = Path(crio_native.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        if file.name in ("tables.py", "render.py", "loading.py") and file.parent.name == "config":
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add((name, node.attr))
    return found


READS = reads()


@pytest.mark.parametrize(("key", "table", "option"), [pytest.param(*o, id=o[0]) for o in options(Config, "crio")])
def test_every_option_has_a_reader_or_a_reason(key: str, table: str, option: Option) -> None:
    name = key.rpartition(".")[2]
    read = any((owner, name) in READS for owner in TABLE_NAMES.get(table, ()))
    if option.inert:
        assert not read, f"{key} is read, and still said to have no effect"
    else:
        assert read or option.deprecated or key in ONE_VALUE, f"nothing reads {key}"


def test_what_has_no_effect_is_warned_about_where_it_was_written(tmp_path: Path) -> None:
    """With its value and the reason; at its default it is not, whoever writes it."""
    (tmp_path / "conf.d").mkdir()
    file = tmp_path / "crio.conf"
    file.write_text(
        '[crio.image]\npause_command = "/pause"\nbig_files_temporary_dir = "/big"\n'
        "[crio.nri]\nenable_nri = true\n"
        '[crio.runtime.runtimes.kata]\nruntime_type = "vm"\nruntime_pull_image = true\nstream_websockets = false\n'
    )
    flags = {"crio.tracing.tracing_sampling_rate_per_million": 5}
    warnings = load(file, tmp_path / "conf.d", flags).warnings
    assert [warning.partition(" has no effect: ")[0] for warning in warnings] == [
        f"{file}: crio.runtime.runtimes.kata.runtime_pull_image: True",
        f"{file}: crio.image.big_files_temporary_dir: '/big'",
        "command line: crio.tracing.tracing_sampling_rate_per_million: 5",
        f"{file}: crio.nri.enable_nri: True",
    ]
    assert all(len(warning.partition(" has no effect: ")[2]) > 20 for warning in warnings)
