"""The way in: which policy counts for an image, and what it says.

A namespace's own policy replaces the node's.  Policies are read each time, so that a change counts at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from crio_native.config.installed import installed
from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound, UntrustedImage
from crio_native.images.references import Reference
from crio_native.images.trust import policy, registries_d, rules
from crio_native.images.trust.policy import Rules
from crio_native.images.trust.rules import Accept, Reject
from crio_native.images.trust.signatures import Signature, Unmet

DEFAULT_POLICY = "/etc/containers/policy.json"
MAX_REASON = 1000  # characters
_NAMESPACE = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")

Fetch = Callable[[str, str], Iterable[Signature]]  # (kind, digest) -> its signatures


@dataclass(frozen=True, slots=True)
class Trust:
    """Where this node's policies are.

    policy: the node's, "" for the usual place or, where there is none, the program's own.  namespaces: a directory of
    NAMESPACE.json, "" for none.  registries_d: the directory of that name.
    """

    policy: str = ""
    namespaces: str = ""
    registries_d: str = registries_d.DIRECTORY

    def pulled(self, reference: Reference | None, namespace: str) -> Judgement:
        """What counts for an image of a registry, for a pod of a namespace.  reference: None for one without a name.

        Raises UntrustedImage where it is rejected unread; InvalidArgument, FailedPrecondition for the policy itself.
        """
        if reference is None:
            return self._judgement("docker", iter(()), None, "without a name", namespace)
        return self._judgement("docker", policy.of_reference(reference), reference, str(reference), namespace)

    def loaded(self, transport: str, path: str, tag: str, namespace: str) -> Judgement:
        """What counts for an image on this machine's disk.  Raises as `pulled`."""
        scopes = policy.of_file(transport, os.path.realpath(path), tag)
        return self._judgement(transport, scopes, None, f"{transport}:{path}{tag and ':' + tag}", namespace)

    def judges_use(self, namespace: str) -> bool:
        """Whether an image that is here is judged again when a container is made of it: where a policy is named that
        it may not have been pulled under."""
        return bool(self.policy or self._own(namespace))

    def _judgement(
        self, transport: str, scopes: Iterator[str], reference: Reference | None, what: str, namespace: str
    ) -> Judgement:
        found = policy.load(self._own(namespace) or self._nodes()).find(transport, list(scopes))
        judgement = Judgement(what, reference, found)
        judgement.refuse_what_is_rejected()
        return judgement

    def _nodes(self) -> str:
        if self.policy:
            return self.policy
        if os.path.lexists(DEFAULT_POLICY):
            return DEFAULT_POLICY
        try:
            return str(installed("policy.json"))
        except NotFound:
            raise FailedPrecondition(
                f"there is no trust policy: write {DEFAULT_POLICY}, or name another file as signature_policy"
            ) from None

    def _own(self, namespace: str) -> str:
        """The policy of a namespace, "" for none."""
        if not self.namespaces or not namespace:
            return ""
        if not _NAMESPACE.fullmatch(namespace):  # a path is made of it, and without its policy it must not go on
            raise InvalidArgument("sandbox_config.metadata.namespace", namespace, "not a namespace's name")
        path = os.path.join(self.namespaces, f"{namespace}.json")
        return path if os.path.lexists(path) else ""


@dataclass(slots=True)
class Judgement:
    """The requirements for one image.  what: the image in words.  reference: None for one without a name."""

    what: str
    reference: Reference | None
    found: Rules
    _fetch: Fetch = field(default=lambda kind, digest: ())
    _digests: Sequence[str] = ()
    _seen: dict[tuple[str, str], list[Signature]] = field(default_factory=dict)

    def refuse_what_is_rejected(self) -> None:
        """Before anybody is asked for anything."""
        for number, (rule, _) in enumerate(self.found.rules):
            if isinstance(rule, Reject):
                raise self._refusal(number, rule.why)

    def check(self, digests: Sequence[str], fetch: Fetch) -> str:
        """Judge; returns the fingerprint of the requirements.

        digests: of the image's manifest, and of the index that it was chosen from: a signature of either will do.
        Raises UntrustedImage, and what `fetch` raises.
        """
        self._digests, self._fetch = tuple(dict.fromkeys(digests)), fetch
        for number, (rule, _) in enumerate(self.found.rules):
            try:
                rule.check(self)
            except (Unmet, FailedPrecondition) as error:
                raise self._refusal(number, str(error)) from None
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Of the requirements with their keys; "" where they accept anything.  Raises UntrustedImage."""
        if all(isinstance(rule, Accept) for rule, _ in self.found.rules):
            return ""
        try:
            return rules.fingerprint(self.found.rules)
        except FailedPrecondition as error:
            raise UntrustedImage(f"image {self.what} cannot be judged by {self.found.where}: {error}") from None

    def signatures(self, kind: str) -> Iterator[tuple[str, Signature]]:
        """(a digest of the image's, a signature kept for it); fetched once, and only when asked for."""
        for digest in self._digests:
            if (kind, digest) not in self._seen:
                self._seen[kind, digest] = [*self._fetch(kind, digest)]
            yield from ((digest, signature) for signature in self._seen[kind, digest])

    def _refusal(self, number: int, why: str) -> UntrustedImage:
        rule = self.found.rules[number][0]
        # Reasons repeat what strangers wrote: it must neither fill a gRPC status nor a log, nor start lines in one.
        why = "".join(c if c.isprintable() else "?" for c in why[:MAX_REASON]) + ("..." if why[MAX_REASON:] else "")
        return UntrustedImage(f"image {self.what} is refused by {self.found.where}[{number}] ({rule.kind}): {why}")
