"""CNI plugins that are programs: run as the CNI specification says, versions 0.1.0 to 1.1.0.

Here belong the program's environment, input, output and time limit, results and errors of all versions, the record of
what was attached, and its removal in the end.  Which plugins there are is `conflist`'s.
"""
