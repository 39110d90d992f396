"""crio-native: a Kubernetes container runtime in Python, with its own OCI executor."""

__version__ = "0.1.0"
