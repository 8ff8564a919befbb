"""A small GPT of registered linear layers, and the loss of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .initialization import Size, check_widths, choose, seeded


def gpt(
    size: Size = "full",
    *,
    shape: Sequence[int] = (32,),
    num_classes: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A decoder-only transformer, tokens (B, T) -> logits of the next token (B, T, num_classes).

    As GPT-2: learned positions, layer normalization before attention and before a gelu layer of four times the width,
    weights normal with standard deviation 0.02, divided by √(2·layers) at the end of each branch. Unlike it, the head
    has weights of its own and nothing is dropped (ours: tied weights have no layer-wise per-example gradients).
    Queries, keys and values are three linear layers, and attention is a plain softmax, which has all derivatives.

    Args:
        size: "full": 4 layers of width 128 with 4 heads, 0.80M parameters; "small": 2 layers of width 32 with 2 heads.
        shape: (T,), the longest sequence.
        num_classes: number of tokens in the vocabulary.
        seed: draws the parameters; the global generator stays where it is.
        dtype: of the parameters, drawn in float32 and then converted, so both precisions start alike.

    Raises:
        ValueError: ``size`` is neither "full" nor "small", ``shape`` is not one number, or a number is not positive.

    Source: Radford et al. 2019, Language models are unsupervised multitask learners.

    >>> gpt("small")(torch.zeros(2, 32, dtype=torch.int64)).shape
    torch.Size([2, 32, 16])
    """
    if len(shape) != 1:
        raise ValueError(f"shape is {tuple(shape)}, expected (T,), the length of a sequence. Pass for example (32,).")
    check_widths((*shape, num_classes), at_least=2)
    layers, width, heads = choose(size, full=(4, 128, 4), small=(2, 32, 2))
    with seeded(seed):
        model = GPT(num_classes, shape[0], layers, width, heads)
    return model.to(dtype)


class GPT(nn.Module):
    """Embeddings, transformer blocks, and a linear head; see `gpt`."""

    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        # One row of positions per example: the embedding's per-example gradients need the examples first.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal softmax attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        future = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + future).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))
