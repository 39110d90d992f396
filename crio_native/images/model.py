"""The values that cross the border of this room.  Plain data, no behaviour worth a test of its own but `Platform`'s."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the store.

    id: "sha256:" and the config's digest.  names: complete, "docker.io/library/busybox:latest".  digests:
    "repository@digest" of each index and manifest it was pulled by.  size: bytes on disk.  config: the image config
    (image-spec, config.md), checked.  layers: diff ids, lowest first.
    """

    id: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    config: Mapping[str, Any]
    manifest_digest: str
    layers: tuple[str, ...]
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who we are at a registry: a user's name and password, or one of two kinds of token.

    identity_token: exchanged for access tokens (OAuth 2's refresh token).  registry_token: sent as it is (Bearer).
    server: the registry that they are for, "" where the caller does not say.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    server: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one layer is.  digest: the blob's.  current, total: bytes as transferred.

    stage: "fetch" while it comes (unpacking goes on at the same time), "done", or "exists" for one already here.
    """

    digest: str
    current: int
    total: int
    stage: Literal["fetch", "done", "exists"]


@dataclass(frozen=True, slots=True)
class FsUsage:
    """What the images take.  mountpoint: the store's directory.  timestamp: ns since the epoch."""

    mountpoint: str
    bytes: int
    inodes: int
    timestamp: int


ARCHITECTURES = frozenset(
    "386 amd64 arm arm64 armbe arm64be loong64 mips mips64 mips64le mips64p32 mips64p32le mipsle ppc ppc64 ppc64le "
    "riscv riscv64 s390 s390x sparc sparc64 unknown wasm".split()
)  # as the image-spec takes them from Go

# What x86-64's levels ask of a CPU, each beside those below (x86-64 psABI, table 3.1), in the words of /proc/cpuinfo.
_AMD64_LEVELS = {
    "v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
    "v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}

# uname's machine -> (architecture, the best variant that it runs)
_MACHINES = {
    "x86_64": ("amd64", "v1"),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
}


@functools.cache
def _amd64_level() -> str:
    """The best level that this CPU has."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        flags = set()
    level = "v1"
    for name, needed in _AMD64_LEVELS.items():
        if not flags.issuperset(needed.split()):
            break
        level = name
    return level


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a CPU, in the words of the image-spec (image-index.md).  variant: "" for the default."""

    architecture: str
    os: str = "linux"
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @classmethod
    def host(cls) -> Platform:
        """This machine's."""
        machine = os.uname().machine
        architecture, variant = _MACHINES.get(machine, (machine, ""))
        return cls(architecture, variant=_amd64_level() if architecture == "amd64" else variant)

    def preference(self, offered: Platform) -> int | None:
        """How well an offered platform suits this one: 0 is best, None is not at all."""
        if (offered.os, offered.architecture) != (self.os, self.architecture):
            return None
        accepted = self._variants()
        return accepted.index(offered.variant) if offered.variant in accepted else None

    def _variants(self) -> list[str]:
        """Acceptable variants, best first; an image that names none fits any CPU of its architecture."""
        number = self.variant.removeprefix("v")
        if not number.isdigit() or len(number) > 2:
            return [self.variant, ""] if self.variant else ["", "v1", "v8"]
        lowest = {"arm": 5, "arm64": 8, "amd64": 1}.get(self.architecture, int(number))
        return [f"v{level}" for level in range(int(number), lowest - 1, -1)] + [""]
