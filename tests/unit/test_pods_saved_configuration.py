"""What a pod's checkpoint may say of the pod that is made of it, and how it is read: without CRIU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.checkpoint_service import CheckpointService
from crio_native.cri.translate import from_message
from crio_native.errors import CrioError, InvalidArgument, NotFound, PermissionRefused
from crio_native.pods import checkpoint, saved_configuration
from crio_native.pods.values import ContainerConfig, PodConfig

UNCONFINED = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
LOCAL = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="/profile")
DEFAULT = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)


def pod(**linux: Any) -> pb.PodSandboxConfig:
    return pb.PodSandboxConfig(linux=pb.LinuxPodSandboxConfig(**linux))


def pod_security(**fields: Any) -> pb.PodSandboxConfig:
    return pod(security_context=pb.LinuxSandboxSecurityContext(**fields))


def security(**fields: Any) -> pb.ContainerConfig:
    context = pb.LinuxContainerSecurityContext(**fields)
    return pb.ContainerConfig(linux=pb.LinuxContainerConfig(security_context=context))


def namespaces(**modes: Any) -> pb.NamespaceOption:
    return pb.NamespaceOption(**modes)


PODS = {
    "log_directory": pb.PodSandboxConfig(log_directory="/etc/cron.d"),
    "cgroup_parent": pod(cgroup_parent="/"),
    "annotations": pb.PodSandboxConfig(annotations={"io.kubernetes.cri-o.userns-mode": "auto"}),
    "sysctls": pod(sysctls={"kernel.shm_rmid_forced": "1"}),
    "privileged": pod_security(privileged=True),
    "selinux_options": pod_security(selinux_options=pb.SELinuxOption(type="spc_t")),
    "seccomp": pod_security(seccomp=UNCONFINED),
    "apparmor": pod_security(apparmor=LOCAL),
    "network": pod_security(namespace_options=namespaces(network=pb.NODE)),
    "pid": pod_security(namespace_options=namespaces(pid=pb.NODE)),
    "ipc": pod_security(namespace_options=namespaces(ipc=pb.NODE)),
    "userns_options": pod_security(namespace_options=namespaces(userns_options=pb.UserNamespace(mode=pb.POD))),
}
CONTAINERS = {
    "host_path": pb.ContainerConfig(mounts=[pb.Mount(container_path="/host", host_path="/")]),
    "devices": pb.ContainerConfig(devices=[pb.Device(container_path="/dev/sda", host_path="/dev/sda")]),
    "annotations": pb.ContainerConfig(annotations={"cdi.k8s.io/x": "vendor.com/class=dev"}),
    "devices.crio.io": pb.ContainerConfig(annotations={"devices.crio.io": "/dev/fuse"}),
    "CDI_devices": pb.ContainerConfig(CDI_devices=[pb.CDIDevice(name="vendor.com/class=dev")]),
    "privileged": security(privileged=True),
    "capabilities": security(capabilities=pb.Capability(add_capabilities=["SYS_ADMIN"])),
    "selinux_options": security(selinux_options=pb.SELinuxOption(type="spc_t")),
    "seccomp": security(seccomp=LOCAL),
    "apparmor": security(apparmor=UNCONFINED),
    "pid": security(namespace_options=namespaces(pid=pb.TARGET, target_id="other")),
    "masked_paths": security(masked_paths=["/nothing"]),
    "readonly_paths": security(readonly_paths=["/nothing"]),
}


@pytest.mark.parametrize("field", PODS)
def test_what_no_checkpoint_gives_a_pod(field: str) -> None:
    config = from_message(PodConfig, PODS[field], "config")
    with pytest.raises(PermissionRefused, match=rf"here: .*{field}.* is not given by a checkpoint"):
        saved_configuration.check_pod(config, "here")


@pytest.mark.parametrize("field", CONTAINERS)
def test_what_no_checkpoint_gives_a_container(field: str) -> None:
    config = from_message(ContainerConfig, CONTAINERS[field], "config")
    with pytest.raises(PermissionRefused, match=rf"here: .*{field}.* is not given by a checkpoint"):
        saved_configuration.check_container(config, "here")


def test_what_one_may_say() -> None:
    harmless = pod_security(namespace_options=namespaces(pid=pb.CONTAINER), seccomp=DEFAULT)
    saved_configuration.check_pod(from_message(PodConfig, harmless, "config"), "here")
    container = security(seccomp=DEFAULT, capabilities=pb.Capability(drop_capabilities=["ALL"]))
    container.annotations["io.kubernetes.container.hash"] = "1"
    container.mounts.append(pb.Mount(container_path="/data", image=pb.ImageSpec(image="data")))
    saved_configuration.check_container(from_message(ContainerConfig, container, "config"), "here")


def test_what_the_request_gives_is_not_the_checkpoints() -> None:
    about = {"config": {"log_directory": "/etc"}, "containers": [{"devices": [{"host_path": "/dev/sda"}]}]}
    request = pb.RestorePodRequest(checkpoint_path="/saved", config=PODS["privileged"])
    request.container_configs.append(CONTAINERS["privileged"])
    assert CheckpointService._pod_config(request, about).linux.security_context.privileged
    [container] = CheckpointService._container_configs(request, about)
    assert container.linux.security_context.privileged and not container.devices
    for refused in (CheckpointService._pod_config, CheckpointService._container_configs):
        with pytest.raises(PermissionRefused, match=r"/saved/pod\.json: (config|containers\[0\]): "):
            refused(pb.RestorePodRequest(checkpoint_path="/saved"), about)


def test_the_file_is_a_file(tmp_path: Path) -> None:
    """Whoever opens a FIFO waits for its other end."""
    file = tmp_path / "pod.json"
    with pytest.raises(NotFound):
        checkpoint.about_pod(str(tmp_path))
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)):
        make(file)
        with pytest.raises(InvalidArgument, match="must be a regular file"):
            checkpoint.about_pod(str(tmp_path))
        file.rename(tmp_path / str(make))
    file.write_text(" " * (5 << 20))
    with pytest.raises(CrioError, match="may have at most"):
        checkpoint.about_pod(str(tmp_path))
    file.write_text(json.dumps({"config": {}}))
    assert checkpoint.about_pod(str(tmp_path)) == {"config": {}}
