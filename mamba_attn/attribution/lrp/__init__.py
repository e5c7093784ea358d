"""Layer-wise relevance propagation: one backward pass in which scans, gates, norms and activations act linearly.

``MambaLRP``, ``FrozenContribution`` and ``KeepAndRemoveLRP`` are the methods; the other files are the rules that
these, and the methods of ``vit``, install for that pass.
"""
