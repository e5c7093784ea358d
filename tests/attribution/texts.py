"""Small language models in float64, and batches of ids with padding."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba_attn.models import vim_mixer
from mamba_attn.ops import selective_scan

VOCABULARY, FEATURES, TOKENS = 23, 6, 9


class Mixer(nn.Module):
    """Mamba's, in one direction; without biases, what is zero stays zero."""

    def __init__(self, features: int, states: int = 3) -> None:
        super().__init__()
        channels = 2 * features
        self.in_proj = nn.Linear(features, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, 4, padding=3, groups=channels, bias=False)
        self.x_proj = nn.Linear(channels, 2 + 2 * states, bias=False)
        self.dt_proj = nn.Linear(2, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.rand(channels))
        self.out_proj = nn.Linear(channels, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        record = vim_mixer.project(self, x)
        return vim_mixer.finish(self, record, selective_scan(record))


@dataclass
class Output:
    """As transformers have it: the hidden states have a result per text, too."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Words(nn.Module):
    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wrapped = wrapped
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.layers = nn.ModuleList(Mixer(FEATURES) for _ in range(2))
        self.norm = nn.RMSNorm(FEATURES)
        self.head = nn.Linear(FEATURES, VOCABULARY)
        self.double().eval()
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.ndim > 1 and "A_log" not in name:
                    value.mul_(2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> object:
        keep = 1.0 if attention_mask is None else attention_mask.unsqueeze(-1).to(torch.float64)
        x = self.embedding(input_ids) * keep
        for mixer in self.layers:
            x = (x + mixer(x)) * keep
        logits = self.head(self.norm(x))
        return Output(logits, (x,)) if self.wrapped else logits


def ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def padded(padding: int = 4) -> tuple[Tensor, Tensor]:
    """Two texts, the second padded on the left, and the mask."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :padding] = 0
    return ids(), mask
