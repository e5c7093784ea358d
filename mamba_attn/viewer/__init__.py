"""Explore attention between patches in a browser: two linked views of a store.

Imported on demand: the page needs dash; the views behind it (``views``, ``source``, ``state``) need plotly only.
``report`` freezes the same views into one file that needs no server.
"""
