"""The names of pods and containers, their ids, and what may stand in them.

A name is what makes a repeated create the same create: CRI-O's and the kubelet's convention, with the attempt in it.
Who holds a name is the store's business.
"""

from __future__ import annotations

import re
import secrets

from crio_native.errors import InvalidArgument
from crio_native.pods.values import ContainerMetadata, PodMetadata

# Names end in file names, host names and log lines: no slash, no blank, no control character, and a bounded length.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,252}")
_ID = re.compile(r"[0-9a-f]{64}")


def new_id() -> str:
    """A new object's id: 64 hexadecimal digits."""
    return secrets.token_hex(32)


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def pod_name(metadata: PodMetadata) -> str:
    """Raises InvalidArgument naming the part that is missing or unfit."""
    for part in ("name", "namespace", "uid"):
        check_part(f"config.metadata.{part}", getattr(metadata, part))
    return f"k8s_{metadata.name}_{metadata.namespace}_{metadata.uid}_{metadata.attempt}"


def container_name(metadata: ContainerMetadata, pod: PodMetadata) -> str:
    """Raises InvalidArgument naming the part that is missing or unfit."""
    check_part("config.metadata.name", metadata.name)
    return f"k8s_{metadata.name}_{pod.name}_{pod.namespace}_{pod.uid}_{pod.attempt}_{metadata.attempt}"


def check_part(field: str, value: str) -> None:
    if _NAME.fullmatch(value) is None:
        raise InvalidArgument(
            field, value, "must be 1 to 253 letters, digits, '_', '.', ':' or '-', the first a letter or a digit"
        )
