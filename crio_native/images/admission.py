"""Whether an image may come in, or be used: the trust policy's word, at the three moments when it counts.

Pulled images are judged before anything but their manifest is read, loaded ones likewise, and, where a policy is named
that it may not have been pulled under, an image is judged once more when a container is to be made of it.  How to judge
is `trust`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crio_native.errors import UntrustedImage
from crio_native.images import layouts, references
from crio_native.images.directories import Found
from crio_native.images.model import Image
from crio_native.images.records import Records
from crio_native.images.references import Reference
from crio_native.images.registry import Repository
from crio_native.images.sources import Sources
from crio_native.images.trust.fetching import FromRegistry, of_directory
from crio_native.images.trust.judging import Judgement
from crio_native.images.work import Stop

MIN_PREFIX = 12  # hex digits of an id; fewer are a name
PATIENCE = 60.0  # seconds that fetching signatures for a container may stand still

Check = Callable[[Sequence[str], Repository], str]  # (an image's digests, where its signatures are) -> a fingerprint


class Admission:
    """The policy's doorkeeper.  Without a trust policy in the sources' settings everything passes.

    What judges raises UntrustedImage; InvalidArgument and FailedPrecondition for the policy itself; and what fetching
    signatures raises.
    """

    def __init__(self, sources: Sources, records: Records) -> None:
        self._sources, self._records = sources, records

    def pulled(self, reference: Reference, namespace: str) -> Check:
        """Judge an image by its name alone, as far as that goes, and say how to judge its content."""
        trust = self._sources.settings.trust
        judgement = trust.pulled(reference, namespace) if trust else None
        return lambda digests, repository: self._judge(judgement, digests, repository)

    def loaded(self, image: Found, source: str, namespace: str) -> None:
        """Judge an image on this machine's disk."""
        if trust := self._sources.settings.trust:
            _, path, _ = layouts.split_source(source)
            judgement = trust.loaded(image.transport, path, image.tag, namespace)
            beside = path if image.transport == "dir" else ""
            judgement.check(image.digests, lambda kind, digest: (s for s in of_directory(beside) if s.kind == kind))

    def authorize(self, image: Image, name: str, namespace: str, stop: Stop) -> None:
        """Whether a pod of a namespace may use an image of the store, which it asked for by a name ("" if unknown).

        Signatures that have met the same requirements before are not fetched again.
        """
        trust = self._sources.settings.trust
        if trust is None or not trust.judges_use(namespace):
            return None
        refusals = []
        meant: Sequence[Reference | None] = self._meant(image, name) or [None]
        for reference in meant:
            try:
                return self._authorize(image, reference, trust.pulled(reference, namespace), namespace, stop)
            except UntrustedImage as error:
                refusals.append(error)
        raise refusals[0]

    def _authorize(
        self, image: Image, reference: Reference | None, judgement: Judgement, namespace: str, stop: Stop
    ) -> None:
        if reference is None:
            judgement.check((image.manifest_digest,), lambda kind, digest: ())
            return
        met = judgement.fingerprint()
        if not met or self._records.judged(image.id, str(reference), met):
            return
        of_name = [key.partition("@")[2] for key in image.digests if key.startswith(f"{reference.name}@")]

        def use(repository: Repository, origin: str) -> str:
            return self._judge(judgement, (image.manifest_digest, *of_name), repository)

        self.remember(image, reference, self._sources.pull(str(reference), stop, lambda _: use, namespace=namespace))

    def remember(self, image: Image, reference: Reference, met: str) -> None:
        """That an image has met requirements, given by their fingerprint, under a name."""
        if met:
            self._records.judge(image.id, str(reference), met)

    def _judge(self, judgement: Judgement | None, digests: Sequence[str], repository: Repository) -> str:
        trust = self._sources.settings.trust
        if judgement is None or trust is None:
            return ""
        directory = trust.registries_d
        return judgement.check(digests, lambda kind, digest: FromRegistry(repository, directory)(kind, digest))

    def _meant(self, image: Image, name: str) -> Sequence[Reference]:
        """The complete names that an image was asked for by; an id alone means any that it has.

        Raises UntrustedImage for a name that it has not: the asker would choose the rule that judges it.
        """
        known = [references.parse(key) for key in (*image.names, *image.digests)]
        digits = name.removeprefix("sha256:")
        is_id = len(digits) >= MIN_PREFIX and image.id.removeprefix("sha256:").startswith(digits)
        if not name or is_id:
            return known
        asked = self._sources.names(name)
        here = {reference.name for reference in known}
        meant = [reference for reference in asked if reference.name in here]
        if not meant:
            raise UntrustedImage(
                f"image {image.id} was asked for as {asked[0] if asked else name}, and has no such name"
            )
        return meant
