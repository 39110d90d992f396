"""signedIdentity: which names in a signature count for the name that an image is asked for by.

The name in a signature is a stranger's text until it has been parsed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from crio_native.errors import InvalidArgument
from crio_native.images import references
from crio_native.images.references import Reference
from crio_native.images.trust.documents import Fields


@dataclass(frozen=True, slots=True)
class Identity:
    """kind: the `type`.  reference: of the exact kinds, parsed.  prefix, signed_prefix: of remapIdentity."""

    kind: str = "matchRepoDigestOrExact"
    reference: Reference | None = None
    prefix: str = ""
    signed_prefix: str = ""

    def accepts(self, signed: str, asked: Reference | None) -> bool:
        """Whether a signature for the name `signed` is one for the image `asked`; None for one without a name."""
        try:
            theirs = references.parse(signed)
            ours = self._remapped(asked) if asked else None
        except InvalidArgument:
            return False
        # What the parser completed was not said: a signature of a repository alone is not one of its `latest`.
        has_tag = bool(theirs.tag) and _says_tag(signed)
        if self.kind == "exactReference":
            return self.reference == theirs and (has_tag or bool(theirs.digest))
        if self.kind == "exactRepository":
            assert self.reference
            return self.reference.name == theirs.name
        if ours is None or ours.name != theirs.name:
            return False
        if self.kind == "matchRepository" or (ours.digest and self.kind != "matchExact"):
            return True
        if ours.digest:  # its tag does not say which image is meant
            return theirs.digest == ours.digest and not has_tag
        return has_tag and not theirs.digest and theirs.tag == ours.tag

    def _remapped(self, asked: Reference) -> Reference:
        if self.kind != "remapIdentity" or not (asked.name + "/").startswith(self.prefix + "/"):
            return asked
        name = self.signed_prefix + asked.name[len(self.prefix) :]
        parsed = references.parse(name)
        return replace(asked, registry=parsed.registry, repository=parsed.repository)


def _says_tag(text: str) -> bool:
    return ":" in text.partition("@")[0].rpartition("/")[2]


def parse(fields: Fields) -> Identity:
    """A signedIdentity.  Raises InvalidArgument."""
    kind = fields.text("type")
    made = Identity(kind)
    if kind == "exactReference":
        where, text = fields.path("dockerReference"), fields.text("dockerReference")
        made = Identity(kind, references.parse(text, where))
        if not _says_tag(text) and "@" not in text:
            raise InvalidArgument(where, text, "has neither a tag nor a digest")
    elif kind == "exactRepository":
        where, text = fields.path("dockerRepository"), fields.text("dockerRepository")
        made = Identity(kind, references.parse(text, where))
        if _says_tag(text) or "@" in text:
            raise InvalidArgument(where, text, "has a tag or a digest, and would be a repository")
    elif kind == "remapIdentity":
        made = Identity(kind, None, _prefix(fields, "prefix"), _prefix(fields, "signedPrefix"))
    elif kind not in ("matchExact", "matchRepoDigestOrExact", "matchRepository"):
        raise InvalidArgument(
            fields.path("type"),
            kind,
            "not one of matchExact, matchRepoDigestOrExact, matchRepository, exactReference, exactRepository, "
            "remapIdentity",
        )
    fields.done(f"an identity of the type {kind}")
    return made


def _prefix(fields: Fields, key: str) -> str:
    where, text = fields.path(key), fields.text(key)
    if not references.is_location(text):
        raise InvalidArgument(where, text, "not HOST[:PORT][/NAMESPACE], without tag and digest")
    return text
