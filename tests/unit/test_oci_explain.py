"""Explanations are made of the plan, whole, and nothing is done for them."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from crio_native.cli import oci
from crio_native.errors import InvalidArgument
from crio_native.linux.cgroup import hierarchy
from crio_native.oci import calls
from crio_native.oci.builtin import steps
from crio_native.oci.builtin.standalone import state
from crio_native.oci.explain import INIT, PARENT, Explanation, Row, explain

from ..oci.conftest import spec_of

USERS = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def rich_spec() -> dict[str, Any]:
    spec = spec_of("rootfs", ["sh", "-c", "true"])
    spec["linux"]["namespaces"] += [{"type": "time"}]
    spec["hooks"] = {"createRuntime": [{"path": "/bin/hook", "args": ["hook", "x"], "timeout": 5}]}
    spec["mounts"].append(
        {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro", "nosuid", "rslave"]}
    )
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    return spec


def row_of(explanation: Explanation, step: str) -> Row:
    (row,) = (row for row in explanation.rows if row.step == step)
    return row


def test_every_step_has_a_description_that_takes_its_arguments() -> None:
    assert set(calls.DESCRIPTIONS) == set(steps.STEPS)
    for name, act in steps.STEPS.items():
        if name == "bind":  # hands its arguments on to open_bind
            continue
        taken = list(inspect.signature(act).parameters)[1:]
        assert list(inspect.signature(calls.DESCRIPTIONS[name]).parameters) == taken, name


def test_a_bind_mount_is_explained_with_its_flags_and_its_field() -> None:
    (row,) = (row for row in explain(rich_spec()).rows if row.source == "mounts[5]")
    assert row.calls == (
        'tree = open_tree("/srv", OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_RECURSIVE)',
        "mount_setattr(tree, 0, set=MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID)",
        "mount_setattr(tree, AT_RECURSIVE, propagation=MS_SLAVE)",
        'target = openat2(root, "data", O_PATH|O_DIRECTORY, RESOLVE_IN_ROOT|RESOLVE_NO_MAGICLINKS), '
        "each missing component by mkdirat",
        "move_mount(tree, target)",
    )


def test_processes_and_namespaces_are_those_of_the_moment() -> None:
    explanation = explain(rich_spec())
    clone, session = row_of(explanation, "clone"), row_of(explanation, "new_session")
    assert (clone.process, clone.namespaces) == (PARENT, "the host's")
    assert clone.calls == ("clone3(flags=CLONE_NEWPID, exit_signal=SIGCHLD)",)
    assert (session.process, session.namespaces) == (INIT, "pid")
    most, late = (row.namespaces for row in explanation.rows if row.step == "new_namespaces")
    assert (most, set(late.split())) == ("pid time", {"pid", "time", "mount", "network", "ipc", "uts"})
    assert set(row_of(explanation, "execute").namespaces.split()) == {
        "pid", "time", "mount", "network", "ipc", "uts", "cgroup",
    }  # fmt: skip
    hook = row_of(explanation, "parent_hooks")
    assert (hook.process, hook.source) == (PARENT, "hooks.createRuntime")
    assert hook.calls == ('execve("/bin/hook", ["hook", "x"]) in a child, killed after 5 s',)


def test_a_joined_namespace_is_shown_by_its_path() -> None:
    spec = rich_spec()
    spec["linux"]["namespaces"][1] = {"type": "network", "path": "/run/netns/pod"}
    spec["linux"]["namespaces"][0] = {"type": "pid", "path": "/run/pidns/pod"}
    explanation = explain(spec)
    assert row_of(explanation, "join_pid").calls == ('setns("/run/pidns/pod", CLONE_NEWPID)',)
    assert row_of(explanation, "clone").calls == ("clone3(flags=0, exit_signal=SIGCHLD)",)
    assert "network=/run/netns/pod" in row_of(explanation, "execute").namespaces


def test_a_user_namespace_is_entered_before_the_pid_namespace_is_made() -> None:
    spec = rich_spec()
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"] |= {"uidMappings": USERS, "gidMappings": USERS}
    explanation = explain(spec)
    entry = row_of(explanation, "enter_user_namespace")
    assert "user" not in entry.namespaces and "pid" not in entry.namespaces
    assert any("CLONE_NEWPID" in line for line in entry.calls)
    assert {"user", "pid"} <= set(row_of(explanation, "make_working_directory").namespaces.split())


def test_the_cgroup_is_made_before_all() -> None:
    spec = rich_spec()
    spec["linux"] |= {
        "cgroupsPath": "/pod/box",
        "resources": {"memory": {"limit": 1 << 26}, "devices": [{"allow": False, "access": "rwm"}]},
    }
    rows = explain(spec).rows
    assert [row.step for row in rows[:4]] == ["make_cgroup", "limit_cgroup", "limit_devices", "clone"]
    assert any("/pod/box/memory." in line and '"67108864"' in line for line in rows[1].calls)
    assert rows[2].calls[0] == "device rule: deny a *:* rwm"


def test_a_scope_of_systemds_is_where_systemd_makes_it() -> None:
    spec = rich_spec()
    spec["linux"]["cgroupsPath"] = "kube.slice:crio:box"
    assert explain(spec).rows[0].calls[0].endswith('/kube.slice/crio-box.scope", 0755)')


def test_the_command_knows_the_group_that_run_gives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Named by the id, where the configuration names none."""
    (tmp_path / "config.json").write_text(json.dumps(rich_spec()))
    assert oci.command(["explain", str(tmp_path)]) == 0
    text = capfd.readouterr().out
    assert "assumed: the container's id is ID" in text and '/ID", 0755)' in text and "make_cgroup" in text
    assert oci.command(["--systemd-cgroup", "explain", "--id", "box7", str(tmp_path)]) == 0
    assert '/system.slice/crio-oci-box7.scope", 0755)' in capfd.readouterr().out
    assert oci.command(["--cgroup-manager", "disabled", "explain", str(tmp_path)]) == 0
    assert "make_cgroup" not in capfd.readouterr().out
    assert oci.command(["explain", "--id", ".x", str(tmp_path)]) == 1
    spec = rich_spec()
    spec["linux"]["resources"] = {"cpu": {"cpus": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    assert oci.command(["explain", str(tmp_path)]) == 1
    assert "linux.resources.cpu.cpus" in capfd.readouterr().err


def test_rows_are_numbered_and_serialise() -> None:
    explanation = explain(rich_spec())
    assert [row.number for row in explanation.rows] == list(range(1, len(explanation.rows) + 1))
    assert json.loads(json.dumps(explanation.to_dict()))["steps"][0]["step"] == "clone"


def test_a_wrong_config_is_refused() -> None:
    spec = rich_spec()
    spec["mounts"][0]["destination"] = "/proc/self"
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]\.destination"):
        explain(spec)


def test_nothing_is_done(tmp_path: Path) -> None:
    """Not even where the bundle is: no root file system has to be there."""
    (tmp_path / "config.json").write_text(json.dumps(rich_spec()))
    before = os.listdir(tmp_path)
    assert oci.command(["explain", str(tmp_path)]) == 0
    assert os.listdir(tmp_path) == before


def test_the_command_names_the_root_below_the_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(rich_spec()))
    assert oci.command(["explain", str(tmp_path), "--id", "box7"]) == 0
    text = capfd.readouterr().out
    assert f'open_tree("{tmp_path}/rootfs"' in text and '"_ses.box7"' in text
    assert "by init, in namespaces: pid time" in text and "asked for by mounts[5]" in text
    assert oci.command(["explain", "--json", str(tmp_path / "config.json")]) == 0
    assert json.loads(capfd.readouterr().out)["assumptions"]


@pytest.mark.skipif(hierarchy().mode != "hybrid", reason="the guides show a hybrid host's")
@pytest.mark.parametrize("guide", ["README.md", "docs/isolation.md"])
def test_what_the_guides_show_is_printed(guide: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Line by line, as far as a line goes; the bundle is the one that `spec` makes."""
    assert oci.command(["spec", "--bundle", str(tmp_path)]) == 0
    oci.command(["explain", str(tmp_path)])
    printed = [line.strip() for line in capfd.readouterr().out.splitlines()]
    shown = (Path(__file__).parents[2] / guide).read_text().partition("$ crio-oci explain ")[2]
    lines = re.split(r"\n\s*(?:\$|```)", shown)[0].splitlines()[1:]
    for line in (line.strip() for line in lines if line.strip() not in ("...", "…")):
        assert any(found.startswith(line.removesuffix(", ...")) for found in printed), line


def test_control_characters_of_a_config_do_not_reach_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = rich_spec()
    spec["mounts"].append({"destination": "/\x1b[2Jx", "type": "tmpfs", "source": "\x9b31m"})
    spec["process"]["env"].append("A\x1b]0;x=1")
    (tmp_path / "config.json").write_text(json.dumps(spec))
    oci.command(["explain", str(tmp_path)])
    shown = capfd.readouterr().out
    assert "\x1b" not in shown and "\x9b" not in shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "is not JSON"),
        (b" " * (state.MAX_CONFIG + 1), "at most"),
        (json.dumps({}).encode("utf-16"), "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": NaN}', "NaN is not a number in JSON"),
    ],
)
def test_a_file_that_is_no_config(
    tmp_path: Path, content: bytes, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `run` refuses it."""
    (tmp_path / "config.json").write_bytes(content)
    assert oci.command(["explain", str(tmp_path)]) == 1
    assert oci.command(["diff", str(tmp_path), str(tmp_path)]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first == second and words in first and str(tmp_path / "config.json") in first and "(got '')" not in first


def test_a_bundle_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert oci.command(["explain", str(tmp_path / "none")]) == 1
    assert "config.json cannot be read: no such file" in capfd.readouterr().err


def test_a_fifo_keeps_nobody_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert oci.command(["explain", str(tmp_path)]) == oci.command(["explain", str(tmp_path / "config.json")]) == 1
    writer = os.open(tmp_path / "config.json", os.O_RDWR)
    assert oci.command(["diff", str(tmp_path), str(tmp_path)]) == 2
    os.close(writer)
    assert capfd.readouterr().err.count("is not JSON") == 3
