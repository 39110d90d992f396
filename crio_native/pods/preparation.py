"""What a container needs on disk before a runtime makes it: its bundle, root file system, volumes and config.json.

`prepare` puts together what the modules about single subjects say (`spec`, `userns`, `image_volumes`); `release`
undoes it.  The life cycle around it is `containers`'.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from crio_native.config.tables import RuntimeHandler
from crio_native.errors import FailedPrecondition
from crio_native.images import roots
from crio_native.linux.cgroup import hierarchy
from crio_native.oci.runtime import Overlay, UserRequest
from crio_native.oci.spec import normalise
from crio_native.pods import (
    apparmor,
    declared_volumes,
    high_performance,
    image_volumes,
    io_classes,
    pod_annotations,
    refusals,
    seccomp_notifier,
    selinux,
    spec,
    spec_resources,
    trees,
    userns,
)
from crio_native.pods.node import Node, Stage
from crio_native.pods.records import Container, Layout, Pod
from crio_native.pods.values import ContainerConfig, Resources

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """absent_sources: host directories to make for the time that the container takes to be made."""

    spec: dict[str, Any]
    user: UserRequest
    overlay: Overlay | None
    absent_sources: list[str]


def prepare(
    node: Node,
    pod: Pod,
    container: Container,
    image_config: Mapping[str, Any],
    handler: RuntimeHandler,
    pid_path: str,
    stage: Stage,
) -> Prepared:
    """Make the bundle and its spec.  Raises as `spec.container_spec` and `image_volumes.mount_all`; what is made until
    then is the caller's to release."""
    layout = node.layout
    bundle = layout.bundle(container.id)
    labels = selinux.of_container(pod, container.config.linux.security_context, node.settings, node.host)
    selinux.check_policy(labels)
    os.makedirs(bundle / "rootfs", 0o700)
    os.mkdir(layout.run_dir(container.id), 0o700)
    if container.image_volumes:
        stage("mounting the image volumes")
    volumes = image_volumes.mount_all(
        container.image_volumes,
        container.config.mounts,
        node.images,
        bundle,
        user_namespace=str(layout.pins(pod.id)["user"]) if pod.userns else "",
        label=labels.files,
    )
    declared = _declared(node, container, image_config)
    bound = node.config.image.image_volumes == "bind"
    stage("making the configuration")
    built = spec.container_spec(
        pod,
        container,
        image_config,
        handler,
        spec.Node(node.settings, node.host, layout, node.profiles),
        pid_path,
        volumes,
        declared_volumes.binds(declared, bundle, userns.root_of(pod.userns)) if bound else (),
        wishes(node, pod, container.config, handler),
    )
    _join_classes(node, pod, container, handler, built.spec)
    _notify(node, pod, container, handler, built.spec)
    apparmor.ensure(built.spec["process"]["apparmorProfile"])
    for warning in built.warnings:
        log.warning("container %s: %s", container.id, warning)
    stage("preparing the root file system")
    overlay = node.images.prepare_root(container.image_id, bundle)
    if pod.userns is not None:
        if overlay is None:
            raise FailedPrecondition(
                "a user namespace needs overlays of the kernel: storage_driver vfs, btrfs and mount_program have none"
            )
        overlay = userns.map_root(overlay, pod.userns)
    if not bound:
        with refusals.of_container(container.config, node.settings.bind_mount_prefix, image_config):
            declared_volumes.make(declared, bundle, overlay, built.user, pod.userns, str(layout.pins(pod.id)["user"]))
    (bundle / "config.json").write_text(json.dumps(built.spec))
    return Prepared(built.spec, built.user, overlay, built.absent_sources)


def _declared(node: Node, container: Container, image_config: Mapping[str, Any]) -> list[str]:
    """The volumes that the image declares, if they are to have any effect."""
    if node.config.image.image_volumes == "ignore":
        return []
    return declared_volumes.paths(image_config, {normalise(mount.container_path) for mount in container.config.mounts})


def _join_classes(node: Node, pod: Pod, container: Container, handler: RuntimeHandler, oci: dict[str, Any]) -> None:
    """The classes of block I/O and of RDT that the annotations name.  RDT's are whoever's made them: they count where
    the handler allows the annotation.  Raises InvalidArgument, FailedPrecondition."""
    settings, annotations = node.settings, (container.config.annotations, pod.config.annotations)
    if settings.blockio_config_file:
        field, name = io_classes.class_of("blockio", container.config.metadata.name, *annotations)
        if name:
            limits = node.block_io.limits(settings.blockio_config_file, field, name, again=settings.blockio_reload)
            oci["linux"]["resources"]["blockIO"] = limits
    field, name = io_classes.class_of("rdt", container.config.metadata.name, *annotations)
    if name and any("io.kubernetes.cri.rdt-class".startswith(prefix) for prefix in handler.allowed_annotations):
        oci["linux"]["intelRdt"] = io_classes.rdt_group(field, name)


def _notify(node: Node, pod: Pod, container: Container, handler: RuntimeHandler, oci: dict[str, Any]) -> None:
    """Have somebody listen to what the seccomp profile forbids, if the pod wants that.  Raises InvalidArgument."""
    name, linux = container.config.metadata.name, oci["linux"]
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, node.settings.workloads, name)
    action = seccomp_notifier.action(allowed)
    if action and linux.get("seccomp"):
        linux["seccomp"] = node.notifiers.listen(
            container.id,
            container.name,
            linux["seccomp"],
            stop=action == "stop",
            defaults=handler.runtime_type == "builtin",
        )


def resources(node: Node, pod: Pod, config: ContainerConfig, handler: RuntimeHandler) -> Resources:
    """A container's resources: those asked for, with what its workload and its annotations say.  Raises
    InvalidArgument."""
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, node.settings.workloads, config.metadata.name)
    asked = allowed.resources(config.linux.resources)
    spec_resources.check_cpusets(asked, "config.linux.resources")
    asked = wishes(node, pod, config, handler).limits(asked)
    return replace(asked, unified={**asked.unified, **allowed.unified()})


def wishes(node: Node, pod: Pod, config: ContainerConfig, handler: RuntimeHandler) -> high_performance.Wishes:
    """What the annotations of a latency-sensitive pod ask for this container.  Raises InvalidArgument,
    FailedPrecondition."""
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, node.settings.workloads, config.metadata.name)
    asked = allowed.resources(config.linux.resources)
    found = high_performance.wishes(allowed, asked, pod.cgroup, node.settings.shared_cpuset)
    if found.no_balancing and hierarchy().version_of("cpuset") != 1:
        raise FailedPrecondition("cpu-load-balancing.crio.io needs cpusets of cgroup v1, which this host does not have")
    return found


def label_volumes(node: Node, pod: Pod, container: Container, handler: RuntimeHandler, stage: Stage) -> None:
    """Give the volumes that ask for it the container's own label.  Raises InvalidArgument, StepFailed."""
    config = container.config
    labels = selinux.of_container(pod, config.linux.security_context, node.settings, node.host)
    if not labels.files:
        return
    allowed = pod_annotations.Allowed(pod.config.annotations, handler, node.settings.workloads, config.metadata.name)
    for index, mount in enumerate(config.mounts):
        if mount.selinux_relabel and mount.image is None:
            path = os.path.realpath(node.settings.bind_mount_prefix + mount.host_path)
            selinux.check_relabel(path, f"config.mounts[{index}]")
            stage(f"relabelling {path}")
            selinux.relabel(path, labels.files, trust_top=allowed.is_set("skip_relabel"))


def release(layout: Layout, container_id: str) -> None:
    """Remove the bundle with all that is mounted in it; nothing happens when it is gone."""
    bundle = layout.bundle(container_id)
    image_volumes.unmount_all(bundle)
    roots.release(bundle)
    trees.remove_tree(bundle)
