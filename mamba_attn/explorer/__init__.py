"""The visual analytics of attention between patches, in a browser: two linked views of a store of attention.

Imported on demand only, because it needs dash.
"""
