"""Loading the configuration: what files mean together, what is refused and where, what is warned about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.config import Config, Loaded, RuntimeHandler, load
from crio_native.config.values import Device, Sysctl, Ulimit
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted

CRI_O_FILE = """\
[crio]
log_dir = "/var/log/crio/pods"
log_level = "info"
[crio.api]
listen = "/var/run/crio/crio.sock"
grpc_max_send_msg_size = 83886080
grpc_max_recv_msg_size = 83886080
[crio.runtime]
default_runtime = "runc"
conmon = "/usr/bin/conmon"
cgroup_manager = "systemd"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/bin/runc"
runtime_type = "oci"
[crio.image]
pause_image = "registry.k8s.io/pause:3.9"
[crio.network]
network_dir = "/etc/cni/net.d/"
plugin_dir = "/opt/cni/bin/"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "crio.conf"


def loaded(file: Path, text: str) -> Loaded:
    file.write_text(text)
    return load(file, _empty(file))


def _empty(file: Path) -> Path:
    directory = file.parent / "empty"
    directory.mkdir(exist_ok=True)
    return directory


def refused(file: Path, text: str) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        loaded(file, text)
    return caught.value


def test_a_file_of_cri_o_means_what_it_says(file: Path) -> None:
    result = loaded(file, CRI_O_FILE)
    config = result.config
    assert config.crio.log_dir == "/var/log/crio/pods"
    assert config.runtime.log_level == "info"
    assert config.api.listen == "/var/run/crio/crio.sock"
    assert (config.api.grpc_max_send_msg_size, config.api.grpc_max_recv_msg_size) == (80 << 20, 80 << 20)
    assert config.runtime.default_runtime == "runc"
    assert config.runtime.cgroup_manager == "systemd"
    handler = config.runtime.runtimes["runc"]
    assert (handler.runtime_type, handler.runtime_path) == ("oci", "/usr/bin/runc")
    assert (handler.monitor_path, handler.runtime_root) == ("/usr/bin/conmon", "/run/runc")
    assert config.runtime.runtimes["builtin"].monitor_path == ""  # its monitor is its own
    assert config.image.pause_image == "registry.k8s.io/pause:3.9"
    assert config.network.network_dir == "/etc/cni/net.d/"
    assert config.network.plugin_dirs == ("/opt/cni/bin/",)
    assert result.warnings == [
        f"{file}: crio.log_level: belongs to crio.runtime; taken as if it were there",
        f"{file}: crio.runtime.conmon: deprecated: use monitor_path of the handler",
        f"{file}: crio.network.plugin_dir: deprecated: use crio.network.plugin_dirs",
    ]
    assert result.files == [file]


def test_without_a_configuration_the_builtin_executor_runs_containers(file: Path) -> None:
    config = loaded(file, "").config
    assert config == Config()
    assert config.runtime.default_runtime == "builtin"
    assert config.runtime.runtimes == {"builtin": RuntimeHandler(runtime_type="builtin")}
    assert (config.crio.root, config.crio.runroot) == ("/var/lib/crio-native", "/run/crio-native")
    assert config.runtime.cgroup_manager == "cgroupfs"


def test_later_files_win_key_by_key_and_the_command_line_wins_over_all(file: Path, tmp_path: Path) -> None:
    file.write_text(
        '[crio.runtime]\nlog_level = "error"\npids_limit = 5\n[crio.runtime.runtimes.crun]\nno_sync_log = true\n'
    )
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "10-a.conf").write_text('[crio.runtime]\nlog_level = "warn"\ndefault_env = ["A=1", "B=2"]\n')
    (directory / "20-b.conf").write_text(
        '[crio.runtime]\ndefault_env = ["C=3"]\n[crio.runtime.runtimes.crun]\nruntime_path = "/x/crun"\n'
    )
    for ignored in (
        ".hidden.conf",
        "30.conf~",
        "#30.conf#",
        "30.conf.bak",
        "30.conf.dpkg-old",
        "30.conf.rpmsave",
        ".x.swp",
    ):
        (directory / ignored).write_text("not TOML at all")
    (directory / "40.d").mkdir()
    result = load(file, directory, {"crio.runtime.pids_limit": 7})
    runtime = result.config.runtime
    assert (runtime.log_level, runtime.default_env, runtime.pids_limit) == ("warn", ("C=3",), 7)
    assert (runtime.runtimes["crun"].no_sync_log, runtime.runtimes["crun"].runtime_path) == (True, "/x/crun")
    assert result.files == [file, directory / "10-a.conf", directory / "20-b.conf"]


def test_what_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"configuration file .*none\.conf"):
        load(tmp_path / "none.conf", tmp_path)
    with pytest.raises(NotFound, match="configuration directory"):
        load(Path(os.devnull), tmp_path / "none.d")
    assert load(Path(os.devnull), tmp_path).config == Config()


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("[crio.runtime]\npids_limit = 'x'", "crio.runtime.pids_limit", "an integer of at least -1, not a string"),
        ("[crio.runtime]\npids_limit = true", "crio.runtime.pids_limit", "not a boolean"),
        ("[crio.runtime]\npids_limit = -2", "crio.runtime.pids_limit", "out of range (got -2)"),
        ("[crio.runtime]\nread_only = 1", "crio.runtime.read_only", "must be true or false, not an integer"),
        ("[crio.runtime]\nlog_level = 'loud'", "crio.runtime.log_level", '"trace", "debug", "info"'),
        ("[crio.runtime]\ndefault_env = 'A=1'", "crio.runtime.default_env", "must be a list"),
        ("[crio.runtime]\ndefault_env = ['A=1', 5]", "crio.runtime.default_env[1]", "not an integer (got 5)"),
        ("[crio.runtime]\ndefault_env = ['1A']", "crio.runtime.default_env[0]", "NAME=value"),
        ("[crio.runtime]\ndefault_capabilities = ['ROOT']", "crio.runtime.default_capabilities[0]", "no such"),
        ("[crio.runtime]\ndefault_sysctls = ['net.a = 1']", "crio.runtime.default_sysctls[0]", "no spaces around"),
        ("[crio.runtime]\ndefault_sysctls = ['vm.swappiness=1']", "crio.runtime.default_sysctls[0]", "whole node"),
        ("[crio.runtime]\ndefault_ulimits = ['nofile=5:4']", "crio.runtime.default_ulimits[0]", "above the hard"),
        ("[crio.runtime]\nallowed_devices = ['/dev/../etc']", "crio.runtime.allowed_devices[0]", "below /dev"),
        ("[crio.runtime]\nadditional_devices = ['/dev/a:/dev/b:rwx']", "crio.runtime.additional_devices[0]", "r, w"),
        ("[crio.runtime]\ninfra_ctr_cpuset = '3-1'", "crio.runtime.infra_ctr_cpuset", "runs backwards"),
        ("[crio.runtime]\ntimezone = '../../etc/shadow'", "crio.runtime.timezone", "time zone"),
        ("[crio.runtime]\nlog_filter = '('", "crio.runtime.log_filter", "regular expression"),
        ("[crio.runtime]\nnamespaces_dir = 'run'", "crio.runtime.namespaces_dir", "it is not absolute (got 'run')"),
        ("[crio.runtime]\nnamespaces_dir = ''", "crio.runtime.namespaces_dir", "an absolute path"),
        ("[crio]\nroot = '/a/../b'", "crio.root", "'..' part"),
        ('[crio]\nroot = "/a\\nb"', "crio.root", "control character"),
        (f"[crio]\nroot = '/{'a' * 5000}'", "crio.root", "longer than 4096"),
        (f"[crio.api]\nlisten = '/{'a' * 107}'", "crio.api.listen", "at most 107 bytes"),
        ("[crio.api]\nstream_port = '65536'", "crio.api.stream_port", "not a port"),
        ("[crio.api]\nstream_port = 10", "crio.api.stream_port", "in quotes"),
        ("[crio.api]\nstream_idle_timeout = '5 minutes'", "crio.api.stream_idle_timeout", "1m30s"),
        (
            "[crio.runtime.runtimes.x]\ncontainer_min_memory = 'much'",
            "crio.runtime.runtimes.x.container_min_memory",
            "12 MiB",
        ),
        ("[crio.runtime.runtimes.x]\nruntime_type = 'wasm'", "crio.runtime.runtimes.x.runtime_type", '"builtin"'),
        ("[crio.runtime.runtimes.x]\nruntime_type = 'pod'", "crio.runtime.runtimes.x.runtime_type", 'use "builtin"'),
        (
            "[crio.runtime.runtimes.x.default_annotations]\na = 1",
            "crio.runtime.runtimes.x.default_annotations.a",
            "string",
        ),
        ("[crio.runtime.runtimes.'a b']", "crio.runtime.runtimes.a b", "letters, digits"),
        ("[crio.runtime.runtimes]\nx = 1", "crio.runtime.runtimes.x", "must be a table"),
        ("[crio.runtime]\nruntimes = 1", "crio.runtime.runtimes", "must be a table"),
        ("crio = 1", "crio", "must be a table"),
        ("[crio]\nlog_level = 'loud'", "crio.runtime.log_level", "must be one of"),
        ("[crio]\nrunroot = '/var/lib/crio-native/'", "crio.runroot", "must differ from crio.root"),
        ("[crio.api]\nstream_enable_tls = true", "crio.api.stream_enable_tls", "stream_tls_cert"),
        ("[crio.metrics]\nmetrics_key = '/k'", "crio.metrics.metrics_key", "metrics_cert"),
        ("[crio.runtime.runtimes.x]\nruntime_config_path = '/c'", "crio.runtime.runtimes.x.runtime_config_path", "vm"),
        (
            "[crio.runtime]\ncgroup_manager = 'cgroupfs'\n[crio.runtime.runtimes.x]\nmonitor_cgroup = 'a.slice'",
            "crio.runtime.runtimes.x.monitor_cgroup",
            "with cgroup_manager cgroupfs",
        ),
        (
            "[crio.runtime]\ncgroup_manager = 'systemd'\n[crio.runtime.runtimes.x]\nmonitor_cgroup = 'conmon'",
            "crio.runtime.runtimes.x.monitor_cgroup",
            "systemd slice",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_value_and_what_is_allowed(
    file: Path, text: str, key: str, said: str
) -> None:
    error = refused(file, text)
    assert error.field == f"{file}: {key}"
    assert said in str(error)


def test_a_missing_default_handler_is_named_with_the_nearest_one(file: Path) -> None:
    error = refused(file, "[crio.runtime]\ndefault_runtime = 'rnuc'\n[crio.runtime.runtimes.runc]\n")
    assert error.field == f"{file}: crio.runtime.default_runtime"
    assert "did you mean runc?" in str(error)
    assert "builtin" in str(refused(file, "[crio.runtime]\ndefault_runtime = 'kata'"))


def test_a_deprecated_key_at_its_default_is_no_news(file: Path) -> None:
    text = "[crio]\ninternal_wipe = {}\n[crio.runtime]\npids_limit = {}\nconmon_env = {}\n"
    assert loaded(file, text.format("true", -1, "[]")).warnings == []
    assert len(loaded(file, text.format("false", 1, "['A=1']")).warnings) == 3


@pytest.mark.parametrize("name", ["crun", "runc"])
def test_cri_os_handlers_need_no_table_to_be_the_default(file: Path, name: str) -> None:
    text = f"[crio.runtime]\ndefault_runtime = '{name}'\n"
    settings = loaded(file, text).config.runtime
    assert settings.runtimes[name] == RuntimeHandler(runtime_root=f"/run/{name}")
    assert sorted(settings.runtimes) == ["builtin", name]
    given = loaded(file, f"{text}[crio.runtime.runtimes.{name}]\nruntime_path = '/x'\n").config.runtime.runtimes[name]
    assert given.runtime_path == "/x"


def test_an_empty_least_memory_is_the_default(file: Path) -> None:
    handler = loaded(file, "[crio.runtime.runtimes.x]\ncontainer_min_memory = ''\n").config.runtime.runtimes["x"]
    assert handler.container_min_memory == RuntimeHandler().container_min_memory


def test_an_error_names_the_file_that_the_value_came_from(file: Path, tmp_path: Path) -> None:
    file.write_text("[crio.runtime]\ndefault_runtime = 'builtin'")
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "99.conf").write_text("[crio.runtime]\ndefault_runtime = 'kata'")
    with pytest.raises(InvalidArgument, match=r"99\.conf: crio\.runtime\.default_runtime"):
        load(file, directory)
    with pytest.raises(InvalidArgument, match=r"command line: crio\.runtime\.default_runtime"):
        load(file, directory, {"crio.runtime.default_runtime": "gvisor"})


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("[crio]\nroot = \n", "2:8"),
        ("[crio\n", "1:6"),
        ("[crio]\nroot = '/a'\nroot = '/b'\n", "3:12"),
        ("[crio]\nroot = '/a", "2:11"),
        ("a = " + "[" * 50_000, ""),
    ],
)
def test_a_syntax_error_has_line_and_column(file: Path, text: str, position: str) -> None:
    error = refused(file, text)
    assert error.field == (f"{file}:{position}" if position else str(file))
    assert "is not TOML" in str(error) or "nested too deeply" in str(error)


def test_files_that_are_no_text_files_are_refused(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"[crio]\n# caf\xe9\n")
    with pytest.raises(InvalidArgument, match=r"crio\.conf:2:6: is not UTF-8"):
        load(file, _empty(file))
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ResourceExhausted, match="larger than"):
        load(file, _empty(file))
    with pytest.raises(FailedPrecondition, match="Is a directory"):
        load(tmp_path, _empty(file))
    pipe = tmp_path / "pipe.d" / "10.conf"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(FailedPrecondition, match="is not a regular file"):  # and does not wait for a writer
        load(Path(os.devnull), pipe.parent)
    pipe.unlink()
    pipe.symlink_to(tmp_path / "gone")
    with pytest.raises(FailedPrecondition, match="No such file"):
        load(Path(os.devnull), pipe.parent)


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    for number in range(257):
        (tmp_path / f"{number}.conf").touch()
    with pytest.raises(ResourceExhausted, match="more than 256"):
        load(Path(os.devnull), tmp_path)


def test_unknown_keys_are_warned_about_with_the_nearest_known_one(file: Path) -> None:
    text = """
        [crio.runtime]
        manage_ns_lifecycle = true
        pid_limit = 1
        [crio.api]
        cgroup_manger = "x"
        [crio.nettwork]
        a = 1
        [other]
        """
    assert loaded(file, text).warnings == [
        f"{file}: crio.runtime.manage_ns_lifecycle: unknown key, ignored",
        f"{file}: crio.runtime.pid_limit: unknown key, ignored; did you mean crio.runtime.pids_limit?",
        f"{file}: crio.api.cgroup_manger: unknown key, ignored; did you mean crio.runtime.cgroup_manager?",
        f"{file}: crio.nettwork: unknown key, ignored; did you mean crio.network?",
        f"{file}: other: unknown key, ignored",
    ]


def test_warnings_are_bounded_and_stay_on_their_line(file: Path) -> None:
    result = loaded(file, "[crio]\n" + "".join(f"unknown_key_{number} = 1\n" for number in range(30_000)))
    assert len(result.warnings) == 101
    assert result.warnings[-1] == "and 29900 more warnings"
    (line,) = loaded(file, '[crio]\n"a\\nb" = 1').warnings
    assert "\n" not in line


def test_values_are_parsed_at_the_door(file: Path) -> None:
    runtime = loaded(
        file,
        """
        [crio.runtime]
        default_sysctls = ["net.ipv4.ping_group_range=0 2147483647", "net/ipv4/conf/eth0.1/forwarding=1"]
        default_ulimits = ["nofile=1024:2048", "core=-1"]
        additional_devices = ["/dev/a", "/dev/a:/dev/b", "/dev/a:r", "/dev/a:/dev/b:rw"]
        default_capabilities = ["net_raw", "CAP_SYS_ADMIN"]
        uid_mappings = "0:100000:65536,65536:1:1"
        [crio.runtime.runtimes.crun]
        container_min_memory = "500KiB"
        """,
    ).config.runtime
    assert runtime.default_sysctls == (
        Sysctl("net.ipv4.ping_group_range", "0 2147483647"),
        Sysctl("net.ipv4.conf.eth0/1.forwarding", "1"),
    )
    assert runtime.default_ulimits == (Ulimit("nofile", 1024, 2048), Ulimit("core", -1, -1))
    assert runtime.additional_devices == (
        Device("/dev/a", "/dev/a", "rwm"),
        Device("/dev/a", "/dev/b", "rwm"),
        Device("/dev/a", "/dev/a", "r"),
        Device("/dev/a", "/dev/b", "rw"),
    )
    assert runtime.default_capabilities == ("CAP_NET_RAW", "CAP_SYS_ADMIN")
    assert [tuple(mapping) for mapping in runtime.uid_mappings] == [(0, 100000, 65536), (65536, 1, 1)]
    assert runtime.runtimes["crun"].container_min_memory == 500 << 10


def test_small_timeouts_are_raised_as_cri_o_does(file: Path) -> None:
    result = loaded(
        file, "[crio.runtime]\nctr_stop_timeout = 3\n[crio.runtime.runtimes.x]\ncontainer_create_timeout = 1"
    )
    assert result.config.runtime.ctr_stop_timeout == 30
    assert result.config.runtime.runtimes["x"].container_create_timeout == 30
    assert [line.partition(": ")[2] for line in result.warnings] == [
        "crio.runtime.ctr_stop_timeout: 3 is raised to 30, the least that is used",
        "crio.runtime.runtimes.x.container_create_timeout: 1 is raised to 30, the least that is used",
    ]


def test_internal_wipe_says_who_wipes_instead(file: Path) -> None:
    result = loaded(file, "[crio]\ninternal_wipe = false\n")
    assert result.config.crio.internal_wipe is False
    assert "`crio-native wipe` does it, before the first start" in result.warnings[0]


def test_metrics_are_named_as_cri_os_files_name_them(file: Path) -> None:
    names = ["crio_operations_total", "container_runtime_crio_processes_defunct", "operations_total", "operations"]
    result = loaded(file, f"[crio.metrics]\nmetrics_collectors = {names}\n")
    assert result.config.metrics.metrics_collectors == ("operations_total", "processes_defunct")
    [warning] = result.warnings
    assert warning == f"{file}: crio.metrics.metrics_collectors: 'operations' is no metric here, ignored"


def test_deprecated_options_move_to_their_successors(file: Path) -> None:
    config = loaded(
        file,
        """
        [crio.runtime]
        conmon_cgroup = "pod"
        conmon_env = ["A=1"]
        enable_criu_support = false
        [crio.runtime.runtimes.own]
        monitor_path = "/own"
        monitor_env = ["B=2"]
        [crio.stats]
        stats_collection_period = 9
        [crio.network]
        plugin_dirs = ["/a"]
        plugin_dir = "/b"
        """,
    ).config
    own = config.runtime.runtimes["own"]
    assert (own.monitor_path, own.monitor_cgroup, own.monitor_env) == ("/own", "pod", ("B=2",))
    assert config.checkpoint_restore.container_level_enabled == "none"
    assert config.stats.collection_period == 9
    assert config.network.plugin_dirs == ("/a", "/b")


def test_a_handler_inherits_from_the_default_one(file: Path) -> None:
    text = """
        [crio.runtime]
        default_runtime = "crun"
        [crio.runtime.runtimes.crun]
        runtime_path = "/usr/bin/crun"
        [crio.runtime.runtimes.quiet]
        inherit_default_runtime = true
        no_sync_log = true
        """
    handler = loaded(file, text).config.runtime.runtimes["quiet"]
    assert (handler.runtime_path, handler.runtime_root, handler.no_sync_log) == ("/usr/bin/crun", "/run/crun", True)


def test_an_empty_table_makes_a_handler_and_the_builtin_one_keeps_its_type(file: Path) -> None:
    runtimes = loaded(
        file, "[crio.runtime.runtimes.crun]\n[crio.runtime.runtimes.builtin]\nno_sync_log = true"
    ).config.runtime.runtimes
    assert runtimes["crun"] == RuntimeHandler(runtime_root="/run/crun")
    assert runtimes["builtin"] == RuntimeHandler(runtime_type="builtin", no_sync_log=True)


def test_workloads_have_resources(file: Path) -> None:
    text = """
        [crio.runtime.workloads.m]
        activation_annotation = "a"
        [crio.runtime.workloads.m.resources]
        cpuset = "0-1"
        cpushares = 5
        """
    workload = loaded(file, text).config.runtime.workloads["m"]
    assert (workload.activation_annotation, workload.resources.cpuset, workload.resources.cpushares) == ("a", "0-1", 5)


def test_a_configuration_cannot_be_changed(file: Path) -> None:
    config = loaded(file, "").config
    with pytest.raises(AttributeError):
        config.crio.root = "/x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.runtime.runtimes["x"] = RuntimeHandler()  # type: ignore[index]


@given(st.binary(max_size=200) | st.text(alphabet="[]crio.untme=\"\n= {}#\\'", max_size=200).map(str.encode))
def test_any_file_is_loaded_or_refused_but_nothing_else_happens(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    directory.mkdir(exist_ok=True)
    (directory / "10.conf").write_bytes(data)
    try:
        load(Path(os.devnull), directory)
    except CrioError:
        pass
