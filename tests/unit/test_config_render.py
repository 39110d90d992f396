"""Printing the configuration: what is printed loads back to the same; the manual and conf/ follow the schema."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from crio_native.config import Config, generate, load
from crio_native.config.kinds import Kind
from crio_native.config.render import differences, to_toml
from crio_native.config.schema import Named, Option, members
from crio_native.errors import InvalidArgument

EMPTY = Path("/dev/null")

SAMPLES: dict[type, list[Any]] = {
    bool: [True, False],
    int: [-1, 0, 1, 30, 999, 65535],
    str: [
        *(
            "",
            "/a/b",
            "/dev/x",
            "/a b/ünïcode",
            "1m30s",
            "1.5h250ms",
            "12 MiB",
            "1536B",
            "NET_RAW",
            "A=b",
            "A=",
            "0-3,7",
        ),
        *("8080", "Local", "Europe/Berlin", "net.ipv4.ip_forward=1", "kernel.sem=1 2 3", "nofile=1:2", "core=-1"),
        *("/dev/a:/dev/b:r", "0:1000:10", "docker://", 'say "hi" \\ # = [x]', "pod", "disable"),
    ],
}


def raw_values(kind: Kind) -> st.SearchStrategy[Any]:
    """TOML values that the kind accepts."""
    if kind.item is not None:
        inner = raw_values(kind.item)
        if kind.toml is list:
            return st.lists(inner, max_size=3)
        return st.dictionaries(
            st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=5), inner
        )
    return st.sampled_from(accepted(kind))


def accepted(kind: Kind) -> list[Any]:
    """Samples of a kind, or of its members."""
    if kind.item is not None:
        return accepted(kind.item)
    named = re.findall(r'"([^"]*)"', kind.allowed) if kind.toml is str else []
    found = [value for value in dict.fromkeys(SAMPLES[kind.toml] + named) if accepts(kind, value)]
    assert found, f"no sample of {kind.allowed}"
    return found


def accepts(kind: Kind, value: Any) -> bool:
    try:
        kind.read(value, "sample")
    except InvalidArgument:
        return False
    return True


def raw_tables(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, member in members(cls).items():
        if isinstance(member, Option):
            fields[name] = raw_values(member.kind)
        elif isinstance(member, Named):
            fields[name] = st.dictionaries(st.sampled_from(["a", "b-c", "d.e"]), raw_tables(member.cls), max_size=2)
        else:
            fields[name] = raw_tables(member)
    # A few options at a time: what they say together is seldom contradictory then.
    names = st.sets(st.sampled_from(sorted(fields)), max_size=6)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in sorted(chosen)}))


def whole(tables: dict[str, Any]) -> dict[str, Any]:
    return {"crio": tables.pop("crio", {}) | tables}


def written(raw: Any, directory: Path) -> Path:
    """The raw values as a file, by another printer than ours."""
    import tomlkit

    path = directory / "raw.toml"
    path.write_text(tomlkit.dumps(raw))
    return path


def test_each_option_is_read_printed_and_read_again_alike(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    printed = tmp_path / "printed.toml"
    tried = 0
    for key, option in all_options(Config, ""):
        if key == "crio.runtime.default_runtime":
            continue
        for value in accepted(option.kind):
            raw = [value] if option.kind.toml is list else {"k": value} if option.kind.toml is dict else value
            try:
                config = load(EMPTY, tmp_path / "d", {key: raw}).config
            except InvalidArgument as error:
                assert error.field.startswith(f"command line: {key}"), error  # it contradicts a default
                continue
            printed.write_text(to_toml(config, changed_only=bool(tried % 2)))
            assert load(printed, tmp_path / "d").config == config, (key, raw)
            tried += 1
    assert tried > 500


def all_options(cls: type, at: str) -> Iterator[tuple[str, Option]]:
    for name, member in members(cls).items():
        key = f"{at}.{name}" if at else "crio" if name == "crio" else f"crio.{name}"
        if isinstance(member, Option):
            yield key, member
        elif isinstance(member, Named):
            yield from all_options(member.cls, f"{key}.some")
        else:
            yield from all_options(member, key)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.data())
def test_what_is_printed_loads_back_to_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "render"
    (directory / "d").mkdir(parents=True, exist_ok=True)
    raw = whole(data.draw(raw_tables(Config)))
    raw["crio"].get("runtime", {}).pop("default_runtime", None)
    try:
        config = load(written(raw, directory), directory / "d").config
    except InvalidArgument:
        reject()  # options that contradict each other
    for changed_only in (False, True):
        (directory / "printed.toml").write_text(to_toml(config, changed_only))
        again = load(directory / "printed.toml", directory / "d")
        assert again.config == config
        assert not [line for line in again.warnings if "unknown" in line]


def test_the_defaults_print_as_comments_only() -> None:
    assert to_toml(Config(), changed_only=True).strip() == ""
    printed = to_toml(Config())
    assert not [line for line in printed.splitlines() if line and not line.startswith(("#", "["))]
    active = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", printed, flags=re.M))
    assert active["crio"]["runtime"]["default_capabilities"][0] == "CHOWN"
    assert active["crio"]["nri"]["default_validator"]["nri_enable_default_validator"] is False
    assert active["crio"]["image"]["pause_image"] == "registry.k8s.io/pause:3.10.1"


def test_only_changes_are_printed_when_asked() -> None:
    runtime = replace(Config().runtime, log_level="debug")
    assert to_toml(Config(runtime=runtime), changed_only=True) == '[crio.runtime]\nlog_level = "debug"\n'


def test_differences_name_each_option_and_whether_a_running_daemon_takes_it(tmp_path: Path) -> None:
    old = load(EMPTY, tmp_path, {"crio.runtime.runtimes.gone.no_sync_log": True}).config
    new = load(
        EMPTY,
        tmp_path,
        {
            "crio.runtime.log_level": "debug",
            "crio.api.listen": "/x.sock",
            "crio.runtime.runtimes.crun.runtime_path": "/x",
            "crio.runtime.runtimes.builtin.no_sync_log": True,
        },
    ).config
    found = {difference.key: difference for difference in differences(old, new)}
    assert {key: difference.reload for key, difference in found.items()} == {
        "crio.api.listen": False,
        "crio.runtime.log_level": True,
        "crio.runtime.runtimes.builtin.no_sync_log": True,
        "crio.runtime.runtimes.crun": True,
        "crio.runtime.runtimes.gone": True,
    }
    assert (found["crio.runtime.log_level"].old, found["crio.runtime.log_level"].new) == ("info", "debug")
    assert found["crio.runtime.runtimes.crun"].old is None
    assert differences(old, old) == []


def test_the_manual_and_the_installed_file_are_what_the_schema_makes() -> None:
    """Write them anew with: python -m crio_native.config.generate."""
    assert generate.MANUAL.read_text() == generate.manual()
    assert generate.INSTALLED.read_text() == generate.installed()


def test_the_installed_file_loads_to_the_defaults(tmp_path: Path) -> None:
    result = load(generate.INSTALLED, tmp_path)
    assert (result.config, result.warnings) == (Config(), [])
