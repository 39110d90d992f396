"""AppArmor: whether the kernel has a container's profile, and the loading of our own.

Profiles are the node's: whoever names one has loaded it.  Only `crio-default`, which every container gets that asks for
nothing else, is brought along (`crio-default.apparmor`) and loaded when the first container needs it.  Which profile a
container gets is `spec_security`'s; the executor has the kernel apply it.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from crio_native.errors import FailedPrecondition, StepFailed

OWN = "crio-default"
_SOURCE = Path(__file__).with_name("crio-default.apparmor")
_LOADED = Path("/sys/kernel/security/apparmor/profiles")
_DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
_SECONDS = 30.0
_loading = threading.Lock()


def ensure(profile: str) -> None:
    """Have the kernel know the profile before anything is made that needs it.

    Raises FailedPrecondition for one that nobody has loaded, and where ours cannot be loaded.
    """
    if profile in ("", "unconfined") or _is_loaded(profile):
        return
    if profile != OWN:
        raise FailedPrecondition(
            f"AppArmor profile {profile!r} is not loaded on this node; load it with `apparmor_parser -r FILE`"
        )
    with _loading:
        if not _is_loaded(profile):
            _load_own()


def _is_loaded(name: str) -> bool:
    """Also of names that mean more than one profile, or one of another policy namespace: those the kernel judges."""
    if name.startswith(":") or "//&" in name:
        return True
    try:
        with _LOADED.open() as lines:
            return any(line.rpartition(" (")[0] == name for line in lines)
    except FileNotFoundError:
        return True  # securityfs is not mounted


def _load_own() -> None:
    from crio_native.network.process import run, text

    advice = f"or load {_SOURCE}, or set crio.runtime.apparmor_profile"
    parser = shutil.which("apparmor_parser") or shutil.which("apparmor_parser", path=_DIRECTORIES)
    if parser is None:
        raise FailedPrecondition(f"AppArmor profile {OWN!r} cannot be loaded: install apparmor_parser, {advice}")
    try:
        ended = run(
            "load_profile",
            parser,
            _SOURCE.read_bytes(),
            {"PATH": _DIRECTORIES},
            _SECONDS,
            arguments=["--replace", "--skip-cache"],
        )
    except StepFailed as error:
        raise FailedPrecondition(f"AppArmor profile {OWN!r} cannot be loaded: {error}; {advice}") from error
    if ended.code:
        raise FailedPrecondition(f"AppArmor profile {OWN!r} is refused: {text(ended.messages)}; {advice}")
