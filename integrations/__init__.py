"""Adapters: one file per family of models, which describes its scans or heads and where their tokens sit.

Packaged as ``mamba_attn.integrations``; the core finds these files by name and does not import them.

===========  =======================================================================  ==================================
file         recognises                                                               routes of a mixer
===========  =======================================================================  ==================================
vim          Vision Mamba and forks: ``A_b_log``, ``bimamba_type`` or ``biscan``      raster order, and its reversal
mamba        mamba_ssm's Mamba: ``A_log``, ``conv1d``, ``x_proj``, ``dt_proj``        raster order
vmamba       VMamba's SS2D (arXiv 2401.10166) and its forks: ``A_logs``, ``Ds``       rows, columns, and both reversed
mambavision  MambaVision (arXiv 2407.08083): ``conv1d_x`` and ``conv1d_z``            one per window, in raster order
timm_vit     ViT and DeiT of timm: ``qkv``, ``proj``, ``num_heads``, ``scale``;       none: softmax attention of all
             MambaVision's attention                                                  tokens, or those of one window
===========  =======================================================================  ==================================

They recognise a module by what they read of it, and are used where their output is the module's own. A family that is
not listed needs one more file here; ``mamba_attn.testing.check_adapter`` runs the laws it must obey.
"""

if __name__ == "integrations":
    raise ImportError("import mamba_attn.integrations instead: importing under two names duplicates every class.")
