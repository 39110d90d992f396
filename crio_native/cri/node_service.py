"""The RuntimeService's calls about the node as a whole: versions, state, configuration, events."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import time
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from crio_native import __version__
from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.config.render import to_toml
from crio_native.cri import messages
from crio_native.cri.server import Call
from crio_native.errors import InvalidArgument
from crio_native.linux.cgroup import hierarchy
from crio_native.pods.events import Events
from crio_native.pods.node import Node

log = logging.getLogger(__name__)

API_VERSION = "v1"
RUNTIME_NAME = "crio-native"
_KUBELET_API = "0.1.0"  # what kubelets compare Version.version with


class NodeService:
    """Its answers are what is true when they are given: nothing is remembered but the pod CIDR."""

    def __init__(self, node: Node, events: Events, network_status: Callable[[], tuple[bool, str]]):
        self._node = node
        self._events = events
        self._network_status = network_status
        self._pod_cidr = ""
        self._started = time.time_ns()

    async def Version(self, request: Any, call: Call) -> Any:
        return pb.VersionResponse(
            version=_KUBELET_API,
            runtime_name=RUNTIME_NAME,
            runtime_version=__version__,
            runtime_api_version=API_VERSION,
        )

    async def Status(self, request: Any, call: Call) -> Any:
        network, why = await call.thread(self._network_status)
        runtime = self._runtime_trouble()
        response = pb.StatusResponse()
        conditions = response.status.conditions
        conditions.add(
            type="RuntimeReady", status=not runtime, reason="RuntimeNotReady" if runtime else "", message=runtime
        )
        conditions.add(
            type="NetworkReady", status=network, reason="" if network else "NetworkPluginNotReady", message=why
        )
        handlers = self._node.handlers
        for name in ("", *sorted(handlers)):
            can = handlers[name or self._node.config.runtime.default_runtime].abilities
            features = pb.RuntimeHandlerFeatures(
                recursive_read_only_mounts=can.recursive_read_only_mounts, user_namespaces=can.user_namespaces
            )
            response.runtime_handlers.add(name=name, features=features)
        response.features.supplemental_groups_policy = True
        response.features.mount_options = True
        response.features.user_namespaces_host_network = any(
            each.abilities.user_namespaces for each in handlers.values()
        )
        if request.verbose:
            toml = response.info["toml"] = await call.thread(to_toml, self._node.config)
            response.info["config"] = self._config_json(toml)
            response.info["state"] = json.dumps(self._state())
            response.info["network"] = json.dumps(await call.thread(self._node.network.told))
            response.info["handlers"] = json.dumps({name: each.told() for name, each in handlers.items()})
        return response

    async def RuntimeConfig(self, request: Any, call: Call) -> Any:
        response = pb.RuntimeConfigResponse()
        systemd = self._node.config.runtime.cgroup_manager == "systemd"
        response.linux.cgroup_driver = pb.SYSTEMD if systemd else pb.CGROUPFS
        return response

    async def UpdateRuntimeConfig(self, request: Any, call: Call) -> Any:
        """The pod CIDR is noted for operators to compare, and for network plugins that ask for `ipRanges`: the pods'
        addresses are the network configuration's, as in CRI-O."""
        cidr = request.runtime_config.network_config.pod_cidr
        for each in filter(None, cidr.split(",")):
            try:
                ipaddress.ip_network(each.strip())
            except ValueError:
                raise InvalidArgument(
                    "runtime_config.network_config.pod_cidr", each, "must be a network such as 10.85.0.0/16"
                ) from None
        if cidr and cidr != self._pod_cidr:
            log.info("the kubelet's pod CIDR is %s; pods get their addresses from the network configuration", cidr)
        if cidr:
            self._pod_cidr = cidr
            await call.thread(self._node.network.set_pod_cidrs, [each.strip() for each in cidr.split(",") if each])
        return pb.UpdateRuntimeConfigResponse()

    async def GetContainerEvents(self, request: Any, call: Call) -> AsyncIterator[Any]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        subscription = self._events.subscribe(lambda: _wake(loop, woken))
        try:
            while True:
                await woken.wait()
                woken.clear()
                for event in subscription.take():
                    yield messages.event(event)
        finally:
            subscription.close()

    def _runtime_trouble(self) -> str:
        """Why no container can be made by default; "" when one can."""
        default = self._node.handlers[self._node.config.runtime.default_runtime]
        if default.problem:
            return f"the default runtime handler {default.name!r} cannot run: {default.problem}"
        if not self._node.namespaces.pids():
            return "no launcher runs; each call that needs one starts another"
        return ""

    def _config_json(self, toml: str) -> str:
        """sandboxImage is what kubeadm looks for; this runtime's pods have no such image, but a kubelet may pin it."""
        return json.dumps({"sandboxImage": self._node.config.image.pause_image, **tomllib.loads(toml)})

    def _state(self) -> dict[str, Any]:
        store = self._node.store
        return {
            "pid": os.getpid(),
            "startedAt": self._started,
            "version": __version__,
            "kernel": os.uname().release,
            "cgroups": hierarchy().mode,
            "pods": Counter(pod.state for pod in list(store.pods.values())),
            "containers": Counter(container.state for container in list(store.containers.values())),
            "launchers": self._node.namespaces.pids(),
            "handlers": {
                name: {"problem": each.problem, "version": each.abilities.version, "program": each.program}
                for name, each in self._node.handlers.items()
            },
            "podCIDR": self._pod_cidr,
            "reload": self._node.reloaded,
            "eventsDropped": self._events.dropped,
        }


def _wake(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    loop.call_soon_threadsafe(woken.set)
