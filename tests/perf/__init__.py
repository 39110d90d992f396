"""Measurements of ours beside a peer of the same run: `make bench`.

Here belong programs that time and weigh.  No test asserts a time; the table shows the goal beside the number.
"""
