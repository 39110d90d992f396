"""The least SELinux policy that keeps two containers apart, for a guest: types, categories and their dominance.

In CIL, as secilc(8) compiles it.  All that is not a container is kernel_t, which is permissive; what the policy does
not know (most of the kernel's classes) is allowed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

CATEGORIES = 1024
_FILE = "ioctl read write create getattr setattr lock relabelfrom relabelto append map unlink link rename open"
_SIDS = (
    "kernel security unlabeled fs file file_labels init any_socket port netif netmsg node igmp_packet icmp_socket "
    "tcp_socket sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net sysctl_net_unix sysctl_vm sysctl_dev kmod "
    "policy scmp_packet devnull"
).split()
_STORED = ("tmpfs", "overlay", "ext4")
_UNIFORM = ("proc", "hostfs", "sysfs", "cgroup2", "selinuxfs", "devpts")
_RULES = f"""
(handleunknown allow)
(mls true)
(policycap open_perms) (policycap nnp_nosuid_transition)
(class process2 (nnp_transition nosuid_transition))
(class process (fork transition sigchld sigkill signal dyntransition noatsecure siginh rlimitinh getattr))
(class file ({_FILE} execute execute_no_trans entrypoint mounton))
(class dir ({_FILE} add_name remove_name reparent search rmdir mounton))
(classorder (process process2 file dir))
(sensitivity s0) (sensitivityorder (s0)) (sensitivitycategory s0 (range c0 c{CATEGORIES - 1}))
(user system_u) (role system_r) (role object_r) (userrole system_u system_r) (userrole system_u object_r)
(type kernel_t) (type container_t) (type container_file_t) (typepermissive kernel_t)
(roletype system_r kernel_t) (roletype system_r container_t)
(roletype object_r kernel_t) (roletype object_r container_t) (roletype object_r container_file_t)
(level low (s0)) (level high (s0 (range c0 c{CATEGORIES - 1})))
(levelrange whole (low high)) (levelrange lowest (low low)) (userlevel system_u low) (userrange system_u whole)
(context subject (system_u system_r kernel_t lowest)) (context object (system_u object_r kernel_t lowest))
(allow kernel_t container_t (process (transition sigkill signal dyntransition siginh rlimitinh noatsecure getattr)))
(allow kernel_t container_t (process2 (nnp_transition nosuid_transition)))
(allow container_t self (process (fork sigchld sigkill signal getattr)))
(allow container_t self (file (read write getattr open)))
(allow container_t self (dir (read getattr search open)))
(allow container_t kernel_t (process (sigchld)))
(allow container_t kernel_t (file (ioctl read write getattr append map execute execute_no_trans entrypoint open)))
(allow container_t kernel_t (dir (ioctl read getattr search open)))
(allow container_t container_file_t (file (ioctl read write create getattr setattr append map unlink rename open)))
(allow container_t container_file_t (file (execute execute_no_trans entrypoint)))
(allow container_t container_file_t (dir (ioctl read write getattr add_name remove_name search open)))
(mlsconstrain (file (read write open)) (or (dom h1 h2) (eq t1 kernel_t)))
(mlsconstrain (dir (read write search)) (or (dom h1 h2) (eq t1 kernel_t)))
"""


def text() -> str:
    names = [f"c{number}" for number in range(CATEGORIES)]
    lines = [f"(category {name})" for name in names]
    lines += [f"(categoryorder ({' '.join(names)}))", _RULES]
    lines += [f"(sid {sid}) (sidcontext {sid} subject)" for sid in _SIDS]
    lines += [f"(sidorder ({' '.join(_SIDS)}))"]
    lines += [f"(fsuse xattr {name} object)" for name in _STORED]
    lines += [f"(genfscon {name} / object)" for name in _UNIFORM]
    return "\n".join(lines)


def load(directory: Path) -> None:
    """Compile the policy, load it into the kernel and enforce it; there is no way back."""
    if Path("/sys/fs/selinux/enforce").read_text() == "1":
        return  # by another module of this boot
    source, compiled = directory / "policy.cil", directory / "policy"
    source.write_text(text())
    subprocess.run(["secilc", "--output", compiled, "--filecontexts", "/dev/null", source], check=True)
    Path("/sys/fs/selinux/load").write_bytes(compiled.read_bytes())
    Path("/sys/fs/selinux/enforce").write_text("1")
