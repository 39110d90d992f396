"""CNI plugins that are bad, pods that go all the same, and a daemon that is killed at any point."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    StepFailed,
    Unavailable,
)
from crio_native.network import PortMapping
from crio_native.network.cni.protocol import PluginFailed

from ..waiting import wait_for
from .cni_lab import DEBIAN, SHORT, Lab, processes_of
from .network_lab import Namespace, Server, ask, on_a_node
from .network_lab import links as link_names
from .pod_lab import Pod

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package containernetworking-plugins"),
]

PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
DUAL = ("10.55.0.0/24", "fd55::/64")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# Bad plugins.

BAD = {
    "prints nothing": ("true", StepFailed, "ended well but printed no result"),
    "prints nonsense": ("echo '<html>'", StepFailed, "what it printed is not JSON .*<html>"),
    "prints megabytes": ("yes x", StepFailed, "printed more than 1048576 bytes, and was killed"),
    "prints deep JSON": ("printf '[%.0s' $(seq 100000)", StepFailed, "is not JSON"),
    "prints a list": ("echo '[]'", StepFailed, "its result is wrong: it must be an object"),
    "has no address": ("echo '{\"ips\":[]}'", StepFailed, "its result has no address for the pod"),
    "has a wrong address": (
        """echo '{"ips":[{"address":"10.0.0.300/8"}]}'""",
        StepFailed,
        r"its result is wrong: ips\[0\]: '10.0.0.300",
    ),
    "has a wrong index": (
        """echo '{"ips":[{"address":"10.0.0.3/8","interface":7}]}'""",
        StepFailed,
        r"ips\[0\]\.interface: 7 is no index of one of 0",
    ),
    "fails without words": ("exit 3", StepFailed, "ended with status 3 and printed no error object"),
    "fails on stderr": ("echo it hurts >&2; exit 1", StepFailed, "it said: it hurts"),
    "fails in megabytes": ("yes pain | head -c 5000000 >&2; exit 1", StepFailed, "pain pain"),
    "fails with nonsense": ("echo '{\"code\":true}'; exit 1", StepFailed, "printed no error object"),
    "fails with an error": (
        """echo '{"cniVersion":"1.0.0","code":7,"msg":"bad subnet","details":"it is 3"}'; exit 1""",
        StepFailed,
        "code 7: invalid network configuration: bad subnet: it is 3",
    ),
    "asks to try again": ('echo \'{"code":11,"msg":"busy"}\'; exit 1', Unavailable, "code 11: try again later: busy"),
    "dies": ("kill -SEGV $$", StepFailed, "was ended by signal 11"),
    "hangs": ("sleep 1000", DeadlineExceeded, r"did not end within [12]\.\d s and was killed"),
    "hangs in a child": ("(sleep 1000) & sleep 1000", DeadlineExceeded, "did not end within"),
    "hangs and ignores": ("trap '' TERM INT HUP; echo wait >&2; sleep 1000", DeadlineExceeded, "it had said: wait"),
}


@pytest.mark.parametrize("what", BAD)
@on_a_node
def test_a_bad_plugin_is_told_and_undone(lab: Lab, what: str) -> None:
    """The first plugin makes something, the second is bad; DEL reaches both, the last first."""
    body, kind, words = BAD[what]
    lab.shell("good", 'echo "$ok"; case $CNI_COMMAND in ADD) cat >"$here/made";; DEL) rm "$here/made";; esac')
    lab.shell("bad", f'if [ "$CNI_COMMAND" = DEL ]; then exit 0; fi\n{body}\n')
    lab.write({"type": "good"}, {"type": "bad"})
    network = lab.opened(limits=SHORT)
    began = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        Pod(network, lab.directory, "a")
    assert time.monotonic() - began < 4
    assert len(str(caught.value)) < 1500 and "plugins[1]" in str(caught.value)
    assert lab.called() == ["ADD sandbox-a", "ADD sandbox-a", "DEL sandbox-a", "DEL sandbox-a"]
    assert not (lab.programs / "made").exists()
    assert lab.results() == {} and network.attachment("sandbox-a") is None
    assert processes_of(lab.directory) == []
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_an_answer_that_comes_late_but_in_time(lab: Lab) -> None:
    lab.shell("slow", '[ "$CNI_COMMAND" = ADD ] && sleep 1; echo "$ok"')
    lab.write({"type": "slow"})
    network = lab.opened(limits=SHORT)
    with Pod(network, lab.directory, "a") as a:
        assert a.attachment.ips == ("10.1.2.3",)
    network.shutdown(remove=True)


@on_a_node
def test_a_child_that_keeps_the_output_open_does_not_hold_the_call(lab: Lab) -> None:
    lab.shell("daemon", 'echo "$ok"; sleep 5 &')
    lab.write({"type": "daemon"})
    network = lab.opened()
    began = time.monotonic()
    with Pod(network, lab.directory, "a") as a:
        assert a.attachment.ips == ("10.1.2.3",) and time.monotonic() - began < 3
    network.shutdown(remove=True)


@pytest.mark.parametrize(
    ("version", "kind", "words"),
    [
        ("[ $CNI_COMMAND = VERSION ] && exit 1\n", PluginFailed, "cni VERSION own.*ended with status 1"),
        ("[ $CNI_COMMAND = VERSION ] && exit 0\n", PluginFailed, "does not tell the versions that it knows"),
        ("[ $CNI_COMMAND = VERSION ] && echo '{\"supportedVersions\":7}' && exit 0\n", PluginFailed, "does not tell"),
        ("[ $CNI_COMMAND = VERSION ] && sleep 1000\n", DeadlineExceeded, "cni VERSION own.*did not end within"),
        (
            '[ $CNI_COMMAND = VERSION ] && echo \'{"supportedVersions":["0.2.0","9.0"]}\' && exit 0\n',
            FailedPrecondition,
            r"cniVersion 1\.0\.0 does not serve: 'own' knows 0\.2\.0, 9\.0",
        ),
    ],
)
@on_a_node
def test_a_plugin_that_lacks_a_version(lab: Lab, version: str, kind: type[CrioError], words: str) -> None:
    lab.shell("own", 'echo "$ok"', version=version)
    lab.write({"type": "own"})
    network = lab.opened(limits=SHORT)
    with pytest.raises(kind, match=words):
        Pod(network, lab.directory, "a")
    assert lab.called() == [], "it is never asked to ADD"
    wait_for(lambda: network.status()[1].find("told their state") < 0)
    ready, reason = network.status()
    assert not ready and ("VERSION own" in reason or "does not serve" in reason)
    network.shutdown()


@on_a_node
def test_a_plugin_that_is_no_program(lab: Lab) -> None:
    lab.shell("own", 'echo "$ok"')
    lab.write({"type": "own"})
    network = lab.opened()
    (lab.programs / "own").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(StepFailed, match=r"cni VERSION own.*ENOEXEC.*cannot be executed"):
        Pod(network, lab.directory, "a")
    network.shutdown()


# DEL always ends.


@on_a_node
def test_a_pod_goes_while_its_plugin_fails_and_the_plugin_hears_of_it_later(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crio_native.network.pod_network.FIRST_PAUSE", 0.2)
    monkeypatch.setattr("crio_native.network.cni.chores.FIRST_PAUSE", 0.2)
    lab.shell("own", '[ "$CNI_COMMAND" = DEL ] && [ -e "$here/broken" ] && exit 1; echo "$ok"')
    lab.write({"type": "own"}, PORTMAP)
    network = lab.opened()
    (lab.programs / "broken").touch()
    pod = Pod(network, lab.directory, "a", ports=[PortMapping(8080, 80)])
    network.teardown("sandbox-a")
    network.teardown("sandbox-a")
    pod.close()
    assert network.attachment("sandbox-a") is None and len(lab.results()) == 1
    with Pod(network, lab.directory, "b", ports=[PortMapping(8080, 80)]):
        wait_for(lambda: lab.called().count("DEL sandbox-a") >= 3)
        (lab.programs / "broken").unlink()
        wait_for(lambda: list(lab.results()) == ["test-sandbox-b-eth0"])
    assert network.shutdown(remove=True)


@on_a_node
def test_a_plugin_that_hangs_in_del_holds_the_pod_for_its_time_only(lab: Lab) -> None:
    lab.shell("own", '[ "$CNI_COMMAND" = DEL ] && sleep 1000; echo "$ok"')
    lab.write({"type": "own"})
    network = lab.opened(limits=SHORT)
    pod = Pod(network, lab.directory, "a")
    began = time.monotonic()
    network.teardown("sandbox-a")
    assert 1.5 < time.monotonic() - began < 4
    assert processes_of(lab.directory) == [] and network.attachment("sandbox-a") is None
    pod.close()
    network.shutdown()


@on_a_node
def test_all_plugins_get_their_del_when_one_fails(lab: Lab) -> None:
    for name in ("first", "second", "third"):
        lab.shell(name, f'[ "$CNI_COMMAND" = DEL ] && [ {name} = second ] && sleep 1000; echo "$ok"')
    lab.write({"type": "first"}, {"type": "second"}, {"type": "third"})
    network = lab.opened(limits=SHORT)
    pod = Pod(network, lab.directory, "a")
    network.teardown("sandbox-a")
    assert lab.called().count("DEL sandbox-a") == 3
    pod.close()
    network.shutdown()


@on_a_node
def test_del_after_the_namespace_the_plugin_and_the_list_are_gone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crio_native.network.cni.chores.FIRST_PAUSE", 0.2)
    monkeypatch.setattr("crio_native.network.pod_network.FIRST_PAUSE", 0.2)
    lab.debian()
    lab.write({"type": "ptp", "ipam": lab.ipam(*DUAL)})
    network = lab.opened()
    pods = [Pod(network, lab.directory, name) for name in "ab"]
    for pod in pods:
        pod.close()
    network.teardown("sandbox-a")
    assert lab.leased() == {"10.55.0.3", "fd55::3"}, "the namespace is gone, the addresses are free all the same"
    (lab.network_dir / "10-test.conflist").unlink()
    (lab.programs / "ptp").unlink()
    network.teardown("sandbox-b")
    assert network.attachment("sandbox-b") is None and len(lab.results()) == 1
    (lab.programs / "ptp").symlink_to(DEBIAN / "ptp")
    wait_for(lambda: lab.results() == {})
    assert lab.leased() == set()
    network.shutdown(remove=True)


@on_a_node
def test_a_container_that_a_plugin_does_not_know_is_detached(lab: Lab) -> None:
    lab.shell("own", """[ "$CNI_COMMAND" = DEL ] && echo '{"code":3,"msg":"who?"}' && exit 1; echo "$ok" """)
    lab.write({"type": "own"})
    network = lab.opened()
    pod = Pod(network, lab.directory, "a")
    network.teardown("sandbox-a")
    assert lab.results() == {}
    pod.close()
    network.shutdown()


# Starts.


@on_a_node
def test_a_new_daemon_detaches_what_is_gone_and_keeps_the_rest(lab: Lab) -> None:
    lab.debian()
    lab.delegating("meta")
    inner = {"cniVersion": "1.0.0", "type": "ptp", "ipam": lab.ipam(*DUAL)}
    lab.write({"type": "meta", "delegate": inner}, PORTMAP, cniVersion="1.1.0")
    network = lab.opened()
    pods = [Pod(network, lab.directory, name, ports=[PortMapping(8080 + n, 80)]) for n, name in enumerate("ab")]
    network.shutdown()
    network = lab.open()
    network.collect({"sandbox-a"})
    wait_for(lambda: lab.calls("CHECK") != [])
    assert list(lab.results()) == ["test-sandbox-a-eth0"] and lab.leased() == {"10.55.0.2", "fd55::2"}
    (collected,) = lab.calls("GC")[1:]
    assert collected["config"]["cni.dev/valid-attachments"] == [{"containerID": "sandbox-a", "ifname": "eth0"}]
    assert collected["env"]["CNI_CONTAINERID"] is None
    with Server(pods[0], "0.0.0.0", 80, "web"):
        assert ask("127.0.0.1", 8080)[0] == "web"
    assert network.attachment("sandbox-b") is None
    network.teardown("sandbox-a")
    for pod in pods:
        pod.close()
    assert network.shutdown(remove=True)


@on_a_node
def test_a_reboot_gives_the_programs_addresses_back(lab: Lab) -> None:
    """The runtime directory is empty then, and no namespace and no rule is left."""
    lab.debian()
    lab.write({"type": "ptp", "ipam": lab.ipam(*DUAL)})
    network = lab.opened()
    pod = Pod(network, lab.directory, "a")
    network.shutdown()
    pod.close()
    subprocess.run(["rm", "-r", str(lab.directory / "state")], check=True)
    network = lab.open()
    assert network.attachment("sandbox-a") is None
    network.collect(())
    wait_for(lambda: lab.results() == {})
    assert lab.leased() == set()
    network.shutdown()


KILLED = """
import socket, sys
from pathlib import Path
from crio_native.network import PodNetwork
directory, netns, fd = sys.argv[1:]
root = Path(directory)
network = PodNetwork.from_directory(network_dir=root / "net.d", plugin_dirs=[str(root / "bin")],
                                    state_dir=root / "state", cache_dir=root / "cni")
network.collect(())
network.setup("sandbox-a", socket.socket(fileno=int(fd)), netns_path=Path(netns), name="", namespace="", uid="")
"""


@on_a_node
def test_what_a_killed_daemon_had_started_ends_before_its_del(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crio_native.network.cni.chores.FIRST_PAUSE", 0.2)
    lab.shell(
        "slow", 'if [ "$CNI_COMMAND" = ADD ]; then touch "$here/began"; sleep 2; touch "$here/ended"; fi; echo "$ok"'
    )
    lab.write({"type": "slow"})
    with Namespace(lab.directory, "a") as pod:
        fd = pod.netlink.fileno()
        arguments = [sys.executable, "-c", KILLED, str(lab.directory), str(pod.path), str(fd)]
        daemon = subprocess.Popen(arguments, pass_fds=[fd])
        wait_for((lab.programs / "began").exists)
        daemon.send_signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        network = lab.open()
        began = time.monotonic()
        network.collect(())
        assert time.monotonic() - began < 0.5, "a start waits for no plugin"
        wait_for(lambda: "DEL sandbox-a" in lab.called())
        assert (lab.programs / "ended").exists(), "its ADD still ran, and would have made things after the DEL"
        wait_for(lambda: lab.results() == {})
        network.shutdown()


POINTS = """
import os, signal, socket, sys
from pathlib import Path
from crio_native.network import PodNetwork, PortMapping, links
from crio_native.network.bridges import Bridges
from crio_native.network.cni.attachment import Attachments
from crio_native.network.cni.plugins import Plugins
from crio_native.network.records import Records
from crio_native.network.rules import Rules

directory, netns, fd, point, place, number = sys.argv[1:]
left = int(number)
owner, name = globals()[place.partition(".")[0]], place.partition(".")[2]
real = getattr(owner, name)

def killing(*args, **kwargs):
    global left
    left -= 1
    if left == 0 and point == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killing)
root = Path(directory)
network = PodNetwork.from_directory(network_dir=root / "net.d", plugin_dirs=[str(root / "bin")],
                                    state_dir=root / "state", cache_dir=root / "cni")
network.collect(())
network.setup("sandbox-a", socket.socket(fileno=int(fd)), netns_path=Path(netns), name="", namespace="", uid="",
              port_mappings=[PortMapping(8080, 80)])
network.teardown("sandbox-a")
"""
# (what, the how-manieth call of it): in the order in which a pod's set-up and teardown come to them.
PLACES = [
    ("Records.attach", 1),
    ("Rules.prepare", 1),
    ("Attachments.put", 1),
    ("Plugins._run", 1),
    ("Plugins._run", 2),
    ("Attachments.put", 2),
    ("Records.replace", 1),
    ("Rules.map_ports", 1),
    ("Plugins._run", 3),
    ("Plugins._run", 4),
    ("Attachments.remove", 1),
    ("Rules.release", 1),
]


@pytest.mark.parametrize("first", ["cni-bridge", "bridge"])
@pytest.mark.parametrize(("place", "number"), PLACES, ids=[f"{place}-{number}" for place, number in PLACES])
@on_a_node
def test_kill_9_at_any_point_leaves_nothing_after_the_next_start(lab: Lab, first: str, place: str, number: int) -> None:
    """A program and another one after it; or the built-in bridge and two programs."""
    lab.debian(cni_bridge="bridge")
    ipam = lab.ipam("10.55.0.0/24")
    if first == "bridge":
        del ipam["dataDir"]
    one = {"type": first, "bridge": "br9", "isGateway": True, "hairpinMode": True, "ipam": ipam}
    more = [{"type": "tuning", "sysctl": {}}] * (2 if first == "bridge" else 1)
    lab.write(one, *more, PORTMAP)
    for point in ("before", "after"):
        with Namespace(lab.directory, f"a-{point}") as pod:
            fd = pod.netlink.fileno()
            arguments = [str(lab.directory), str(pod.path), str(fd), point, place, str(number)]
            killed = subprocess.run([sys.executable, "-c", POINTS, *arguments], pass_fds=[fd], check=False)
            assert killed.returncode == -signal.SIGKILL
        network = lab.open()
        network.collect(())
        wait_for(lambda: lab.results() == {})
        assert network.attachment("sandbox-a") is None and lab.leased() == set()
        wait_for(lambda: link_names() <= {"lo", "br9"})
        with (
            Pod(network, lab.directory, "b", ports=[PortMapping(8080, 80)]) as other,
            Server(other, "0.0.0.0", 80, "web"),
        ):
            assert ask("127.0.0.1", 8080)[0] == "web"
        assert network.shutdown(remove=True)


@on_a_node
def test_damaged_records_are_set_aside(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.shell("own", 'echo "$ok"')
    lab.write({"type": "own"})
    network = lab.opened()
    pod = Pod(network, lab.directory, "good")
    network.shutdown()
    results = lab.directory / "cni/results"
    for name, text in (("a", ""), ("b", "{}"), ("c", "[" * 100_000), (".half", "x")):
        (results / name).write_text(text)
    network = lab.opened()
    assert sorted(path.name for path in results.iterdir()) == [
        "a.damaged",
        "b.damaged",
        "c.damaged",
        "test-sandbox-good-eth0",
    ]
    assert sum("is damaged, and is now" in message for message in caplog.messages) == 3
    network.teardown(pod.id)
    pod.close()
    network.shutdown()
