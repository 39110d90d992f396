"""`crio-native`, the command line: its flags follow the schema, its failures are one line, its start is light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from crio_native import __version__, foreign_storage
from crio_native.cli import flags, native
from crio_native.cli.scratch import ScratchDaemon
from crio_native.config import Config, load
from crio_native.config.render import to_toml

SCRIPT = [sys.executable, "-m", "crio_native.cli.native"]


@pytest.fixture(autouse=True)
def no_drop_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_CONFIG", os.devnull)
    monkeypatch.setenv("CONTAINER_CONFIG_DIR", str(tmp_path))


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(native.main, arguments)


def test_flags_win_over_files_and_have_cri_os_names(tmp_path: Path) -> None:
    file = tmp_path / "crio.conf.toml"
    file.write_text('[crio.runtime]\nlog_level = "error"\npids_limit = 3\n')
    given = ["--log-level", "debug", "--no-internal-repair", "--enable-metrics", "--metrics-port", "9537"]
    given += ["--default-env", "A=1,B=2", "--default-env", "C=3", "--cni-config-dir", "/net.d", "-r", "/state"]
    given += ["--pull-progress-timeout", "10s", "--listen", "/run/x.sock", "--insecure-registry", "localhost:5000"]
    result = invoke("-c", str(file), "-d", str(tmp_path / "."), *given, "config", "--changed")
    # The directory holds the same file: what the flags say must win over both readings.
    assert result.exit_code == 0, result.output
    printed = tmp_path / "printed"
    printed.mkdir()
    (printed / "10.conf").write_text(result.stdout)
    config = load(Path(os.devnull), printed).config
    assert (config.runtime.log_level, config.runtime.pids_limit) == ("debug", 3)
    assert (config.crio.internal_repair, config.metrics.enable_metrics, config.metrics.metrics_port) == (
        False,
        True,
        9537,
    )
    assert config.runtime.default_env == ("A=1", "B=2", "C=3")
    assert (config.network.network_dir, config.crio.root, config.api.listen) == ("/net.d", "/state", "/run/x.sock")
    assert (config.image.pull_progress_timeout, config.image.insecure_registries) == (10.0, ("localhost:5000",))


def test_the_environment_stands_between_files_and_flags() -> None:
    assert 'log_level = "warn"' in invoke("config", "--changed", CONTAINER_LOG_LEVEL="warn").stdout
    both = invoke("--log-level", "trace", "config", "--changed", CONTAINER_LOG_LEVEL="warn").stdout
    assert 'log_level = "trace"' in both


def test_a_wrong_value_of_the_environment_names_its_variable() -> None:
    result = invoke("config", CONTAINER_LOG_LEVEL="loud")
    assert result.exit_code == 1
    assert "Error: CONTAINER_LOG_LEVEL: crio.runtime.log_level: must be one of" in result.stderr
    assert "command line" in invoke("--log-level", "louder", "config", CONTAINER_LOG_LEVEL="loud").stderr
    result = invoke("config", CONTAINER_RUNROOT="/same", CONTAINER_ROOT="/same")
    assert "Error: CONTAINER_RUNROOT: crio.runroot: must differ from crio.root" in result.stderr


def test_every_option_outside_named_tables_has_one_flag() -> None:
    keys = [key for key, _ in flags.all_options()]
    spelt = [flag for parameter in native.main.params for flag in parameter.opts]
    assert len(spelt) == len(set(spelt))
    for key in keys:
        assert key.replace(".", "__") in {parameter.name for parameter in native.main.params}
    assert len(keys) > 100


def test_flags_stand_before_or_behind_the_verb(tmp_path: Path) -> None:
    file = tmp_path / ".other"
    file.write_text("[crio.runtime]\npids_limit = 3\n")
    assert "none' not found" in invoke("-d", "/etc", "config", "--config-dir", str(tmp_path / "none")).stderr
    line = ["-d", str(tmp_path / "."), "-l", "debug", "config", "--changed", "-c", str(file), "-l", "warn"]
    printed = invoke(*line, CONTAINER_LOG_LEVEL="error")
    assert printed.stdout == '[crio.runtime]\nlog_level = "warn"\npids_limit = 3\n', printed.output
    wrong = invoke("config", "--log-level", "loud", CONTAINER_LOG_LEVEL="error")
    assert "Error: command line: crio.runtime.log_level" in wrong.stderr


@pytest.mark.root
def test_serve_takes_the_flags_too() -> None:
    for arguments in (["--config", "/none.conf", "serve"], ["serve", "--config", "/none.conf"]):
        assert invoke(*arguments).stderr == "Error: configuration file '/none.conf' not found\n"


def test_boolean_flags_take_the_values_of_go() -> None:
    """As /etc/sysconfig/crio has them."""
    for true, false in (("true", "false"), ("1", "0"), ("T", "f")):
        line = [f"--enable-metrics={true}", f"--drop-infra-ctr={false}", "config", f"--changed={true}"]
        printed = invoke(*line, f"--read-only={true}", f"--default={false}").stdout
        assert printed.split("\n\n")[0] == "[crio.runtime]\nread_only = true\ndrop_infra_ctr = false"
        assert printed.endswith("[crio.metrics]\nenable_metrics = true\n")
    result = invoke("--enable-metrics=maybe", "config")
    assert (result.exit_code, result.stderr) == (2, "Error: --enable-metrics: must be true or false (got 'maybe')\n")


def test_flags_that_only_cri_os_program_has_are_taken_with_a_warning() -> None:
    line = ["--log", "/none/log", "--log-format=json", "--runtimes", "a:/b", "--profile=true", "--profile-port", "1"]
    result = invoke(*line, "config", "--changed")
    assert (result.exit_code, result.stdout) == (0, "\n")
    assert [words.split()[3] for words in result.stderr.splitlines()] == [
        "--log",
        "--log-format",
        "--runtimes",
        "--profile",
        "--profile-port",
    ]
    assert "[crio.runtime.runtimes.NAME]" in result.stderr


def test_the_manual_names_the_flags_that_are_not_their_keys() -> None:
    manual = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    for key, option in flags.all_options():
        if option.flag:
            assert f"| `{key}` | `--{option.flag}` |" in manual
    for name in flags.WITHOUT_EFFECT:
        assert f"`--{name}`" in manual


def test_config_prints_what_is_in_force_or_the_defaults() -> None:
    assert invoke("--log-level", "debug", "config", "--default").stdout == to_toml(Config())
    assert '\nlog_level = "debug"\n' in invoke("--log-level", "debug", "config").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--log-level", "loud", "config"], "Error: command line: crio.runtime.log_level: must be one of"),
        (["--pids-limit", "many", "config"], "Invalid value for '--pids-limit'"),
        (["--default-runtime", "kata", "config"], "must be a handler of crio.runtime.runtimes: builtin"),
        (["-c", "/none.conf", "config"], "Error: configuration file '/none.conf' not found"),
        (["--log-levle", "info", "config"], "'--log-level'?)"),
        (["status", "--socket", "/none.sock"], "Error: the daemon on /none.sock did not answer"),
    ],
)
def test_failures_are_one_line(arguments: list[str], line: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert line in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", ["config", "version", "--help"])
def test_an_output_that_cannot_be_written_is_one_line(verb: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*SCRIPT, verb], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: no space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_the_null_device(closed: str) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *SCRIPT, "config"]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_warnings_go_to_stderr_beside_the_output(tmp_path: Path) -> None:
    (tmp_path / "10.conf").write_text("[crio]\nrooot = 1\n")
    result = invoke("config", "--changed")
    assert "did you mean crio.root?" in result.stderr
    assert "rooot" not in result.stdout


def started(capsys: pytest.CaptureFixture[str], **overrides: str) -> str:
    """What a start says of these options."""
    given = {f"crio.{name.replace('__', '.')}": value for name, value in overrides.items()}
    native.Source(Path(os.devnull), Path(os.environ["CONTAINER_CONFIG_DIR"]), given, {}).load_to_serve()
    return capsys.readouterr().err


def test_a_start_warns_of_what_only_some_pods_will_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs" / "pods"
    assert started(capsys, log_dir=str(logs)) == "" and not logs.parent.exists()
    assert "command line: crio.log_dir: '/proc/x' cannot be made or written: " in started(capsys, log_dir="/proc/x")
    said = started(capsys, log_dir=str(logs), image__global_auth_file="/nope")
    assert said.startswith("warning: command line: crio.image.global_auth_file: '/nope' cannot be read: images are")


def test_a_start_warns_of_a_disk_that_was_meant_for_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".storage.conf"
    monkeypatch.setattr(foreign_storage, "CONFIGURATION", file)
    ours = {"log_dir": str(tmp_path), "root": f"{tmp_path}/not/there"}
    for graphroot, warned in (("/proc/x", True), (f"{tmp_path}/x", False), ("relative", False)):
        file.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{graphroot}"\n')
        said = started(capsys, **ours)
        assert (f"storage.graphroot: {graphroot!r} is on another disk" in said) == warned == bool(said)
    file.write_text("not TOML")
    assert started(capsys, **ours) == ""


def test_version() -> None:
    assert json.loads(invoke("version", "--json").stdout)["version"] == __version__
    assert __version__ in invoke("--version").stdout
    assert __version__ in invoke("version").stdout


@pytest.mark.root
@pytest.mark.parametrize("verb", [[], ["serve"], ["check"]], ids=["alone", "serve", "check"])
def test_who_is_not_root_is_told_in_one_line(verb: list[str]) -> None:
    def become_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    done = subprocess.run([*SCRIPT, *verb], preexec_fn=become_nobody, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: must run as root: it makes namespaces, mounts and cgroups\n"


@pytest.mark.root
@pytest.mark.parametrize(
    ("goal", "words"),
    [
        *((goal, f"make {goal}: run it as root: it makes namespaces") for goal in ("run", "test", "bench")),
        ("build", "build belongs to root: run this as that user, or in a clone of your own"),
    ],
)
def test_make_says_first_what_it_lacks(goal: str, words: str) -> None:
    """Before it installs anything."""
    line = ["make", "-C", str(Path(__file__).parents[2]), goal]
    done = subprocess.run(line, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and words in done.stderr.splitlines()[0]


@pytest.mark.root
def test_check_finds_what_this_host_has_and_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet" / "there"
    done = subprocess.run([*SCRIPT, "--root", str(root), "check"], capture_output=True, text=True)
    assert "ok       kernel: " in done.stdout
    assert f"overlay: can be mounted on {tmp_path}" in done.stdout
    assert "ok       handler builtin: built in" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.root
def test_check_fails_when_something_needed_is_missing(tmp_path: Path) -> None:
    conf = tmp_path / "10.conf"
    conf.write_text('[crio.runtime]\ndefault_runtime = "x"\n[crio.runtime.runtimes.x]\nruntime_path = "/none/crun"\n')
    environment = os.environ | {"CRIO_NATIVE_MONITOR": "/none/monitor"}
    done = subprocess.run([*SCRIPT, "check"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "MISSING  handler x: there is no program /none/crun; set runtime_path" in done.stdout
    assert "MISSING  monitor: " in done.stdout


@pytest.mark.root
def test_check_refuses_what_a_start_refuses() -> None:
    wrong = {
        "--storage-driver=overlay": ("storage driver", "crio.storage_option[0]: no option"),
        "--storage-opt=overlay.none=1": ("storage driver", "overlay.none=1"),
        "--seccomp-profile=/none/profile": ("named files", "command line: crio.runtime.seccomp_profile: "),
        "--signature-policy=/none/policy": ("named files", "command line: crio.image.signature_policy: "),
        "--stream-address=203.0.113.9": ("streaming", "203.0.113.9"),
        "--metrics-host=203.0.113.9": ("metrics", "203.0.113.9"),
        "--blockio-config-file=/none/classes": ("block I/O classes", "/none/classes"),
    }
    done = subprocess.run([*SCRIPT, *_ELSEWHERE, *wrong, "check"], capture_output=True, text=True)
    assert done.returncode == 1
    for subject, words in wrong.values():
        assert re.search(f"^MISSING  {subject}: .*{re.escape(words)}", done.stdout, re.M), words
    done = subprocess.run([*SCRIPT, *_ELSEWHERE, "--storage-driver=btrfs", "check"], capture_output=True, text=True)
    assert done.returncode == 1 and "MISSING  storage driver: " in done.stdout and "to be on btrfs" in done.stdout


_ELSEWHERE = ("--root=/dev/shm/none", "--enable-metrics")  # a tmpfs: it is not btrfs, and no disk is waited for


def test_nothing_heavy_is_imported_before_the_daemon_runs() -> None:
    """The daemon starts its launchers before it has threads and before gRPC is there."""
    code = (
        "import sys, threading; from crio_native.cli import native; from crio_native import daemon\n"
        "native.Source(None, None, {}, {}).load()\n"
        "heavy = {'grpc', 'asyncio', 'rich', 'tomlkit', 'pyroute2', 'sqlite3', 'urllib3', 'crio_native.api'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 1\n"


@pytest.mark.root
def test_status_asks_the_running_daemon(tmp_path: Path) -> None:
    daemon = ScratchDaemon(Path("/var/tmp"))
    try:
        daemon.start()
        asked = [*SCRIPT, "-c", str(daemon.directory / "crio.conf"), "-d", str(tmp_path), "status"]
        told = subprocess.run(asked, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, "")
        assert "RuntimeReady: yes\nNetworkReady: yes\n" in told.stdout
        given = load(daemon.directory / "crio.conf", tmp_path).config
        (tmp_path / "10.conf").write_text(subprocess.run([*asked, "config"], capture_output=True, text=True).stdout)
        assert load(Path(os.devnull), tmp_path).config == given
        assert given.crio.root == f"{daemon.directory}/root"
    finally:
        assert daemon.close() == []
