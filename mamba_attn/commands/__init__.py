"""The command line, ``mamba-attn``: one file per command.

A command parses its options, calls the library and prints; flags are named here and nowhere below.
"""
