"""The visual analytics of attention between patches, in a browser: two linked views of a store of attention.

Imported on demand only: the page needs dash, the views behind it (``views``, ``source``, ``state``) plotly alone.
``report`` freezes the same views into one file that needs no server.
"""
