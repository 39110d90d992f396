"""The CRI log reader: records, joined parts, selection, rotation, following."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.cli.ctl import logs
from crio_native.cli.ctl.logs import LogFile, Printer, Record
from crio_native.cli.ctl.parse import timestamp

TIME = "2026-01-02T03:04:05.000000006Z"


def record(content: str, stream: str = "stdout", tag: str = "F", moment: str = TIME) -> bytes:
    return f"{moment} {stream} {tag} {content}\n".encode()


def printed(log: LogFile, *, timestamps: bool = False, since: int = 0, skip: int = 0) -> tuple[bytes, bytes]:
    out, err = io.BytesIO(), io.BytesIO()
    Printer(out, err, timestamps=timestamps, since=since, skip=skip).write(log.records())
    return out.getvalue(), err.getvalue()


def test_a_record() -> None:
    assert logs.parse_record(record(" two  spaces ")[:-1]) == Record(TIME, "stdout", True, b" two  spaces ")
    assert logs.parse_record(record("", "stderr", "P")[:-1]) == Record(TIME, "stderr", False, b"")
    assert logs.parse_record(record("x", tag="P:more")[:-1]).last is False


@given(st.binary(max_size=200))
def test_what_is_no_record_is_passed_on_whole(line: bytes) -> None:
    parsed = logs.parse_record(line)
    assert parsed.content == line or line.endswith(b" " + parsed.content)


chunks = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=300)), max_size=20)


@given(chunks, st.integers(1, 64))
def test_output_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, bytes]], width: int
) -> None:
    """Lines cut into parts of `width`, as a runtime cuts long lines, the two streams interleaved."""
    path = tmp_path_factory.mktemp("log") / "0.log"
    expected = {"stdout": b"", "stderr": b""}
    with open(path, "wb") as file:
        for stream, data in writes:
            for line in data.split(b"\n"):
                parts = [line[i : i + width] for i in range(0, len(line), width)] or [b""]
                for part in parts[:-1]:
                    file.write(f"{TIME} {stream} P ".encode() + part + b"\n")
                file.write(f"{TIME} {stream} F ".encode() + parts[-1] + b"\n")
                expected[stream] += line + b"\n"
    with LogFile(str(path)) as log:
        assert printed(log) == (expected["stdout"], expected["stderr"])


def test_parts_of_two_streams_are_joined_each_with_its_own(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(
        record("a", tag="P") + record("x", "stderr", "P") + record("b", tag="P") + record("y", "stderr") + record("c")
    )
    with LogFile(str(path)) as log:
        assert logs.count_lines(log.records()) == 2
        log.rewind()
        assert printed(log, timestamps=True) == (f"{TIME} abc\n".encode(), f"{TIME} xy\n".encode())


def test_skipped_lines_take_their_later_parts_with_them(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(record("a", tag="P") + record("x", "stderr") + record("b") + record("last"))
    with LogFile(str(path)) as log:
        assert printed(log, skip=1) == (b"last\n", b"x\n")


def test_since_goes_by_a_lines_first_part(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    old, new = "2026-01-01T00:00:00Z", "2026-01-03T00:00:00.5Z"
    path.write_bytes(record("o", tag="P", moment=old) + record("ld", moment=new) + record("new", moment=new))
    between = timestamp("2026-01-02T00:00:00Z")
    assert between
    with LogFile(str(path)) as log:
        assert printed(log, since=between)[0] == b"new\n"


def test_an_unfinished_record_waits(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    whole = record("hello")
    with LogFile(str(path)) as log:
        assert list(log.records()) == []
        path.write_bytes(whole[:20])
        assert list(log.records()) == []
        path.write_bytes(whole)
        assert [item.content for item in log.records()] == [b"hello"]


def test_a_record_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"x" * (3 * logs.RECORD_MAX) + b"\n" + record("after"))
    with LogFile(str(path)) as log:
        records = list(log.records())
    assert max(len(item.content) for item in records) <= logs.RECORD_MAX + logs.READ_SIZE
    assert sum(len(item.content) for item in records[:-1]) == 3 * logs.RECORD_MAX
    assert records[-1].content == b"after"


def test_rotation_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(record("1"))
    with LogFile(str(path)) as log:
        assert [item.content for item in log.records()] == [b"1"]
        path.rename(tmp_path / "0.log.old")
        with open(tmp_path / "0.log.old", "ab") as old:
            old.write(record("2"))  # the writer has not reopened yet
        assert [item.content for item in log.records()] == [b"2"]
        with open(tmp_path / "0.log.old", "ab") as old:
            old.write(record("3"))
        path.write_bytes(record("4"))
        assert [item.content for item in log.records()] == [b"3", b"4"]


def test_truncation_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(record("1") + record("2"))
    with LogFile(str(path)) as log:
        assert len(list(log.records())) == 2
        with open(path, "r+b") as file:
            file.truncate(0)
        path.write_bytes(record("3"))
        assert [item.content for item in log.records()] == [b"3"]


def test_follow_prints_what_was_written_before_the_end_and_then_returns(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    out, over = io.BytesIO(), threading.Event()

    def write() -> None:
        for number in range(30):
            if number % 10 == 5:
                path.rename(tmp_path / f"old.{number}")
            with open(path, "ab") as file:
                file.write(record(str(number)))
            time.sleep(0.06)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    with LogFile(str(path)) as log:
        logs.follow(log, Printer(out, io.BytesIO()), over.is_set)
    writer.join()
    assert out.getvalue() == b"".join(b"%d\n" % number for number in range(30))
