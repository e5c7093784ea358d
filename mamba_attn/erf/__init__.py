"""Effective receptive fields: how far away the pixels and tokens lie that a place of the output depends on.

``receptive_field`` measures it by gradients, ``reach`` by the attention matrices; ``figure`` and ``page`` show both.
"""
