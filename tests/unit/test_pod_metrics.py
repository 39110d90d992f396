"""The table of metrics, the reading of /proc/PID/net/dev, and the calls of the CRI: each has somebody who serves it."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.config.tables import POD_METRICS
from crio_native.cri.checkpoint_service import CheckpointService
from crio_native.cri.image_service import ImageService
from crio_native.cri.listing import PAGE_BYTES, framed, pages
from crio_native.cri.node_service import NodeService
from crio_native.cri.runtime_service import RuntimeService
from crio_native.cri.stats_service import StatsService
from crio_native.cri.streaming import StreamingService
from crio_native.pods.metrics import DESCRIPTORS, descriptors
from crio_native.pods.stats import Interface, parse_net_dev

PARTS = (RuntimeService, StatsService, NodeService, CheckpointService, StreamingService)


@pytest.mark.parametrize("service", ["RuntimeService", "ImageService"])
def test_every_call_is_served_once(service: str) -> None:
    methods = pb.DESCRIPTOR.services_by_name[service].methods
    assert len(methods) == {"RuntimeService": 37, "ImageService": 6}[service]
    for method in methods:
        parts = PARTS if service == "RuntimeService" else (ImageService,)
        [function] = [found for part in parts if (found := getattr(part, method.name, None))]
        generator = inspect.isasyncgenfunction(function)
        assert generator if method.server_streaming else inspect.iscoroutinefunction(function), method.name


def test_groups_of_metrics() -> None:
    assert len(DESCRIPTORS) == 56 == len(descriptors(["all"]))
    assert {each.group for each in DESCRIPTORS.values()} == {"", *POD_METRICS} - {"all"}
    assert [each.name for each in descriptors([])] == ["container_last_seen"]
    assert {each.group for each in descriptors(["cpu"])} == {"", "cpu"}


def test_net_dev() -> None:
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n"
        "    lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"
        "  eth0: 10 20 30 40 0 0 0 0 50 60 70 80 0 0 0 0\n"
        "net1:1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"
        "torn: 1 2\n"
    )
    assert parse_net_dev(text) == (
        Interface("eth0", 10, 20, 30, 40, 50, 60, 70, 80),
        Interface("net1", 1, 2, 3, 4, 5, 6, 7, 8),
    )
    assert parse_net_dev("") == ()


@given(st.lists(st.integers(0, PAGE_BYTES * 2), max_size=12))
def test_pages_hold_everything_once(sizes: list[int]) -> None:
    entries = [framed(pb.PodSandbox(id=str(n), runtime_handler="x" * size)) for n, size in enumerate(sizes)]
    made = list(pages(entries))
    assert b"".join(made) == b"".join(entries)
    for page in made:
        items = pb.StreamPodSandboxesResponse.FromString(page).pod_sandboxes
        assert len(page) <= PAGE_BYTES or len(items) == 1
