"""The layers of an image that comes: each fetched and unpacked once, several at a time, whoever asks for it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from crio_native.errors import InvalidArgument, NotFound, Unavailable
from crio_native.images import artifacts, chunked, conversion
from crio_native.images.directories import Blobs
from crio_native.images.layers import Layers, LocalFiles
from crio_native.images.manifests import Descriptor, verified
from crio_native.images.model import Progress
from crio_native.images.work import Joining, Stop

PROGRESS_INTERVAL = 0.1  # seconds between two reports of a layer

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where an image comes from.

    origin: the place, for errors.  keys: of encrypted layers.  progress: called from other threads.
    """

    blobs: Blobs
    origin: str
    keys: Path | None
    progress: OnProgress
    stop: Stop


class Adding:
    """Adds to `layers`, so many of one image in parallel; an equal layer that is on its way is joined."""

    def __init__(self, layers: Layers, joining: Joining, parallel: int) -> None:
        self._layers, self._joining, self._parallel = layers, joining, parallel

    def add(self, wanted: Mapping[str, Descriptor], arrival: Arrival) -> None:
        """Make all layers present, by their diff ids.  Raises the error of the first that fails."""
        if not wanted:
            return
        with ThreadPoolExecutor(min(self._parallel, len(wanted)), "layer") as pool:
            futures = [pool.submit(self._add, diff_id, descriptor, arrival) for diff_id, descriptor in wanted.items()]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in futures if future in done and (error := future.exception())]
            if errors:
                arrival.stop.set()
                pool.shutdown(cancel_futures=True)
        if errors:
            raise errors[0]

    def _add(self, diff_id: str, descriptor: Descriptor, arrival: Arrival) -> None:
        def unpack() -> None:
            if self._layers.get(diff_id):
                arrival.progress(Progress(descriptor.digest, descriptor.size, descriptor.size, "exists"))
                return
            if not self._add_by_files(diff_id, descriptor, arrival):
                self._add_whole(diff_id, descriptor, arrival)
            arrival.progress(Progress(descriptor.digest, descriptor.size, descriptor.size, "done"))

        arrival.stop.check()
        self._joining.run(("layer", diff_id), unpack, arrival.stop)

    def _add_whole(self, diff_id: str, descriptor: Descriptor, arrival: Arrival) -> None:
        with contextlib.closing(verified(_reported(descriptor, arrival), descriptor, arrival.origin)) as pieces:
            archive = conversion.archive_of(descriptor, pieces, arrival.keys)
            check = descriptor.media_type != artifacts.FILE
            self._layers.add(diff_id, archive, what=f"layer {descriptor.digest}", check=check)

    def _add_by_files(self, diff_id: str, descriptor: Descriptor, arrival: Arrival) -> bool:
        """Fetch only what is not here of a zstd:chunked layer.  False where it is none, or is not what it says."""
        try:
            local = LocalFiles(self._layers)
            found = chunked.opened(descriptor, arrival.blobs, local.open)
            if found is None:
                return False
            archive = _stoppable(found.archive(), arrival.stop)
            self._layers.add(diff_id, archive, what=f"layer {descriptor.digest}", contents=found.contents())
        except (InvalidArgument, Unavailable, NotFound) as error:
            log.info("layer %s is fetched whole: %s", descriptor.digest, error)
            return False
        log.info("layer %s: %d of %d bytes were fetched", descriptor.digest, sum(found.fetched), descriptor.size)
        return True


def _reported(descriptor: Descriptor, arrival: Arrival) -> Iterator[bytes]:
    """The blob's pieces."""
    current, last = 0, 0.0
    pieces = arrival.blobs.blob(descriptor)
    with contextlib.ExitStack() as end:
        if isinstance(pieces, Generator):  # after an error its connection would be as old as the traceback
            end.callback(pieces.close)
        for piece in pieces:
            arrival.stop.check()
            yield piece
            current += len(piece)
            if (now := time.monotonic()) - last > PROGRESS_INTERVAL:
                arrival.progress(Progress(descriptor.digest, current, descriptor.size, "fetch"))
                last = now


def _stoppable(pieces: Iterable[bytes], stop: Stop) -> Iterator[bytes]:
    for piece in pieces:
        stop.check()
        yield piece
        stop.progressed()
