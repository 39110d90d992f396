"""The files that the configuration names: one that cannot be used is refused at the start, and on a reload.

Else it would fail every container.  `config` itself looks at no host, since a configuration may be checked
on another machine than its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from crio_native.config import Config
from crio_native.config.loading import Loaded
from crio_native.errors import CrioError, InvalidArgument


def check(loaded: Loaded) -> None:
    """Raises the first of the problems."""
    for problem in problems(loaded):
        raise problem


def problems(loaded: Loaded) -> Iterator[InvalidArgument]:
    """Errors whose field is "FILE: KEY"."""
    for key, value, use in _named(loaded.config):
        if not value:
            continue
        try:
            use(value)
        except InvalidArgument as error:
            yield InvalidArgument(loaded.where(key), value, f"{error.field}: {error.reason}")
        except CrioError as error:
            yield InvalidArgument(loaded.where(key), value, str(error).removeprefix(f"{key}: "))


def warnings(loaded: Loaded) -> Iterator[str]:
    """What only some pods will miss."""
    credentials, logs = loaded.config.image.global_auth_file, loaded.config.crio.log_dir
    if credentials and not os.access(credentials, os.R_OK):
        key = loaded.where("crio.image.global_auth_file")
        yield f"{key}: {credentials!r} cannot be read: images are pulled without credentials until it can"
    if problem := _cannot_hold_directories(logs):
        yield f"{loaded.where('crio.log_dir')}: {logs!r} cannot be made or written: {problem}"


def _cannot_hold_directories(directory: str) -> str:
    """Why, as the nearest directory that exists tells; nothing is left in it."""
    while not os.path.lexists(directory):
        directory = os.path.dirname(directory)
    try:
        os.rmdir(tempfile.mkdtemp(dir=directory))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _named(config: Config) -> Iterator[tuple[str, str, Callable[[str], object]]]:
    """(key, value, what uses the value)."""
    from crio_native.images.trust import policy
    from crio_native.oci import seccomp_profile
    from crio_native.pods import spec_mounts

    runtime = config.runtime
    profiles = {
        "crio.runtime.seccomp_profile": runtime.seccomp_profile,
        "crio.runtime.privileged_seccomp_profile": runtime.privileged_seccomp_profile,
    }
    for name, handler in runtime.runtimes.items():
        profiles[f"crio.runtime.runtimes.{name}.seccomp_profile"] = handler.seccomp_profile
    for key, path in profiles.items():
        yield key, path, lambda path: seccomp_profile.load_profile(Path(path))
    yield "crio.runtime.timezone", runtime.timezone, lambda zone: spec_mounts.configured_mounts("", zone)
    file = runtime.default_mounts_file
    yield "crio.runtime.default_mounts_file", file, lambda file: spec_mounts.configured_mounts(file, "")
    yield "crio.image.signature_policy", config.image.signature_policy, policy.load
