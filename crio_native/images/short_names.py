"""Short names: what `busybox` or `team/app` means here (containers-registries.conf(5), "short-name aliasing").

Here belongs the choice of complete references, for a pull and for looking into the store; nothing here asks a registry.
"""

from __future__ import annotations

from crio_native.errors import InvalidArgument
from crio_native.images import references
from crio_native.images.references import Reference
from crio_native.images.registries_conf import Registries

LOCAL = "localhost"  # the registry of what was built or loaded here


def to_pull(text: str, registries: Registries, mode: str) -> tuple[Reference, ...]:
    """The references to try in turn.

    mode: "enforcing" refuses a name that several registries may mean; "permissive" tries them all where no alias
    decides; "disabled" does the same and uses no aliases.  Raises InvalidArgument, naming the candidates.
    """
    reference = references.parse(text, "image")
    if not references.is_short(text):
        return (reference,)
    if mode != "disabled" and (alias := _alias(text, registries)):
        return (alias,)
    found = _of_search(text, registries)
    if not found:
        raise InvalidArgument(
            "image",
            text,
            "a short name without an alias, and unqualified-search-registries names no registry: write it in full, "
            f"for example {reference}",
        )
    if len(found) > 1 and mode == "enforcing":
        names = ", ".join(map(str, found))
        raise InvalidArgument(
            "image",
            text,
            f"a short name that may mean any of {names}: write out the one that is meant, or make an alias of it "
            'under [aliases] in registries.conf.d (short-name-mode is "enforcing")',
        )
    return found


def to_look_up(text: str, registries: Registries) -> tuple[Reference, ...]:
    """The complete names under which an image of the store may be meant, the likeliest first.  Never ambiguous.

    Raises InvalidArgument for what is no reference.
    """
    reference = references.parse(text, "image")
    if not references.is_short(text):
        return (reference,)
    alias = _alias(text, registries)
    return tuple(
        dict.fromkeys(
            (
                *((alias,) if alias else ()),
                *_of_search(text, registries),
                references.parse(f"{LOCAL}/{text}"),
                reference,
            )
        )
    )


def _alias(text: str, registries: Registries) -> Reference | None:
    name = text.partition("@")[0].partition(":")[0]  # a short name has no port
    target = registries.aliases.get(name)
    return references.parse(target + text[len(name) :]) if target else None


def _of_search(text: str, registries: Registries) -> tuple[Reference, ...]:
    return tuple(references.parse(f"{registry}/{text}") for registry in registries.search)
