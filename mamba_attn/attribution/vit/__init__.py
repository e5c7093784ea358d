"""Methods for softmax attention: a vision transformer's maps, computed on the same records as a Mamba's.

They are baselines to compare Mamba models with; ``mamba_attn.attribution`` exports them.
"""
