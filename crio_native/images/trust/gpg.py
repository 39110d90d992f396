"""OpenPGP signatures, judged by gpgv, which knows nothing but the keys that it is handed.

gpgv reads what strangers wrote, so it runs as nobody, with bounds on its memory and time, and sees its input in memory
files only.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator

from crio_native.errors import FailedPrecondition
from crio_native.images.trust.signatures import MAX_SIGNATURE, Invalid, Unmet

TIMEOUT = 5.0  # seconds
MAX_STATUS = 64 << 10  # bytes
_LIMITS = ("--as=536870912", "--cpu=5", "--core=0", f"--fsize={MAX_STATUS}", "--nofile=64")
_NOBODY = ("--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--inh-caps=-all")
_ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[ \t]*\r?\n(?:[^\r\n]+\r?\n)*?[ \t]*\r?\n"
    rb"([A-Za-z0-9+/=\s]*?)(?:\r?\n=[A-Za-z0-9+/]{4}\s*)?\r?\n-----END PGP PUBLIC KEY BLOCK-----"
)
# What gpgv says (DETAILS of GnuPG) that makes a signature none, though another word may call it good.
_BAD = {
    "BADSIG": "it does not fit what was signed",
    "NO_PUBKEY": "it was made with another key",
    "ERRSIG": "it cannot be checked: an unknown algorithm, or its key cannot sign",
    "EXPSIG": "it has expired",
    "EXPKEYSIG": "its key has expired",
    "REVKEYSIG": "its key has been revoked",
    "NODATA": "it is no signed OpenPGP message",
    "UNEXPECTED": "it is no signed OpenPGP message",
    "BADARMOR": "it is no signed OpenPGP message",
    "FAILURE": "gpgv could not read it",
}


def keyring(key: bytes, what: str) -> bytes:
    """Public keys as gpgv reads them, from binary or armored ones.  Raises FailedPrecondition."""
    if key[8:12] == b"KBXf":
        raise FailedPrecondition(f"{what} is a keybox: export the keys from it (gpg --export)")
    if b"-----BEGIN PGP" not in key:
        if not key[:1] or not key[0] & 0x80:  # the mark of every packet (RFC 4880, 4.2)
            raise FailedPrecondition(f"{what} holds no OpenPGP public key")
        return key
    try:
        blocks = [base64.b64decode(b"".join(block.split()), validate=True) for block in _ARMOR.findall(key)]
    except (binascii.Error, ValueError):
        blocks = []
    if not blocks:
        raise FailedPrecondition(f"{what} holds no OpenPGP public key: its armor is damaged")
    return b"".join(blocks)


def verified(message: bytes, keys: bytes) -> bytes:
    """The text of a signed message, if one of these keys, and nothing but it, has signed it.

    Raises Invalid; Unmet for a message that gpgv hangs at; FailedPrecondition where gpgv cannot be run.
    """
    if not message[:1] or not message[0] & 0x80:  # armor and cleartext have room for text that nobody signed
        raise Invalid("it is no signed OpenPGP message in its binary form")
    with _memory("message", message) as signed, _memory("keyring", keys) as ring, _memory("status") as status:
        files = [f"/proc/self/fd/{fd}" for fd in (ring, signed)]
        command = ["prlimit", *_LIMITS, "--", "setpriv", *_NOBODY, "--", "gpgv", "--quiet"]
        command += ["--status-fd", str(status), "--keyring", files[0], "--output", "-", files[1]]
        text, code = _run(command, (signed, ring, status))
        said = os.pread(status, MAX_STATUS, 0).decode("ascii", "replace")
    words = [words[1:] for line in said.splitlines() if (words := line.split()) and words[0] == "[GNUPG:]"]
    names = [word[0] for word in words if word]
    for name, why in _BAD.items():
        if name in names:
            raise Invalid(why)
    if code or [names.count(name) for name in ("NEWSIG", "GOODSIG", "VALIDSIG", "PLAINTEXT")] != [1, 1, 1, 1]:
        raise Invalid("it is not one message with one good signature")
    return text


@contextlib.contextmanager
def _memory(name: str, content: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create(name)
    try:
        os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def _run(command: list[str], descriptors: tuple[int, ...]) -> tuple[bytes, int]:
    """What a program writes, and its exit status.  By vfork and exec, as all that the daemon runs."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "GNUPGHOME": "/nonexistent"},
            cwd="/",
            pass_fds=descriptors,
            start_new_session=True,
        )
    except OSError as error:
        raise FailedPrecondition(f"{command[0]} cannot be run: {error.strerror}") from None
    try:
        text = _output(child)
        child.wait(1)
    except (TimeoutError, subprocess.TimeoutExpired):
        # Not Invalid: many such signatures would hold us up for long.
        raise Unmet(f"gpgv did not judge a signature within {TIMEOUT:g} s") from None
    finally:
        assert child.stdout
        child.stdout.close()
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode in (126, 127):
        raise FailedPrecondition("gpgv cannot be run: signedBy needs the programs gpgv, setpriv and prlimit")
    return text, child.returncode


def _output(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout
    end = time.monotonic() + TIMEOUT
    text = bytearray()
    while select.select([child.stdout], [], [], max(end - time.monotonic(), 0))[0]:
        piece = os.read(child.stdout.fileno(), 64 << 10)
        if not piece:
            return bytes(text)
        text += piece
        if len(text) > MAX_SIGNATURE:
            raise Invalid(f"what it signs is larger than {MAX_SIGNATURE} bytes")
    raise TimeoutError
