"""The kernel, wrapped: system calls and the small formats that go with them.

The only room that imports ctypes; it imports nothing else of this program but `errors`, and the standard library.
Policy (what a container should get) does not belong here, only mechanism (how the kernel is asked for it).
"""
