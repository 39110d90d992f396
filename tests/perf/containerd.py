"""containerd from Debian's package as a CRI peer: a daemon of its own in a scratch directory, with runc.

Its pods are on the host's network, where no network plugin has a part in what is compared, or on the network that
containerd's own documentation sets up: Debian's CNI plugins bridge and portmap.  The daemon lives in a network
namespace of its own, so bridge and rules go with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.api.runtime.v1 import api_pb2_grpc
from crio_native.cli import busybox
from crio_native.cli.scratch import MESSAGE_SIZE
from crio_native.errors import NotFound, Unavailable
from tests.perf.peers import CGROUP, program, run

IMAGE = "localhost/bench:latest"
START_SECONDS = 30.0
_CONFIG = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"
]
[grpc]
address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{directory}/net.d"
bin_dir = "/usr/lib/cni"
"""
_SUBNET = "10.198.0.0/16"
_PLUGINS = Path("/usr/lib/cni")


class Containerd:
    """Raises NotFound without the package, Unavailable when it does not come up.  `close` removes everything."""

    def __init__(self, directory: Path, network: Any = cri.NODE, *, pulls: bool = False) -> None:
        """network: the namespace mode of the pods' network, cri.NODE or cri.POD.  pulls: it has the host's own network,
        to reach a registry there, and no pods."""
        self.directory, self._network = directory, network
        directory.mkdir()
        if network == cri.POD:
            _write_network(directory)
        self.socket = directory / "containerd.sock"
        (directory / "config.toml").write_text(_CONFIG.format(directory=directory, image=IMAGE))
        command = [program("containerd")] if pulls else [program("unshare"), "--net", program("containerd")]
        command += ["--config", str(directory / "config.toml"), "--log-level", "error"]
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        options = [("grpc.max_receive_message_length", MESSAGE_SIZE), ("grpc.default_authority", "localhost")]
        self.channel = grpc.insecure_channel(f"unix://{self.socket}", options=options)
        self.runtime = api_pb2_grpc.RuntimeServiceStub(self.channel)
        try:
            self._wait()
            self._import_image()
        except BaseException:
            self.close()
            raise

    def pod(self, name: str) -> Any:
        """The configuration of a pod."""
        namespaces = cri.NamespaceOption(network=self._network, pid=cri.CONTAINER)
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=name),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=f"{CGROUP}/containerd",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces),
            ),
        )

    def close(self) -> None:
        try:
            for pod in self.runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=10).items:
                self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=120)
                self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=120)
        except grpc.RpcError:
            pass  # it never came up
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.runtime.Version(cri.VersionRequest(), timeout=2)
                return
            except grpc.RpcError as error:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    text = (self.directory / "log").read_text()[-2000:]
                    raise Unavailable(f"containerd did not come up: {error.code()}: {text}") from None
                time.sleep(0.1)

    def _import_image(self) -> None:
        """The image that ours runs, but whose own command goes on: it is the pods' pause too."""
        layout = self.directory / "layout"
        busybox.build_layout(layout, IMAGE)
        index = json.loads((layout / "index.json").read_text())
        [descriptor] = index["manifests"]
        manifest = json.loads(_blob(layout, descriptor).read_text())
        config = json.loads(_blob(layout, manifest["config"]).read_text())
        config["config"] = {**config.get("config", {}), "Entrypoint": ["/bin/sleep"], "Cmd": ["100000"]}
        manifest["config"] = _put(layout, manifest["config"], config)
        names = {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": IMAGE}
        index["manifests"] = [{**_put(layout, descriptor, manifest), "annotations": names}]
        (layout / "index.json").write_text(json.dumps(index))
        archive = self.directory / "image.tar"
        run("tar", "-C", layout, "-cf", archive, ".")
        run(program("ctr"), "--address", self.socket, "--namespace", "k8s.io", "images", "import", archive)


def _write_network(directory: Path) -> None:
    """The network of containerd's documentation, with its state below `directory`.  Raises NotFound."""
    if not (_PLUGINS / "bridge").exists():
        raise NotFound("program", f"{_PLUGINS}/bridge", "install Debian's package containernetworking-plugins")
    ipam = {
        "type": "host-local",
        "dataDir": f"{directory}/leases",
        "ranges": [[{"subnet": _SUBNET}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "promiscMode": True, "ipam": ipam}
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    (directory / "net.d").mkdir()
    text = json.dumps({"cniVersion": "1.0.0", "name": "bench", "plugins": plugins})
    (directory / "net.d/10-bench.conflist").write_text(text)


def _blob(layout: Path, descriptor: dict[str, Any]) -> Path:
    return layout / "blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")


def _put(layout: Path, old: dict[str, Any], value: Any) -> dict[str, Any]:
    text = json.dumps(value).encode()
    digest = hashlib.sha256(text).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(text)
    return {"mediaType": old["mediaType"], "digest": f"sha256:{digest}", "size": len(text)}
