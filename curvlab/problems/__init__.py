"""Problems to measure on: models, data, and presets, most of which need no download. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "data": ("digits", "linear_regression", "sparse_regression"),
    "synthetic": ("sparse_classification", "synthetic_images", "markov_chain"),
    "images": ("cifar10", "cifar100", "stl10", "svhn", "fashion_mnist", "tiny_imagenet"),
    "models": ("mlp", "mlp_3x4096", "cnn", "linear"),
    "convolutional": (
        "plain", "residual", "wide_resnet",
        "cnn6", "resnet9", "resnet18", "vgg11", "vgg16_bn", "wrn_10_1", "wrn_16_4", "wrn_28_2",
    ),
    "transformer": ("gpt", "vit"),
    "timing": ("TIMED", "timed_problem"),
    "toy": ("diagonal_linear", "quadratic"),
    "registry": ("MODELS", "DATA", "PARAMETERS", "model", "load", "canonical"),
    "presets": ("Experiment", "PRESETS", "vary"),
    "experiments": ("build", "start", "final_point"),
    "sgd_and_flows": ("orders",),
    "studies": ("STUDIES", "Study", "Row", "study", "studies", "preset"),
    "augmentation": ("Augmented",),
}  # fmt: skip
_HOME = {name: file for file, names in _NAMES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"curvlab.problems has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"curvlab.problems.{_HOME[name]}"), name)
