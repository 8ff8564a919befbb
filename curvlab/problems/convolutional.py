"""The papers' convolutional networks: builders for any depth and width, and the named ones, in full and small size.

Where a paper gives a name and no layout, the layout here is called ours. Images come as (B, *shape) or flat. Layers are
registered modules that are called once, nothing is done in place, and nothing is random, so that every network can be
differentiated twice, and example by example, in evaluation mode. All start from He's normal initialization with variance
2/fan_in (1/fan_in in the head) and zero biases, which is ours where the papers say no more than "standard".

Every network takes the same options:

- ``shape``: channels, height and width of the images, default (3, 32, 32);
- ``num_classes``: number of outputs, default 10;
- ``seed``: draws the parameters; the global generator stays where it is;
- ``dtype``: of the parameters, drawn in float32 and then converted, so both precisions start alike;

the named ones also a ``size``: "full", or "small" for the same layers with few channels. All raise a ValueError where a
size, a width or a shape makes no sense. Parameter counts: `curvlab.problems.PARAMETERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from .blocks import BasicBlock, PreActivationBlock
from .initialization import Size, check_widths, choose, he, seeded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What every network takes beside its layers."""

    shape: Sequence[int]
    num_classes: int
    seed: int
    dtype: torch.dtype


def plain(
    widths: Sequence[int],
    pool_after: Sequence[int],
    *,
    batch_norm: bool = False,
    pool: type[nn.Module] = nn.MaxPool2d,
    **options: Unpack[Options],
) -> nn.Sequential:
    """3x3 convolutions with relu one after the other, global average pooling, and a linear head.

    Args:
        widths: channels of each convolution.
        pool_after: convolutions, counted from 1, after which height and width are halved, as long as the images are
            larger than one pixel (ours, so that small images can be used).
        batch_norm: normalize before each relu; the convolutions then have no bias.
        pool: what takes the place of 2x2 pixels: ``nn.MaxPool2d`` or ``nn.AvgPool2d``.
    """

    def layers(channels: int, side: int) -> list[nn.Module]:
        out: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise((channels, *widths)), start=1):
            out.append(nn.Conv2d(c_in, c_out, 3, padding=1, bias=not batch_norm))
            out += [nn.BatchNorm2d(c_out), nn.ReLU()] if batch_norm else [nn.ReLU()]
            if i in pool_after and side > 1:
                out.append(pool(2))
                side //= 2
        return out

    return _network(layers, widths, **options)


def residual(widths: Sequence[int], strides: Sequence[int], **options: Unpack[Options]) -> nn.Sequential:
    """A 3x3 convolution, basic blocks with batch normalization, global average pooling, and a linear head.

    Args:
        widths: channels of the first convolution and of each block.
        strides: of each block.

    Source: He et al. 2016 (arXiv 1512.03385), with the 3x3 stem that is usual for CIFAR.
    """

    def layers(channels: int, side: int) -> list[nn.Module]:
        stem = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        return [*stem, *(BasicBlock(*cs, stride) for cs, stride in zip(pairwise(widths), strides, strict=True))]

    return _network(layers, widths, **options)


def wide_resnet(
    depth: int, factor: int, *, base: int = 16, skipinit: bool = False, **options: Unpack[Options]
) -> nn.Sequential:
    """WRN-depth-factor: pre-activation blocks of 1, 2 and 4 times base·factor channels, (depth - 4)/6 of each.

    Args:
        depth: number of convolutions along the deepest path, the projections' included in the paper's count: 6k + 4.
        factor: how much wider than `base` the blocks are.
        base: channels of the first convolution.
        skipinit: no batch normalization, but a scalar at the end of each branch that starts at 0.

    Raises:
        ValueError: a depth that is not 6k + 4.

    Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 1; without dropout. SkipInit: De and Smith 2020
    (arXiv 2002.10444).

    >>> with torch.device("meta"):  # nothing is drawn
    ...     sum(p.numel() for p in wide_resnet(28, 10).parameters())
    36479194
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth is {depth}, expected 6k + 4 with k at least 1. Pass for example 10, 16 or 28.")
    widths = [base] + [base * factor * times for times in (1, 2, 4) for _ in range(blocks)]

    def layers(channels: int, side: int) -> list[nn.Module]:
        out: list[nn.Module] = [nn.Conv2d(channels, base, 3, padding=1, bias=skipinit)]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            out.append(PreActivationBlock(c_in, c_out, 2 if i in (blocks, 2 * blocks) else 1, skipinit=skipinit))
        return [*out, nn.Identity() if skipinit else nn.BatchNorm2d(widths[-1]), nn.ReLU()]

    return _network(layers, widths, **options)


def cnn6(size: Size = "full", *, batch_norm: bool = False, **options: Unpack[Options]) -> nn.Sequential:
    """Lee's 6CNN by name: six 3x3 convolutions with relu, average pooling after the second and the fourth.

    Lee gives 0.51M parameters, which do not determine a layout: ours has 32-32-64-64-192-192 channels and 510,250
    parameters; small, 8-8-8-16-16-16 as in `cnn`.

    Args:
        batch_norm: Lee uses it for the heat maps of section 5; for section 4 the text does not say (default: without).

    >>> cnn6("small")(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    widths = choose(size, full=(32, 32, 64, 64, 192, 192), small=(8, 8, 8, 16, 16, 16))
    return plain(widths, (2, 4), batch_norm=batch_norm, pool=nn.AvgPool2d, **options)


def resnet9(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """Lee's ResNet-9 by name: nine 3x3 convolutions, a stem and four basic blocks with batch normalization.

    Lee gives 2.3M parameters and He et al. as the source, who have no network of that depth: ours has 64-64-128-256-256
    channels, strides 1, 2, 2, 1, and 2.41M parameters; small, an eighth of the channels.
    """
    width = choose(size, full=64, small=8)
    return residual([width * times for times in (1, 1, 2, 4, 4)], (1, 2, 2, 1), **options)


def resnet18(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """ResNet-18 with the stem for CIFAR, one 3x3 convolution without pooling, and batch normalization (Novack).

    11.17M parameters; small, an eighth of the channels. Novack says "standard initialization and batch normalization";
    the stem is the usual one for 32x32 images (ours).
    """
    width = choose(size, full=64, small=8)
    return residual([width * times for times in (1, 1, 1, 2, 2, 4, 4, 8, 8)], (1, 1, 2, 1, 2, 1, 2, 1), **options)


def vgg11(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """VGG11 without batch normalization (Novack, appendix D).

    The convolutions of Simonyan and Zisserman 2015 (arXiv 1409.1556), column A; their three large linear layers are
    made for ImageNet, and one linear head takes their place (ours): 9.23M parameters. Small: an eighth of the channels.
    """
    width = choose(size, full=64, small=8)
    return plain([width * times for times in (1, 2, 4, 4, 8, 8, 8, 8)], (1, 2, 4, 6, 8), **options)


def vgg16_bn(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """VGG16 with batch normalization (Novack, appendix C).

    Column D of Simonyan and Zisserman 2015 (arXiv 1409.1556) with one linear head (ours): 14.72M parameters.
    Small: an eighth of the channels.
    """
    width = choose(size, full=64, small=8)
    widths = [width * times for times in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8)]
    return plain(widths, (2, 4, 7, 10, 13), batch_norm=True, **options)


def wrn_10_1(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """Smith's 10-1 Wide-ResNet with SkipInit and without batch normalization: 78k parameters; small, a quarter of the
    channels. Smith gives no other detail: biases and initialization are ours."""
    return wide_resnet(10, 1, base=choose(size, full=16, small=4), skipinit=True, **options)


def wrn_16_4(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """Smith's 16-4 Wide-ResNet with SkipInit and without batch normalization: 2.75M parameters; small, a quarter of the
    channels. Smith gives no other detail: biases and initialization are ours."""
    return wide_resnet(16, 4, base=choose(size, full=16, small=4), skipinit=True, **options)


def wrn_28_2(size: Size = "full", **options: Unpack[Options]) -> nn.Sequential:
    """WRN-28-2 with batch normalization (Lee): 1.47M parameters; small, a quarter of the channels.

    The 36M that Lee gives for this name fit WRN-28-10, `wide_resnet(28, 10)`, with 36.5M.
    """
    return wide_resnet(28, 2, base=choose(size, full=16, small=4), **options)


def _network(
    layers: Callable[[int, int], list[nn.Module]],
    widths: Sequence[int],
    *,
    shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Reshape images, apply layers(channels, shorter side), average over pixels, and classify."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, expected (channels, height, width). Pass for example (3, 32, 32).")
    check_widths((*widths, num_classes), at_least=2)
    with seeded(seed):
        body = layers(shape[0], min(shape[1:]))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
        model = he(nn.Sequential(nn.Flatten(), nn.Unflatten(1, tuple(shape)), *body, *head))
    return model.to(dtype)
