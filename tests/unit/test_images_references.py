"""Names of images: what they stand for, and what is refused."""

from __future__ import annotations

import pytest

from crio_native.errors import InvalidArgument
from crio_native.images.references import is_loopback, parse

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("user/app", "docker.io/user/app:latest"),
        ("index.docker.io/app", "docker.io/library/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ("localhost/a/b/c", "localhost/a/b/c:latest"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("127.0.0.1:5000/a_b__c-d.e:T_1", "127.0.0.1:5000/a_b__c-d.e:T_1"),
        ("[::1]:5000/a:1", "[::1]:5000/a:1"),
        ("Host/app", "Host/app:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"quay.io/x/y:v1@{DIGEST}", f"quay.io/x/y:v1@{DIGEST}"),
        ("a@sha512:" + "f" * 128, "docker.io/library/a@sha512:" + "f" * 128),
    ],
)
def test_a_reference_is_completed(text: str, complete: str) -> None:
    assert str(parse(text)) == complete
    assert parse(complete) == parse(text)


def test_a_digest_says_what_is_wanted_and_a_tag_else() -> None:
    assert parse(f"a:v1@{DIGEST}").wanted == DIGEST
    assert parse("a").wanted == "latest"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "1 to 1024 characters"),
        ("a" * 1025, "1 to 1024 characters"),
        ("Busybox", "repository 'library/Busybox'"),
        ("busybox:", "tag ''"),
        ("busybox:a b", "tag 'a b'"),
        ("busybox:" + "t" * 129, "tag 'ttt"),
        ("busybox@sha256:123", "not a digest"),
        ("busybox@sha256:" + "A" * 64, "not a digest"),
        ("busybox@md5:" + "0" * 32, "not a digest"),
        ("busybox@", "not a digest"),
        ("a//b", "repository"),
        ("../../etc/passwd", "registry's host name"),
        ("a/../b", "repository"),
        ("/etc/passwd", "repository"),
        ("-a.b/c", "registry's host name"),
        ("host:99999/a", "registry's host name"),
        ("host:0/a", "registry's host name"),
        ("[::zz]/a", "registry's host name"),
        ("http://x/y", "registry's host name"),
        ("a\nb", "repository"),
        ("busybox:latest\n", "tag"),
        ("ünï/x", "repository"),
        ("registry.example/" + "a" * 250, "more than 255"),
        ("oci:/tmp/x", "registry's host name"),
    ],
)
def test_what_is_no_reference_is_refused_with_its_part(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, "image.image")
    assert caught.value.field == "image.image"
    assert reason in str(caught.value)


def test_loopback_registries_are_known_by_their_address() -> None:
    assert all(is_loopback(host) for host in ("localhost", "localhost:5000", "127.9.9.9:80", "[::1]:443", "[::1]"))
    assert not any(is_loopback(host) for host in ("docker.io", "localhost.example", "10.0.0.1:5000", "[fe80::1]:5"))
