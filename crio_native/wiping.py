"""`crio-native wipe`: what the daemon does at its start after a boot or an upgrade, done without it, or done to all."""

from __future__ import annotations

from crio_native import assembly, daemon, history
from crio_native.config import Config


def wipe(config: Config, *, force: bool) -> tuple[int, int]:
    """Remove stopped pods after a boot and images after an upgrade; with `force` all of both.  How many of each.

    Raises FailedPrecondition while a daemon uses the state directory.
    """
    daemon.prepare(config)
    with assembly.held(config) as keep, assembly.launched() as launchers:
        past = history.read(config.crio)
        from crio_native.pods.recovery import recover, wipe_images, wipe_pods

        with assembly.opened(config, launchers) as parts:
            keep()
            recover(parts.node, parts.sandboxes, parts.containers, booted=past.booted)
            pods = wipe_pods(parts.node, parts.sandboxes, stopped_only=not force) if past.booted or force else 0
            images = wipe_images(parts.node) if past.upgraded or force else 0
    return pods, images
