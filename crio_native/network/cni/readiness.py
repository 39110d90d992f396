"""Whether a network's programs are ready, asked in the background: NetworkReady does not wait for one that hangs."""

from __future__ import annotations

import threading
import time

from crio_native.errors import CrioError
from crio_native.network.cni.plugins import Plugins
from crio_native.network.conflist import NetworkList

FRESH_SECONDS = 4.0  # a kubelet asks every five
_PATIENCE = 1.0  # seconds for an answer that comes at once, as they do


class Readiness:
    """The last answers of the present network.  Thread-safe.

    grace: seconds that programs may report themselves unready, after they have been ready, and still count as ready.
    """

    def __init__(self, plugins: Plugins, grace: float = 0.0) -> None:
        self._plugins = plugins
        self._grace = grace
        self._lock = threading.Lock()
        self._network: NetworkList | None = None
        self._problem: str | None = None  # None: not known yet
        self._asked_at = self._ready_at = float("-inf")
        self._answered = threading.Event()
        self._answered.set()

    def problem(self, network: NetworkList) -> str:
        """Why pods cannot be attached, "" when they can."""
        with self._lock:
            if self._network is None or self._network.data != network.data:
                self._network, self._problem, self._ready_at = network, None, float("-inf")
                self._asked_at = float("-inf")
            stale = time.monotonic() - self._asked_at > FRESH_SECONDS
            if stale and self._answered.is_set():
                self._answered.clear()
                self._asked_at = time.monotonic()
                threading.Thread(target=self._ask, args=(network,), name="network-status", daemon=True).start()
        if stale:
            self._answered.wait(_PATIENCE)
        with self._lock:
            if self._problem is None:
                waited = time.monotonic() - self._asked_at
                return f"the plugins of network {network.name!r} have not told their state for {waited:.0f} s"
            if self._problem and time.monotonic() - self._ready_at <= self._grace:
                return ""
            return self._problem

    def _ask(self, network: NetworkList) -> None:
        problem = ""
        try:
            self._plugins.status(network, self._plugins.negotiate(network))
        except (CrioError, OSError) as error:
            problem = str(error)
        with self._lock:
            if self._network is not None and self._network.data == network.data:
                self._problem = problem
                if not problem:
                    self._ready_at = time.monotonic()
            self._answered.set()
