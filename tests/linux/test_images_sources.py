"""Where images come from: mirrors, short names, proxies, the files that name them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from crio_native.errors import (
    InvalidArgument,
    NotFound,
    PermissionRefused,
    Unavailable,
)
from crio_native.images import Credentials, transport

from ..images_support import (
    BASE,
    HostileRegistry,
    Registry,
    free_port,
    picture,
    reply,
    store_with,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry

pytestmark = pytest.mark.root


def mirrored(*mirrors: str, registry: str = "primary.invalid", more: str = "") -> str:
    tables = "".join(f'[[registry.mirror]]\nlocation = "{mirror}"\n{more}\n' for mirror in mirrors)
    return f'[[registry]]\nlocation = "{registry}"\n{tables}'


def test_a_mirror_serves_under_the_images_own_name(tmp_path: Path, registry: Registry) -> None:
    image = picture(BASE)
    registry.push("cache/team/app", "v1", image)
    with store_with(tmp_path, mirrored(f"{registry.address}/cache")) as store:
        pulled = store.pull("primary.invalid/team/app:v1")
        assert pulled.names == ("primary.invalid/team/app:v1",)
        assert pulled.digests == (f"primary.invalid/team/app@{image.manifest['digest']}",)


def test_mirrors_that_fail_are_passed_over(tmp_path: Path, registry: Registry, hostile: HostileRegistry) -> None:
    name = registry.push("team/mirrored", "v1", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    with store_with(tmp_path, mirrored(down, hostile.address, registry=registry.address)) as store:
        began = time.monotonic()
        assert store.pull(name).names == (name,)
        assert time.monotonic() - began < 30
    assert hostile.count("/manifests/v1") == 1


def test_when_all_fail_each_is_named(tmp_path: Path, hostile: HostileRegistry) -> None:
    other = HostileRegistry()
    try:
        other.routes["/v2/team/app/manifests/v1"] = reply(403)
        with (
            store_with(tmp_path, mirrored(other.address, registry=hostile.address)) as store,
            pytest.raises(NotFound, match=rf"{hostile.address}.*HTTP 404.*before that: {other.address}.*HTTP 403"),
        ):
            store.pull(f"{hostile.address}/team/app:v1")
    finally:
        other.close()


def test_a_token_service_that_is_not_there_is_named(
    tmp_path: Path, hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    challenge = 'Bearer realm="http://127.0.0.1:1/token",service="s"'
    hostile.routes["/v2/app/manifests/latest"] = reply(401, headers={"WWW-Authenticate": challenge})
    with (
        store_with(tmp_path) as store,
        pytest.raises(Unavailable, match=r"its token service http://127\.0\.0\.1:1/token.* does not answer: .*refused"),
    ):
        store.pull(f"{hostile.address}/app")


def test_a_mirror_is_not_shown_the_callers_credentials(tmp_path: Path, hostile: HostileRegistry) -> None:
    mirror = HostileRegistry()
    try:
        mirror.routes["/v2/app/manifests/latest"] = reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        name = hostile.serve("app", picture(BASE))
        with store_with(tmp_path, mirrored(mirror.address, registry=hostile.address)) as store:
            store.pull(name, credentials=Credentials("me", "pass"))
        assert mirror.requests and not any("Authorization" in headers for _, headers in mirror.requests)
    finally:
        mirror.close()


def test_a_wrong_image_is_not_asked_for_elsewhere(tmp_path: Path, registry: Registry, hostile: HostileRegistry) -> None:
    name = registry.push("team/app", "v1", picture(BASE))
    hostile.routes["/v2/team/app/manifests/v1"] = reply(200, b"{")
    with (
        store_with(tmp_path, mirrored(hostile.address, registry=registry.address)) as store,
        pytest.raises(InvalidArgument, match="not JSON"),
    ):
        store.pull(name)


def test_a_blocked_registry_is_not_asked(tmp_path: Path, hostile: HostileRegistry) -> None:
    conf = f'[[registry]]\nlocation = "{hostile.address}"\nblocked = true'
    with store_with(tmp_path, conf) as store, pytest.raises(PermissionRefused, match="is blocked by"):
        store.pull(f"{hostile.address}/app")
    assert hostile.requests == []


def test_a_short_name_is_pulled_and_found_again(tmp_path: Path, registry: Registry) -> None:
    registry.push("short", "v1", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    conf = f'unqualified-search-registries = ["{down}", "{registry.address}"]\nshort-name-mode = "permissive"'
    with store_with(tmp_path, conf) as store:
        pulled = store.pull("short:v1")
        assert pulled.names == (f"{registry.address}/short:v1",)
        assert store.get("short:v1") is pulled
    with store_with(tmp_path, conf.replace("permissive", "enforcing")) as store:
        assert store.get("short:v1").id == pulled.id  # never an error of ambiguity
        with pytest.raises(InvalidArgument, match=rf"any of {down}/other:latest, {registry.address}/other:latest"):
            store.pull("other")


def test_short_names_disabled_by_the_daemon_tries_all(tmp_path: Path, registry: Registry) -> None:
    registry.push("short", "v2", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    conf = f'unqualified-search-registries = ["{down}", "{registry.address}"]'
    with store_with(tmp_path, conf, short_names="disabled") as store:
        assert store.pull("short:v2").names == (f"{registry.address}/short:v2",)


def test_files_are_followed_only_if_that_is_wanted(tmp_path: Path, hostile: HostileRegistry) -> None:
    name = hostile.serve("app", picture(BASE))
    blocked = f'[[registry]]\nlocation = "{hostile.address}"\nblocked = true'
    for follow in (False, True):
        with store_with(tmp_path, "", follow=follow) as store:
            (tmp_path / "registries.conf").write_text(blocked)
            with contextlib.suppress(PermissionRefused) if not follow else pytest.raises(PermissionRefused):
                assert store.pull(name) and not follow
            (tmp_path / "registries.conf").write_text("[[")
            if follow:
                with pytest.raises(InvalidArgument, match="not TOML"):
                    store.pull(name)


def test_a_wrong_file_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="short-name-mode"), store_with(tmp_path, 'short-name-mode = "x"'):
        pass


def test_a_proxy_is_used_where_the_environment_says(
    tmp_path: Path, hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.serve("app", picture(BASE))
    for path, answer in list(hostile.routes.items()):
        hostile.routes[f"http://registry.invalid{path}"] = answer
    monkeypatch.setenv("HTTP_PROXY", hostile.address)
    monkeypatch.setenv("HTTPS_PROXY", hostile.address)
    with store_with(tmp_path, insecure=frozenset({"registry.invalid"})) as store:
        assert store.pull("registry.invalid/app").names == ("registry.invalid/app:latest",)
        assert all(path.startswith("http://registry.invalid/v2/") for path, _ in hostile.requests)
        monkeypatch.setenv("NO_PROXY", "registry.invalid")
        with pytest.raises(Unavailable, match=r"registry\.invalid"):
            store.pull("registry.invalid/app", platform=None)
