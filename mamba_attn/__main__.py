"""``python -m mamba_attn``: the command line where a program must start a module, as ``torchrun -m mamba_attn`` does."""

import sys

from mamba_attn.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
