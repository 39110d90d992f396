"""SELinux labels: which parts come from whom, and that no two pods share a level."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crio_native.config.tables import RuntimeTable
from crio_native.errors import InvalidArgument, ResourceExhausted
from crio_native.linux import capabilities
from crio_native.pods import selinux
from crio_native.pods.host import Host
from crio_native.pods.records import Pod
from crio_native.pods.store import Store
from crio_native.pods.values import (
    ContainerSecurity,
    LinuxPodConfig,
    NamespaceMode,
    NamespaceOption,
    PodConfig,
    PodMetadata,
    PodSecurity,
    SELinuxOption,
)

HOST = Host(frozenset(capabilities.NAMES), -1000, False, True, "x86_64", "node")
SETTINGS = RuntimeTable()
LEVEL = "s0:c1,c2"
OWN_NAMESPACES = NamespaceOption()
XATTR = "security.selinux"


def config(
    options: SELinuxOption | None = None, privileged: bool = False, modes: NamespaceOption = OWN_NAMESPACES
) -> PodConfig:
    security = PodSecurity(namespace_options=modes, selinux_options=options, privileged=privileged)
    return PodConfig(metadata=PodMetadata("p", "u", "n"), linux=LinuxPodConfig(security_context=security))


def pod(number: int = 0, level: str = LEVEL, options: SELinuxOption | None = None) -> Pod:
    return Pod(f"{number:064x}", f"pod{number}", config(options), "builtin", 1, selinux_level=level)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


def test_levels_are_unique_released_and_survive(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = selinux.Levels(store)
    given = {levels.allot(f"{number:064x}") for number in range(300)}
    assert len(given) == 300
    first = next(iter(given))
    low, high = (int(part.removeprefix("c")) for part in first.removeprefix("s0:").split(","))
    assert 0 <= low < high < selinux.CATEGORIES
    monkeypatch.setattr(selinux, "CATEGORIES", 2)  # one pair is all there is
    small = selinux.Levels(store)
    only = pod(1, small.allot(f"{1:064x}"))
    assert only.selinux_level == "s0:c0,c1"
    store.insert(only)
    with pytest.raises(ResourceExhausted):
        small.allot("x")
    restarted = selinux.Levels(store)
    with pytest.raises(ResourceExhausted):
        restarted.allot("x")
    store.delete(only)
    assert restarted.allot("x") == "s0:c0,c1"
    restarted.release("x")
    assert restarted.allot("y") == "s0:c0,c1"


def test_a_pod_gets_a_level_where_it_is_confined(store: Store) -> None:
    levels = selinux.Levels(store)

    def level(of: PodConfig, settings: RuntimeTable = SETTINGS, host: Host = HOST) -> str:
        return selinux.level_of_pod(of, settings, host, levels, "x")

    assert level(config()).startswith("s0:c")
    assert level(config(SELinuxOption(level="s0:c5,c9"))) == "s0:c5,c9"
    assert level(config(), host=replace(HOST, selinux=False)) == ""
    assert level(config(privileged=True)) == ""
    node, of_nodes_network = NamespaceMode.NODE, NamespaceOption(network=NamespaceMode.NODE)
    for modes in (NamespaceOption(pid=node), NamespaceOption(ipc=node), of_nodes_network):
        assert level(config(modes=modes)) == ""
    assert level(config(modes=of_nodes_network), replace(SETTINGS, hostnetwork_disable_selinux=False)) != ""


def test_each_part_of_a_label_comes_from_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(of: Pod, options: SELinuxOption | None = None, **security: Any) -> selinux.Labels:
        return selinux.of_container(of, ContainerSecurity(selinux_options=options, **security), SETTINGS, HOST)

    found = labels(pod())
    assert found.process.endswith(f":container_t:{LEVEL}") and found.files.endswith(f":container_file_t:{LEVEL}")
    mine = labels(pod(options=SELinuxOption(type="pod_t", role="pod_r")), SELinuxOption(type="own_t", level="s0:c7,c8"))
    assert mine.process == "system_u:pod_r:own_t:s0:c7,c8" and mine.files.endswith(":s0:c7,c8")
    assert labels(pod(), privileged=True) == labels(pod(level="")) == selinux.Labels()
    assert labels(pod(level=""), SELinuxOption(type="own_t")).process.endswith(":own_t:s0")
    assert selinux.of_container(pod(), None, SETTINGS, HOST) == found
    without = replace(HOST, selinux=False)  # as charts ask on every host
    asked = ContainerSecurity(selinux_options=SELinuxOption(type="spc_t"))
    assert selinux.of_container(pod(), asked, SETTINGS, without) == selinux.Labels()


@pytest.mark.parametrize(
    "options",
    [
        SELinuxOption(type="a:b"),
        SELinuxOption(user="a b"),
        SELinuxOption(role='r"'),
        SELinuxOption(level="s0:c1\nx"),
        SELinuxOption(level="secret"),
    ],
)
def test_what_is_no_part_of_a_label_is_refused(options: SELinuxOption) -> None:
    with pytest.raises(InvalidArgument, match="selinux_options"):
        selinux.of_container(pod(), ContainerSecurity(selinux_options=options), SETTINGS, HOST)


def test_the_policys_own_names(tmp_path: Path) -> None:
    file = tmp_path / "lxc_contexts"
    assert selinux.Defaults.read(str(file)) == selinux.Defaults()
    file.write_text('process = "u:r:proc_t:s0"\nfile = "u:object_r:file_t:s0"\n')
    assert selinux.Defaults.read(str(file)) == selinux.Defaults("u:r:proc_t:s0", "u:object_r:file_t:s0")


@pytest.mark.root
def test_relabelling_a_tree_but_nothing_outside(tmp_path: Path) -> None:
    """The attribute is stored by a kernel without SELinux too."""
    (tmp_path / "volume/deep/er").mkdir(parents=True)
    (tmp_path / "outside").write_text("x")
    (tmp_path / "volume/file").write_text("x")
    (tmp_path / "volume/link").symlink_to(tmp_path / "outside")
    (tmp_path / "volume/loop").symlink_to(tmp_path / "volume")
    selinux.relabel(str(tmp_path / "volume"), "u:r:t:s0")

    def label(path: Path) -> bytes | None:
        names = os.listxattr(path, follow_symlinks=False)
        return os.getxattr(path, XATTR, follow_symlinks=False) if XATTR in names else None

    labelled = [tmp_path / "volume", *(tmp_path / "volume").rglob("*")]
    assert len(labelled) == 6 and {label(path) for path in labelled} == {b"u:r:t:s0\0"}
    assert label(tmp_path / "outside") is None
    (tmp_path / "volume/new").write_text("x")
    selinux.relabel(str(tmp_path / "volume"), "u:r:t:s0", trust_top=True)
    assert label(tmp_path / "volume/new") is None


@pytest.mark.parametrize("path", ["/", "/etc", "/usr/lib/x", "/var", "/proc/1"])
def test_the_hosts_own_directories_are_never_relabelled(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[3\]\.selinux_relabel"):
        selinux.check_relabel(path, "config.mounts[3]")
