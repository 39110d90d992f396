"""Credentials: which file and which entry counts, helpers that are real programs, and all that can be wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import CrioError, DeadlineExceeded, InvalidArgument, Unavailable
from crio_native.images.credentials import Keychain, decode, default_files
from crio_native.images.model import Credentials
from crio_native.images.references import parse


def entry(user: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:pass".encode()).decode()}


def auth_file(path: Path, auths: dict[str, Any] | None = None, **more: Any) -> Path:
    path.write_text(json.dumps({"auths": auths or {}, **more}))
    return path


def user_of(keychain: Keychain, name: str, *helpers: str, **more: str) -> str | None:
    found = keychain.find(parse(name), helpers, **more)
    return found.username if found else None


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes docker-credential-NAME programs of a shell script."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        program = directory / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return make


# Files


@pytest.mark.parametrize(
    ("name", "user"),
    [
        ("r.com/a/b/c", "abc"),
        ("r.com/a/b/d", "ab"),
        ("r.com/a/x", "host"),
        ("r.com:5000/a/b", "port"),
        ("s.com/a", None),
        ("busybox", "hub"),
    ],
)
def test_the_longest_name_counts(tmp_path: Path, name: str, user: str | None) -> None:
    path = auth_file(
        tmp_path / "auth.json",
        {
            "r.com": entry("host"),
            "r.com/a/b": entry("ab"),
            "r.com/a/b/c": entry("abc"),
            "r.com:5000": entry("port"),
            "https://index.docker.io/v1/": entry("hub"),
        },
    )
    assert user_of(Keychain(files=(path,)), name) == user


@pytest.mark.parametrize("key", ["r.com", "https://r.com", "http://r.com/", "https://r.com/v1/", "https://r.com/v2/"])
def test_keys_of_older_programs_are_understood(tmp_path: Path, key: str) -> None:
    assert user_of(Keychain(files=(auth_file(tmp_path / "a", {key: entry("me")}),)), "r.com/x") == "me"


def test_the_first_file_that_knows_counts(tmp_path: Path) -> None:
    files = (
        tmp_path / "missing",
        auth_file(tmp_path / "1", {"r.com/x": {}}),  # docker's way to say that a helper knows
        auth_file(tmp_path / "2", {"r.com": entry("second")}),
        auth_file(tmp_path / "3", {"r.com/x": entry("third")}),
    )
    assert user_of(Keychain(files=files), "r.com/x") == "second"


def test_a_global_file_is_instead_of_all_others(tmp_path: Path) -> None:
    other = auth_file(tmp_path / "other", {"r.com": entry("other")})
    keychain = Keychain(auth_file(tmp_path / "global", {"s.com": entry("global")}), files=(other,))
    assert (user_of(keychain, "s.com/x"), user_of(keychain, "r.com/x")) == ("global", None)


def test_a_namespace_has_its_own_for_one_image(tmp_path: Path) -> None:
    directory = tmp_path / "auth"
    directory.mkdir()
    image = hashlib.sha256(b"r.com/x:v1").hexdigest()
    auth_file(directory / f"team-{image}.json", {"r.com": entry("team")})
    other = auth_file(tmp_path / "other", {"r.com": entry("all")})
    keychain = Keychain(other, directory)
    assert user_of(keychain, "r.com/x:v1", namespace="team", image="r.com/x:v1") == "team"
    assert user_of(keychain, "r.com/x:v2", namespace="team", image="r.com/x:v2") == "all"
    assert user_of(keychain, "r.com/x:v1", namespace="other", image="r.com/x:v1") == "all"
    assert user_of(keychain, "r.com/x:v1", namespace="../team", image="r.com/x:v1") == "all"


def test_an_identity_token_is_one(tmp_path: Path) -> None:
    path = auth_file(tmp_path / "a", {"r.com": {"identitytoken": "t0k", **entry("me")}})
    assert Keychain(files=(path,)).find(parse("r.com/x")) == Credentials(identity_token="t0k")


def test_the_usual_places() -> None:
    home = {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/5"}
    assert default_files(home) == (
        Path("/run/user/5/containers/auth.json"),
        Path(f"/run/containers/{os.geteuid()}/auth.json"),
        Path("/h/.config/containers/auth.json"),
        Path("/h/.docker/config.json"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"auths": 5}', "auths: not an object"),
        ('{"credHelpers": []}{', "not a JSON object"),
        ('{"credHelpers": [1]}', "credHelpers: not an object"),
        ('{"auths": {"r.com": "c2VjcmV0OnNlY3JldA=="}}', r"auths\.r\.com: not an object"),
        ('{"auths": {"r.com": {"auth": "!"}}}', r"auths\.r\.com\.auth: must be base64 of NAME:PASSWORD"),
        ('{"auths": {"r.com": {"auth": "c2VjcmV0"}}}', r"auths\.r\.com\.auth: must be base64"),
        ('{"auths": {"r.com": {"identitytoken": 5}}}', r"identitytoken: not a string"),
    ],
)
def test_a_damaged_file_is_named_and_not_shown(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "auth.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=words) as error:
        Keychain(files=(path,)).find(parse("r.com/x"))
    assert str(path) in str(error.value)
    assert "c2VjcmV0" not in str(error.value)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(InvalidArgument, match="larger than"):
        Keychain(files=(tmp_path / "auth.json",)).find(parse("r.com/x"))


@pytest.mark.parametrize("text", ["", "!", "bm9jb2xvbg==", "OnBhc3M=", "w4M"])
def test_what_is_no_name_and_password_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="auth: must be base64"):
        decode(text, "auth")


# Helpers

ANSWER = """read server; printf '{"ServerURL":"%s","Username":"me-%s","Secret":"s"}' "$server" "$server" """


def test_a_helper_is_asked_for_the_registry(tmp_path: Path, helper: Any) -> None:
    helper("one", ANSWER)
    path = auth_file(tmp_path / "a", {"r.com": entry("file")}, credHelpers={"r.com": "one"})
    assert user_of(Keychain(files=(path,)), "r.com/x") == "me-r.com"
    assert user_of(Keychain(files=()), "busybox", "one") == "me-https://index.docker.io/v1/"


def test_a_store_is_asked_when_no_entry_knows(tmp_path: Path, helper: Any) -> None:
    helper("store", ANSWER)
    path = auth_file(tmp_path / "a", {"r.com": entry("file")}, credsStore="store")
    assert user_of(Keychain(files=(path,)), "r.com/x") == "file"
    assert user_of(Keychain(files=(path,)), "s.com/x") == "me-s.com"


def test_helpers_are_asked_in_their_order(tmp_path: Path, helper: Any) -> None:
    helper("none", "echo credentials not found in native keychain; exit 1")
    helper("one", ANSWER)
    keychain = Keychain(files=(auth_file(tmp_path / "a", {"r.com": entry("file")}),))
    assert user_of(keychain, "r.com/x", "none", "one", "containers-auth.json") == "me-r.com"
    assert user_of(keychain, "r.com/x", "none", "containers-auth.json", "one") == "file"
    assert user_of(keychain, "s.com/x", "none") is None


def test_a_helper_may_answer_an_identity_token(helper: Any) -> None:
    helper("token", """echo '{"Username":"<token>","Secret":"t0k"}'""")
    assert Keychain(files=()).find(parse("r.com/x"), ("token",)) == Credentials(identity_token="t0k")


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo no; exit 3", Unavailable, "failed for r.com with status 3"),
        ("kill -9 $$", Unavailable, "status -9"),
        ("echo hello", Unavailable, "did not answer Username and Secret"),
        ("echo '[]'", Unavailable, "did not answer Username and Secret"),
        ("""echo '{"Username":5,"Secret":"s"}'""", Unavailable, "did not answer"),
        ("exec cat /dev/zero", Unavailable, "answered more than 1048576 bytes"),
        ("sleep 60 & sleep 60", DeadlineExceeded, "did not answer for r.com within 1 s and was killed"),
        ("exec >&-; sleep 60", DeadlineExceeded, "within 1 s and was killed"),
    ],
)
def test_a_helper_that_fails_is_named_and_leaves_nothing(
    tmp_path: Path, helper: Any, script: str, error: type[CrioError], words: str
) -> None:
    helper("bad", f"echo $$ >{tmp_path}/pid\n{script}")
    began = time.monotonic()
    with pytest.raises(error, match=f"docker-credential-bad .*{words}"):
        Keychain(files=(), helper_timeout=1).find(parse("r.com/x"), ("bad",))
    assert time.monotonic() - began < 6
    group = int((tmp_path / "pid").read_text())
    while any(group_of(pid) == group for pid in os.listdir("/proc") if pid.isdigit()):  # killed, but not yet gone
        assert time.monotonic() - began < 10, "the helper has left processes"
        time.sleep(0.01)


def group_of(pid: str) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[2])


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "", "-x", "x" * 100])
def test_a_helpers_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidArgument, match="credential helper"):
        Keychain(files=()).find(parse("r.com/x"), (name,))


def test_a_helper_that_is_missing_is_named() -> None:
    with pytest.raises(Unavailable, match="docker-credential-missing cannot be run: No such file"):
        Keychain(files=()).find(parse("r.com/x"), ("missing",))
