"""Reading an operator's YAML (or JSON, which is a part of it) within bounds."""

from __future__ import annotations

from typing import Any

_DEPTH_MAX = 64


def load(data: bytes) -> Any:
    """The first document.  Raises ValueError for what is no YAML or nested too deeply."""
    import yaml  # only where such a file is

    try:
        # libyaml's constructor recurses in C without a bound, until the process dies; its parser does not recurse.
        depth = 0
        for event in yaml.parse(data, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _DEPTH_MAX:
                    raise ValueError(f"it is nested more than {_DEPTH_MAX} deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        return yaml.load(data, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from None
