"""Fetching what the guest boots from: Debian packages, downloaded once and unpacked into a cache; nothing is installed.

The cache is ``$XDG_CACHE_HOME/crio-native/vm`` (``~/.cache`` without the variable); deleting it is safe.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("user-mode-linux", "kmod", "apparmor")


class RigUnavailable(Exception):
    """This machine cannot boot the guest; the message says why and what would help."""


@dataclass(frozen=True)
class Rig:
    """Where the unpacked files are: the kernel program, a modprobe for its modules, and the packages' own tree."""

    kernel: Path
    modprobe: Path
    tree: Path


def rig() -> Rig:
    """The files of the rig, fetched if they are not there yet.  Raises RigUnavailable."""
    if platform.machine() != "x86_64":
        raise RigUnavailable(f"user-mode-linux exists for x86_64 only, this is {platform.machine()}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crio-native" / "vm"
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / "tree"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            _fetch(cache, tree)
    return Rig(kernel=tree / "usr/bin/linux.uml", modprobe=tree / "modprobe", tree=tree)


def _fetch(cache: Path, tree: Path) -> None:
    """Make tree whole or not at all: it appears by a rename when everything is in it."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise RigUnavailable("apt-get and dpkg-deb are needed to fetch the guest's kernel")
    print(f"fetching {', '.join(PACKAGES)} into {cache} (once)", flush=True)
    partial = cache / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    # apt's own sandbox user cannot write below a home directory, and its warning about that helps nobody
    apt = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root"]
    if subprocess.run([*apt, "download", *PACKAGES], cwd=partial, capture_output=True).returncode:
        subprocess.run([*apt, "update"], capture_output=True)
        done = subprocess.run([*apt, "download", *PACKAGES], cwd=partial, capture_output=True, text=True)
        if done.returncode:
            raise RigUnavailable(f"apt-get download failed: {done.stderr.strip()}")
    for package in partial.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, partial], check=True)
        package.unlink()
    _add_modprobe(partial, tree)
    partial.rename(tree)


def _add_modprobe(partial: Path, tree: Path) -> None:
    """A modprobe that looks for modules here: the guest's root is the host's, whose /lib/modules are not for it."""
    version = next((partial / "usr/lib/uml/modules").iterdir()).name
    modules = partial / "modules/lib/modules"
    modules.mkdir(parents=True)
    (modules / version).symlink_to(tree / "usr/lib/uml/modules" / version)
    (partial / "kmod-modprobe").mkdir()
    (partial / "kmod-modprobe/modprobe").symlink_to(tree / "bin/kmod")
    script = partial / "modprobe"
    script.write_text(f'#!/bin/sh\nexec {tree}/kmod-modprobe/modprobe -d {tree}/modules "$@"\n')
    script.chmod(0o755)
