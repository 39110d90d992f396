"""crio-oci's command line and what it reads, without root: the parser, the help, ids, JSON, logs."""

from __future__ import annotations

import json
import re
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crio_native.errors import InvalidArgument
from crio_native.oci.builtin.standalone import control, exec, options, resources, state, verbs

NAMES = sorted(verbs._VERBS)
HELPER = Path(__file__).parents[2] / "helpers" / "crio-oci.c"


def parse(verb: str, *words: str) -> tuple[list[str], SimpleNamespace]:
    into, known = SimpleNamespace(), verbs.Verb(verb)
    return options.parse(words, verbs.table(known.flags), into, interspersed=known.interspersed), into


@pytest.mark.parametrize(
    "words",
    [
        ("--bundle", "/b", "--no-pivot", "id"),
        ("--bundle=/b", "id", "--no-pivot"),
        ("id", "-b", "/b", "-no-pivot=true"),
        ("-b=/b", "--no-pivot", "--", "id"),
    ],
)
def test_flags_before_and_after_the_arguments(words: Sequence[str]) -> None:
    others, into = parse("create", *words)
    assert (others, into.bundle, into.no_pivot, into.pid_file, into.preserve_fds) == (["id"], "/b", True, "", None)


def test_an_execs_command_keeps_its_flags() -> None:
    others, into = parse("exec", "-t", "--env", "A=1", "-e", "B=2", "id", "ls", "-t", "--env")
    assert others == ["id", "ls", "-t", "--env"]
    assert (into.tty, into.env) == (True, ["A=1", "B=2"])


@pytest.mark.parametrize(
    ("verb", "words", "why"),
    [
        ("create", ["--nosuch"], "flag provided but not defined: --nosuch"),
        ("create", ["--bundle"], "needs an argument"),
        ("create", ["--no-pivot=maybe"], "invalid boolean"),
        ("create", ["--preserve-fds", "x"], "must be a whole number"),
        ("exec", ["-e", "a"] * 5000, "at most"),
    ],
)
def test_wrong_usage(verb: str, words: list[str], why: str) -> None:
    with pytest.raises(options.Usage, match=re.escape(why)):
        parse(verb, *words)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_and_a_function(name: str) -> None:
    verb = verbs.Verb(name)
    text = verbs.help_text(verb)
    assert all(f"--{flag.name}" in text for flag in verb.flags)
    assert name in verbs.help_text()
    module, _, function = verb.function.partition(":")
    assert callable(getattr(__import__(f"{verb.package}.{module}", fromlist=[function]), function))


def test_the_c_program_knows_which_commands_enter_a_container() -> None:
    """It starts the interpreter by a read-only view for these; without, each would start it twice."""
    from crio_native.cli import oci

    known = re.search(r"verbs\[\] = \{([^}]*)\}", HELPER.read_text())
    assert known is not None
    assert tuple(re.findall(r'"(\w+)"', known[1])) == oci.ENTERING


HEAVY = ("typing", "dataclasses", "re", "json", "socket", "enum", "functools", "logging", "argparse", "inspect")


@pytest.mark.parametrize("module", ["create", "exec", "control"])
def test_the_commands_that_engines_call_import_nothing_heavy(module: str) -> None:
    code = f"""
import sys
sys.path += {[str(HELPER.parents[1]), *site.getsitepackages()]!r}
from crio_native.cli import oci
from crio_native.oci.builtin.standalone import interpreter, {module}
print(*sorted(set(sys.modules) & {set(HEAVY)!r}))
"""
    line = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.split() == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), json_values), st.sampled_from([None, 2]), st.booleans())
def test_json_is_read_as_the_library_reads_it(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    text = "\n\t " + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + " \r\n"
    try:
        content = text.encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair is no UTF-8
    assert state.parse_json(content, "file") == json.loads(text)


@given(st.binary(max_size=200))
def test_what_is_not_json_is_refused_with_the_files_name(content: bytes) -> None:
    try:
        expected = json.loads(content.decode(), parse_constant=lambda name: int(name))
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        assert state.parse_json(content, "file") == expected
    else:
        with pytest.raises(InvalidArgument, match=r"^file: "):
            state.parse_json(content, "file")


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b"[" * 100_000])
def test_json_that_is_too_deep(content: bytes) -> None:
    with pytest.raises(InvalidArgument, match="nested too deeply"):
        state.parse_json(content, "file")


def test_json_that_is_too_large() -> None:
    with pytest.raises(InvalidArgument, match="may have at most"):
        state.parse_json(b" " * (state.MAX_CONFIG + 1), "file")


@pytest.mark.parametrize(
    ("text", "number"),
    [("9", 9), ("KILL", 9), ("SIGKILL", 9), ("kill", 9), ("SIGRTMIN+3", 37), ("RTMIN", 34), ("0", 0)],
)
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert control.signal_number(text) == number


@pytest.mark.parametrize("text", ["", "NOSUCH", "65", "-9", "SIG_DFL", "_IGN", "SIG", "9x", "٩", "TERM+1", "RTMIN+99"])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(InvalidArgument, match="unknown signal"):
        control.signal_number(text)


@pytest.mark.parametrize(("text", "user"), [("5", {"uid": 5}), ("0:7", {"uid": 0, "gid": 7})])
def test_users_are_numbers(text: str, user: dict[str, int]) -> None:
    assert exec.user_of(text) == user


@given(st.text(max_size=12))
def test_what_is_no_number_is_no_user(text: str) -> None:
    if not re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,9})?", text):
        with pytest.raises(InvalidArgument):
            assert exec.user_of(text)["uid"] > 999_999_999
            raise InvalidArgument("", text, "a large number")


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("1.5m", 90.0)])
def test_intervals(text: str, seconds: float) -> None:
    assert resources._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "0s", "-1s", "1e9s", "99999999h"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(InvalidArgument):
        resources._seconds(text)


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("64k", 65536), ("1g", 1 << 30), ("-1", -1)])
def test_sizes(text: str, number: int) -> None:
    assert resources._bytes("--memory", text) == number
