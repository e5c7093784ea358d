"""``python -m mamba_attn``: the command line, for what starts modules, as ``torchrun -m mamba_attn`` does."""

import sys

from mamba_attn.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
