"""A small GPT and a small vision transformer, of registered linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .initialization import Size, check_widths, choose, seeded

PATCH = 4


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


def vit(
    size: Size = "full",
    *,
    shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A vision transformer, images (B, *shape), flat or not, -> (B, num_classes).

    Patches of 4x4 pixels become tokens by one convolution; learned positions, the blocks of `gpt` without the mask, layer
    normalization, the mean over tokens instead of a class token (ours, which is usual since), a linear head. Weights as
    PyTorch draws them, those of positions normal with standard deviation 0.02.

    Args:
        size: "full": 4 layers of width 128 with 4 heads, 0.81M parameters; "small": 2 layers of width 32 with 2 heads.
        shape: channels, height and width, at least 4 pixels each; what is left over at the edges is not seen.
        num_classes: number of outputs.
        seed: draws the parameters; the global generator stays where it is.
        dtype: of the parameters, drawn in float32 and then converted, so both precisions start alike.

    Raises:
        ValueError: ``size`` is neither "full" nor "small", ``shape`` has not three numbers, an image has no patch, or a
            number is not positive.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929).

    >>> vit("small")(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if len(shape) != 3 or min(shape[1:]) < PATCH:
        raise ValueError(
            f"shape is {tuple(shape)}, expected (channels, height, width) with images of at least {PATCH}x{PATCH} pixels. "
            "Pass for example (3, 32, 32)."
        )
    check_widths((*shape, num_classes), at_least=2)
    layers, width, heads = choose(size, full=(4, 128, 4), small=(2, 32, 2))
    with seeded(seed):
        model = ViT(num_classes, shape, layers, width, heads)
    return model.to(dtype)


class ViT(nn.Module):
    """Patches, transformer blocks, and a linear head; see `vit`."""

    def __init__(self, num_classes: int, shape: Sequence[int], layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Unflatten(1, tuple(shape)))
        self.patches = nn.Conv2d(shape[0], width, PATCH, stride=PATCH)
        self.position = nn.Embedding((shape[1] // PATCH) * (shape[2] // PATCH), width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.image(x)).flatten(2).mT
        positions = torch.arange(tokens.shape[1], device=x.device).expand(tokens.shape[:2])
        return self.head(self.norm(self.blocks(tokens + self.position(positions))).mean(1))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Softmax attention, to what came before or to all, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
