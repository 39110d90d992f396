"""`crioctl isolation`: what the kernel says about a container, against what the runtime was asked for.

The pid and the config.json come through the CRI from whichever runtime tells them (CRI-O, containerd and this one do);
the rest is read on this node, which therefore must be the runtime's own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import Node
from crio_native.errors import FailedPrecondition, Unimplemented


@click.command("isolation")
@click.argument("container")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def isolation(client: Client, container: str, as_json: bool) -> None:
    """Compare what a running container is kept from with what was asked for; exit with 1 when something is weaker.

    Needs root, on the node of the runtime.
    """
    # Only here: it reads the kernel's files, which no other command of a CRI client does.
    from crio_native.cli.isolation import print_report

    found = Node.read(client).container(container)
    answer = client.call(api.ContainerStatusRequest(container_id=found.id, verbose=True))
    pid, spec = told(answer.info)
    if answer.status.state == api.CONTAINER_CREATED:
        raise FailedPrecondition(f"{found} is created only: until it is started, its process is the runtime's own")
    if not pid:
        raise FailedPrecondition(f"{found} is not running: only a running container has an isolation to look at")
    sys.exit(print_report(pid, spec, as_json))


def told(info: Any) -> tuple[int, dict[str, Any]]:
    """(pid, config.json) of a verbose status.  Raises Unimplemented when the runtime does not tell them."""
    try:
        words = json.loads(info.get("info", "{}"))
        pid, spec = words["pid"], words["runtimeSpec"]
    except (ValueError, RecursionError, KeyError, TypeError):
        pid, spec = None, None
    if not isinstance(pid, int) or not isinstance(spec, dict):
        raise Unimplemented("this runtime's verbose status does not tell a container's pid and runtimeSpec")
    return pid, spec
