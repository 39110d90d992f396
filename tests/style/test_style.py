"""What the linter, the formatter and the type checker say; and words that a public repository must not have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Split, so that this file does not find itself.
NOT_IN_THE_REPOSITORY = re.compile(
    "|".join(
        (
            r"pypi" + r"\.org",
            r"python" + r"hosted\.org",
            r"deb\.debian" + r"\.org",
            r"registry\.npmjs" + r"\.org",
            r"proxy\.golang" + r"\.org",
            r"/work/(main|shared)\b",
            r"/home/(?!runner\b)[a-z]\w+/",
        )
    )
)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=["lint", "format", "types"],
)
def test_checkers_are_content(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_names_one_machine_or_a_package_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = []
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        text = path.read_bytes()
        if b"\0" in text:
            continue
        found += [
            f"{name}:{number}: {match[0]}"
            for number, line in enumerate(text.decode().splitlines(), 1)
            if (match := NOT_IN_THE_REPOSITORY.search(line))
        ]
    assert not found, "\n".join(found)
