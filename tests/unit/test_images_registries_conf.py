"""registries.conf: what it says, what of it is wrong, and what a name means by it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from crio_native.errors import InvalidArgument, PermissionRefused
from crio_native.images import short_names
from crio_native.images.references import parse
from crio_native.images.registries_conf import Paths, Registries, load

DIGEST = "sha256:" + "0" * 64


def read(tmp_path: Path, text: str, *drop_ins: str, aliases: str = "") -> Registries:
    directory = tmp_path / "registries.conf.d"
    directory.mkdir()
    (tmp_path / "registries.conf").write_text(text)
    for number, drop_in in enumerate(drop_ins):
        (directory / f"{number}.conf").write_text(drop_in)
    if aliases:
        (tmp_path / "aliases.conf").write_text(aliases)
    return load(Paths(tmp_path / "registries.conf", directory, tmp_path / "aliases.conf"))


def asked(registries: Registries, name: str) -> list[str]:
    return [str(endpoint.reference) for endpoint in registries.endpoints(parse(name))]


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "location", "name", "first"),
    [
        ("example.com", "local:5000", "example.com/a/b:v1", "local:5000/a/b:v1"),
        ("example.com/a", "local:5000/x", "example.com/a/b:v1", "local:5000/x/b:v1"),
        ("example.com/a/b", "local:5000/x/y", "example.com/a/b:v1", "local:5000/x/y:v1"),
        ("example.com/a", "local:5000", "example.com/ab:v1", "example.com/ab:v1"),
        ("example.com", "local:5000", "example.com:80/a:v1", "example.com:80/a:v1"),
        ("docker.io", "local:5000", "busybox", "local:5000/library/busybox:latest"),
        ("docker.io/library", "local:5000/hub", "busybox", "local:5000/hub/busybox:latest"),
        ("example.com", "local:5000", f"example.com/a@{DIGEST}", f"local:5000/a@{DIGEST}"),
        ("*.example.com", "local:5000", "a.b.example.com/x:v1", "local:5000/x:v1"),
        ("*.example.com", "local:5000", "example.com/x:v1", "example.com/x:v1"),
        ("*.example.com", "local:5000", "badexample.com/x:v1", "badexample.com/x:v1"),
        ("*.example.com", "local:5000", "evil.org/a.example.com/x:v1", "evil.org/a.example.com/x:v1"),
        ("*.example.com/team", "local:5000/t", "a.example.com/team/x:v1", "local:5000/t/x:v1"),
        ("*.example.com/team", "local:5000/t", "a.example.com/teams/x:v1", "a.example.com/teams/x:v1"),
    ],
)
def test_a_prefix_rewrites_what_it_matches(tmp_path: Path, prefix: str, location: str, name: str, first: str) -> None:
    registries = read(tmp_path, f'[[registry]]\nprefix = "{prefix}"\nlocation = "{location}"')
    assert asked(registries, name) == [first]


def test_the_longest_prefix_counts(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        '[[registry]]\nlocation = "a.com"\ninsecure = true\n[[registry]]\nlocation = "a.com/b"\nblocked = true',
    )
    assert registries.endpoints(parse("a.com/x"))[0].insecure
    with pytest.raises(PermissionRefused, match=r"'a.com/b' is blocked by .*registries.conf"):
        registries.endpoints(parse("a.com/b/c"))


def test_a_wildcard_without_location_leaves_names_alone(tmp_path: Path) -> None:
    registries = read(tmp_path, '[[registry]]\nprefix = "*.example.com"\ninsecure = true')
    (endpoint,) = registries.endpoints(parse("a.example.com/x"))
    assert (str(endpoint.reference), endpoint.insecure) == ("a.example.com/x:latest", True)


# Mirrors

MIRRORS = """
[[registry]]
location = "example.com"
[[registry.mirror]]
location = "all.local/m"
insecure = true
[[registry.mirror]]
location = "digests.local"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "tags.local"
pull-from-mirror = "tag-only"
"""


def test_mirrors_come_first_each_for_its_kind_of_reference(tmp_path: Path) -> None:
    registries = read(tmp_path, MIRRORS)
    assert asked(registries, "example.com/a:v1") == ["all.local/m/a:v1", "tags.local/a:v1", "example.com/a:v1"]
    by_digest = [f"all.local/m/a@{DIGEST}", f"digests.local/a@{DIGEST}", f"example.com/a@{DIGEST}"]
    assert asked(registries, f"example.com/a@{DIGEST}") == by_digest
    assert [(e.mirror, e.insecure) for e in registries.endpoints(parse("example.com/a"))] == [
        (True, True),
        (True, False),
        (False, False),
    ]


def test_mirror_by_digest_only_is_for_all_mirrors(tmp_path: Path) -> None:
    text = '[[registry]]\nlocation="a.com"\nmirror-by-digest-only=true\n[[registry.mirror]]\nlocation="m.com"'
    registries = read(tmp_path, text)
    assert asked(registries, "a.com/x") == ["a.com/x:latest"]
    assert asked(registries, f"a.com/x@{DIGEST}") == [f"m.com/x@{DIGEST}", f"a.com/x@{DIGEST}"]


# Files


def test_drop_ins_replace_what_they_name(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        'unqualified-search-registries = ["one.com"]\n[aliases]\na = "x.com/a"\nb = "x.com/b"\n'
        '[[registry]]\nlocation = "r.com"\nblocked = true\n[[registry]]\nlocation = "s.com"',
        'short-name-mode = "permissive"\n[aliases]\na = "y.com/a"\n[[registry]]\nlocation = "r.com"',
        'unqualified-search-registries = ["two.com", "three.com"]\n[aliases]\nb = ""\nc = "y.com/c"',
        aliases='[aliases]\nc = "z.com/c"',
    )
    assert registries.search == ("two.com", "three.com")
    assert registries.mode == "permissive"
    assert registries.aliases == {"a": "y.com/a", "c": "z.com/c"}
    assert [registry.location for registry in registries.registries] == ["r.com", "s.com"]
    assert not registries.registries[0].blocked


def test_without_files_a_short_name_is_docker_hubs(tmp_path: Path) -> None:
    assert load(Paths(tmp_path / "a", tmp_path / "b", tmp_path / "c")).search == ("docker.io",)


def test_an_unknown_key_is_told_and_has_no_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, '[[registry]]\nlocation = "a.com"\nmirrors = []')
    assert "registry[0].mirrors is not known" in caplog.text


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[[registry", "registries.conf: not TOML"),
        ("[registries.search]\nregistries = []", "registries: this is the old form"),
        ('short-name-mode = "ask"', "short-name-mode: not one of enforcing, permissive, disabled"),
        ('unqualified-search-registries = "a.com"', "unqualified-search-registries: not a list"),
        ('unqualified-search-registries = ["https://a.com"]', r"unqualified-search-registries\[0\]: not HOST"),
        ('unqualified-search-registries = ["a.com", 5]', "unqualified-search-registries: not a list of names"),
        ("registry = 5", "registry: not a list"),
        ("registry = [5]", r"registry\[0\]: not a table"),
        ("[[registry]]\nblocked = true", r"registry\[0\].location: missing"),
        ('[[registry]]\nprefix = "a.com"', r"registry\[0\].location: missing"),
        ('[[registry]]\nlocation = "a b"', r"registry\[0\].location: not HOST"),
        ('[[registry]]\nlocation = "a.com/../x"', r"registry\[0\].location: not HOST"),
        ('[[registry]]\nlocation = "a.com:99999"', r"registry\[0\].location: not HOST"),
        ('[[registry]]\nprefix = "*.*.com"', r"registry\[0\].prefix: not HOST"),
        ('[[registry]]\nlocation = "a.com"\ninsecure = 1', r"registry\[0\].insecure: not true or false"),
        ('[[registry]]\nlocation = "a.com"\n[[registry.mirror]]\ninsecure = true', r"mirror\[0\].location: not HOST"),
        (
            '[[registry]]\nlocation="a.com"\n[[registry.mirror]]\nlocation="b.com"\npull-from-mirror="some"',
            r"registry\[0\].mirror\[0\].pull-from-mirror: not one of all",
        ),
        (
            '[[registry]]\nlocation="a.com"\nmirror-by-digest-only=true\n'
            '[[registry.mirror]]\nlocation="b.com"\npull-from-mirror="all"',
            "contradicts mirror-by-digest-only",
        ),
        ('[[registry]]\nlocation="a.com"\n' + '[[registry.mirror]]\nlocation="b.com"\n' * 33, "more than 32 mirrors"),
        ('[aliases]\na = "b"', "aliases.a: not a complete name"),
        ('[aliases]\na = "x.com/b:v1"', "aliases.a: not a complete name"),
        ("[aliases]\na = 5", "aliases.a: not an image's name"),
        ('[aliases]\n"x.com/a" = "x.com/b"', "an alias is a name without registry"),
        ("#" * (1 << 20) + "#", "larger than 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_field(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(InvalidArgument, match=field) as error:
        read(tmp_path, text)
    assert str(tmp_path) in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "registries.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="not TOML"):
        load(Paths(tmp_path / "registries.conf", tmp_path, tmp_path / "none"))


# Short names

TWO = Registries(search=("one.com", "docker.io"), aliases={"known": "x.com/team/known"})


def pulls(text: str, registries: Registries, mode: str) -> list[str]:
    return [str(reference) for reference in short_names.to_pull(text, registries, mode)]


@pytest.mark.parametrize("mode", ["enforcing", "permissive"])
def test_an_alias_decides(mode: str) -> None:
    assert pulls("known:v1", TWO, mode) == ["x.com/team/known:v1"]
    assert pulls(f"known@{DIGEST}", TWO, mode) == [f"x.com/team/known@{DIGEST}"]
    assert pulls("known", TWO, mode) == ["x.com/team/known:latest"]


def test_disabled_knows_no_aliases() -> None:
    assert pulls("known", TWO, "disabled") == ["one.com/known:latest", "docker.io/library/known:latest"]


@pytest.mark.parametrize("mode", ["permissive", "disabled"])
def test_all_registries_are_tried_in_order(mode: str) -> None:
    assert pulls("team/app:v1", TWO, mode) == ["one.com/team/app:v1", "docker.io/team/app:v1"]


def test_enforcing_names_the_candidates() -> None:
    with pytest.raises(InvalidArgument, match=r"any of one.com/app:v1, docker.io/library/app:v1: write out"):
        short_names.to_pull("app:v1", TWO, "enforcing")
    assert pulls("app", Registries(search=("one.com",)), "enforcing") == ["one.com/app:latest"]


def test_a_short_name_that_can_mean_nothing_is_told_how_to_be_written() -> None:
    with pytest.raises(InvalidArgument, match=r"names no registry: .* for example docker.io/library/app:latest"):
        short_names.to_pull("app", Registries(), "enforcing")


@pytest.mark.parametrize("mode", ["enforcing", "permissive", "disabled"])
@pytest.mark.parametrize("text", ["localhost/known", "x.com/known", "x.com:5000/known", "LOCAL/known"])
def test_a_complete_name_is_what_it_is(mode: str, text: str) -> None:
    assert pulls(text, TWO, mode) == [f"{text}:latest"]


def test_the_store_is_never_asked_ambiguously() -> None:
    found = [str(reference) for reference in short_names.to_look_up("known", TWO)]
    assert found == [
        "x.com/team/known:latest",
        "one.com/known:latest",
        "docker.io/library/known:latest",
        "localhost/known:latest",
    ]
