"""A small language model of Mamba layers (arXiv 2312.00752): ids of tokens in, the next token's logits out."""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.models._layers import RMSNorm
from mamba_attn.models._options import checked
from mamba_attn.models.vim_mixer import VimMixer

SPLITS = ("bytes", "words", "symbols")
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]")


class Vocabulary:
    """The tokens of a language model, and how text is cut into them.

    Args:
        tokens: by id; of bytes none are given.
        split: "bytes" of UTF-8; "words", numbers and signs in lower case, <end> behind them, <unk> for others; or
            "symbols" between spaces.

    Raises:
        ValueError: another ``split``.
    """

    def __init__(self, tokens: Sequence[str], split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"Vocabulary(split={split!r}): expected one of {SPLITS}.")
        self.tokens = list(tokens) if split != "bytes" else [chr(number) for number in range(256)]
        self.split = split
        self._ids = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text: str) -> Int[Tensor, "1 tokens"]:
        """Return the ids of a text.

        Raises:
            ValueError: empty text, a symbol that is not known.
        """
        if self.split == "bytes":
            ids = list(text.encode())
        elif self.split == "words":
            ids = [self._ids.get(word, self._ids["<unk>"]) for word in split_words(text)] + [self._ids["<end>"]]
        else:
            unknown = [word for word in text.split() if word not in self._ids]
            if unknown:
                raise ValueError(f"encode({text!r}): {unknown[0]!r} is no token; expected {' '.join(self.tokens)}.")
            ids = [self._ids[word] for word in text.split()]
        if not text.strip():
            raise ValueError(f"encode({text!r}): the text is empty; give at least one token.")
        return torch.tensor([ids])

    def decode(self, ids: Int[Tensor, " tokens"]) -> list[str]:
        """Return the tokens of ids as they are read; a space stands before words and symbols."""
        gap = "" if self.split == "bytes" else " "
        return [f"{gap if number else ''}{self.tokens[int(token)]}" for number, token in enumerate(ids)]


def split_words(text: str) -> list[str]:
    """Return words, numbers and signs, in lower case."""
    return _WORDS.findall(text.lower())


class LanguageLayer(nn.Module):
    """Norm, mixer and residual of one layer."""

    def __init__(self, features: int, mixer: VimMixer) -> None:
        super().__init__()
        self.norm = RMSNorm(features)
        self.mixer = mixer

    def forward(self, x: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch tokens features"]:
        """Return the residual stream after this layer."""
        mixed: Tensor = self.mixer(self.norm(x))
        return x + mixed


class MambaLanguageModel(nn.Module):
    """Embedding, ``depth`` causal Mamba layers, norm; the next token's logits are products with the embeddings.

    Args:
        vocabulary: number of tokens.
        embed_dim: size of a token.
        depth: number of layers.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        num_classes: classes of the whole text, read at its last token; 0 predicts the next token at every position.

    Raises:
        ValueError: a number out of range.
        TypeError: an unknown option, or a value of another type.

    Example:
        >>> MambaLanguageModel(vocabulary=18)(torch.zeros(1, 24, dtype=torch.int64)).shape
        torch.Size([1, 24, 18])
    """

    @checked
    def __init__(
        self,
        *,
        vocabulary: int,
        embed_dim: int = 48,
        depth: int = 2,
        d_state: int = 8,
        d_conv: int = 4,
        expand: int = 2,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.num_classes = num_classes
        self.embedding = nn.Embedding(vocabulary, embed_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

        def mixer() -> VimMixer:
            made = VimMixer(embed_dim, d_state=d_state, d_conv=d_conv, expand=expand, both_ways=False)
            nn.init.normal_(made.out_proj.weight, std=0.02 / math.sqrt(2 * depth))
            return made

        self.layers = nn.ModuleList(LanguageLayer(embed_dim, mixer()) for _ in range(depth))
        self.norm_f = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch *tokens logits"]:
        """Return the next token's logits at every position, or the logits of the classes."""
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm_f(x)
        if self.head is None:
            return F.linear(x, self.embedding.weight)
        logits: Tensor = self.head(x[:, -1])
        return logits
