"""The wire: code generated from the .proto files in ``api/``, and the generator.

Nothing here is written by hand but this line and `generate`; only `cri/` and `cli/` import it.
"""
