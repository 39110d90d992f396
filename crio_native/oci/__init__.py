"""The OCI runtime: config.json's model, the Runtime interface, and the implementations of it.

Knows nothing of pods, images or the CRI.
"""
