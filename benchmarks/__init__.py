"""Training of the micro models, and the measurements that every quoted figure comes from."""

import mamba_attn  # noqa: F401 - timm imports torchvision, whose import it repairs
