"""The CRI v1: the gRPC server and its two services.

Here belong the socket, the translation between protobuf and the values of `pods/`, deadlines and retries, and the map
from errors to status codes.  What a pod or an image is, is decided in `pods/` and `images/`.
"""
