"""Data as a fixed list of batches of any pytree, however it was given; and the mini-batches that training draws."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from .guard import random_states
from .ranks import Ranks

# Samplers that visit each example once an epoch, on all ranks together; of others nobody knows.
VISIT_ALL = (SequentialSampler, DistributedSampler)
VISIT_ALL_BY_NAME = {"LengthGroupedSampler", "DistributedLengthGroupedSampler", "ShardSampler"}  # of transformers


class Examples:
    """N examples in a fixed order, kept as one or more batches.

    Batches of equal trailing shapes are joined into one, so that the split in which the data came is forgotten. Of several
    ranks each keeps its part of the examples; positions and indices are those among all N.

    Attributes:
        size: N.
        offsets: positions at which the batches that are kept begin, and the end of the last.
    """

    def __init__(self, data: Any, *, pairs: bool, ranks: Ranks | None = None) -> None:
        ranks = ranks or Ranks()
        with torch.inference_mode(False), random_states():  # reading may draw random numbers
            read, n = _read(data, pairs, ranks)
            batches = [tree_map(_ordinary, batch) for batch in read]
        if pairs:
            batches = [_labelled_pair(batch) for batch in batches]
        odd = next((batch for batch in batches if pairs and not _is_pair(batch)), None)
        if odd is not None:
            raise ValueError(
                f"a batch is a {type(odd).__name__}; expected (inputs, targets), or a mapping with 'labels'. For other "
                "batches pass loss=batch_loss(f) with f(model, batch) -> (B,)"
            )
        if not batches:
            raise ValueError(
                "data holds no batch; pass (inputs, targets), a Dataset, a DataLoader or a list of batches"
            )
        sizes = [batch_size(batch) for batch in batches]
        self.size = sum(sizes) if n is None else n
        part = ranks.part(self.size)
        if n is None and ranks.count > 1:
            batches, sizes = _within(batches, sizes, part)
        if len(batches) > 1 and len({_signature(batch) for batch in batches}) == 1:
            batches = [_join(batches)]
            sizes = [sum(sizes)]
        if part.stop == part.start:  # one example is kept, which shows what examples look like
            sizes = [0]
        self.batches = batches
        self.offsets = [part.start + sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._versions = [leaf._version for batch in batches for leaf in leaves(batch)]

    def __len__(self) -> int:
        return self.size

    def chunks(self, chunk_size: int) -> Iterator[tuple[slice, Any]]:
        """Consecutive pieces of at most `chunk_size` examples: (their positions, the batch)."""
        for batch, start, stop in zip(self.batches, self.offsets, self.offsets[1:], strict=False):
            for lo in range(start, stop, chunk_size):
                hi = min(lo + chunk_size, stop)
                whole = hi - lo == stop - start
                yield slice(lo, hi), batch if whole else take(batch, slice(lo - start, hi - start))

    def select(self, index: Tensor) -> list[tuple[Tensor, Any]]:
        """The examples at `index`, in that order, as a batch for each run of them in one stored batch: (index, batch)."""
        index = index.cpu()
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.size):
            raise IndexError(
                f"indices run from {int(index.min())} to {int(index.max())}; expected 0 to {self.size - 1}"
            )
        if not len(index):
            raise ValueError("the indices are empty; pass at least one")
        index = index[(index >= self.offsets[0]) & (index < self.offsets[-1])]  # those that are kept here
        if not len(index):
            return []
        if len(self.batches) == 1:
            return [(index, take(self.batches[0], index - self.offsets[0]))]
        owner = torch.bucketize(index, torch.tensor(self.offsets[1:]), right=True)
        runs = torch.unique_consecutive(owner, return_counts=True)
        parts = zip(index.split(runs[1].tolist()), runs[0].tolist(), strict=True)
        return [(here, take(self.batches[i], here - self.offsets[i])) for here, i in parts]

    def first(self, count: int) -> tuple[slice, Any]:
        """At most `count` examples of the largest batch: (their positions, the batch)."""
        i = max(range(len(self.batches)), key=lambda i: self.offsets[i + 1] - self.offsets[i])
        start = self.offsets[i] if self.offsets[i + 1] > self.offsets[i] else 0  # an empty part shows the first of all
        size = min(count, batch_size(self.batches[i]))
        return slice(start, start + size), take(self.batches[i], slice(0, size))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, such as by a copy on another device."""
        self.batches = [tree_map(function, batch) for batch in self.batches]
        self._versions = [leaf._version for batch in self.batches for leaf in leaves(batch)]

    def require_unchanged(self) -> None:
        """Refuse data that somebody has changed in place since they were read.

        Raises:
            ValueError: naming the fix.
        """
        if self._versions != [leaf._version for batch in self.batches for leaf in leaves(batch)]:
            raise ValueError(
                "the data have been changed in place since the objective was made, so its numbers would be of other data; "
                "pass copies, such as data=(x.clone(), y.clone()), or make the Objective anew"
            )

    def nbytes(self) -> int:
        return sum(leaf.nbytes for batch in self.batches for leaf in leaves(batch))


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply `function` to every tensor of nested tuples, lists, mappings and dataclasses; leave the rest alone."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: tree_map(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: tree_map(function, getattr(tree, f.name)) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **changed)
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """All tensors of a pytree."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def batch_size(batch: Any) -> int:
    """The common length of the first dimension of the tensors of a batch.

    Raises:
        ValueError: no tensor with a batch dimension, lengths that differ, or length zero.
    """
    lengths = {leaf.shape[0] for leaf in leaves(batch) if leaf.ndim}
    if len(lengths) != 1:
        shapes = [tuple(leaf.shape) for leaf in leaves(batch)]
        raise ValueError(
            f"the tensors of a batch have shapes {shapes}; expected the same number of examples first in "
            "each. Stack the examples along dimension 0"
        )
    (length,) = lengths
    if length == 0:
        raise ValueError("a batch is empty; drop batches without examples")
    return length


def take(batch: Any, index: slice | Tensor) -> Any:
    """Some examples of a batch; tensors without a batch dimension stay whole."""

    def pick(leaf: Tensor) -> Tensor:
        if not leaf.ndim:
            return leaf
        return leaf[index] if isinstance(index, slice) else leaf.index_select(0, index.to(leaf.device))

    return tree_map(pick, batch)


@dataclass(frozen=True)
class Batches:
    """Mini-batches of a data set of `n` examples as indices, one (batch_size,) int64 tensor a step.

    By default every batch is drawn independently of the others, as the theory of S_b assumes: without replacement
    within the batch, or with it. ``epochs=True`` walks through the data, each example once an epoch:

        order="new"          every epoch is shuffled anew; a last incomplete batch is dropped
        order="fixed"        the data is cut into batches once, and every epoch takes them in the same order
        order="shuffled"     the same batches in every epoch, in an order of its own each time
        order="alternating"  the same batches, forward in one epoch and backward in the next (Smith et al. 2021, sec. 2.2)

    ``batch_size=n`` without replacement is full-batch descent, in the order of the data. Iterating again gives the same
    batches again; `since` continues from a step.

    Raises:
        ValueError: a batch size below 1, or above n without replacement; epochs with replacement; an unknown order, or one
            without epochs; batches of fixed composition of a size that does not divide n, which would leave the same
            examples out in every epoch.

    Example:
        >>> [batch.tolist() for batch in Batches(4, 4, steps=1)]
        [[0, 1, 2, 3]]
        >>> twice = list(Batches(4, 2, steps=4, epochs=True, order="alternating"))
        >>> twice[0].tolist() == twice[3].tolist() and twice[1].tolist() == twice[2].tolist()
        True
    """

    n: int
    batch_size: int
    steps: int
    replacement: bool = False
    epochs: bool = False
    seed: int = 0
    order: Literal["new", "fixed", "shuffled", "alternating"] = "new"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.batch_size > self.n and not self.replacement):
            raise ValueError(
                f"batch_size is {self.batch_size}; expected 1 to {self.n}, the number of examples, without replacement"
            )
        if self.epochs and self.replacement:
            raise ValueError(
                "epochs=True walks through shuffled data and cannot draw with replacement; drop one of them"
            )
        if self.order not in ("new", "fixed", "shuffled", "alternating"):
            raise ValueError(f"order is {self.order!r}; expected 'new', 'fixed', 'shuffled' or 'alternating'")
        if self.order != "new" and not self.epochs:
            raise ValueError(f"order={self.order!r} is an order of epochs; pass epochs=True with it")
        if self.order != "new" and self.n % self.batch_size:
            raise ValueError(
                f"{self.n} examples in fixed batches of {self.batch_size} leave {self.n % self.batch_size} out in every "
                "epoch; choose a batch_size that divides n"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        return self.since(0)

    def since(self, step: int) -> Iterator[Tensor]:
        """The batches of steps `step`, `step` + 1, ...: exactly those that the whole iteration has there.

        Costs the random numbers of the steps before: one permutation for each epoch, or for each batch drawn on its own.
        """
        return itertools.islice(self._endless(), step, self.steps)

    def describe(self) -> dict[str, Any]:
        """What a run's configuration says of them."""
        return dataclasses.asdict(self)

    @property
    def partition(self) -> Tensor | None:
        """The batches of fixed composition, (n / batch_size, batch_size) indices in the order of "fixed"; None without."""
        if self.order == "new":
            return None
        return self._cut(torch.Generator().manual_seed(self.seed))

    def _cut(self, generator: torch.Generator) -> Tensor:
        if self.batch_size == self.n:
            return torch.arange(self.n)[None]
        count = self.n // self.batch_size
        return torch.randperm(self.n, generator=generator)[: count * self.batch_size].view(count, self.batch_size)

    def _endless(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.batch_size == self.n and not self.replacement:
            while True:
                yield torch.arange(self.n)
        if self.epochs:
            yield from self._epochs(generator)
        while True:
            if self.replacement:
                yield torch.randint(self.n, (self.batch_size,), generator=generator)
            else:
                yield torch.randperm(self.n, generator=generator)[: self.batch_size]

    def _epochs(self, generator: torch.Generator) -> Iterator[Tensor]:
        batches = self._cut(generator)
        for epoch in itertools.count():
            if epoch and self.order == "new":
                batches = self._cut(generator)
            if self.order == "shuffled":
                yield from batches[torch.randperm(len(batches), generator=generator)]
            else:
                yield from batches.flip(0) if self.order == "alternating" and epoch % 2 else batches


def _read(data: Any, pairs: bool, ranks: Ranks) -> tuple[list[Any], int | None]:
    """The batches in `data`, and None; of a data set that is read item by item those of this rank, and the number of all.

    `pairs`: a batch is (inputs, targets), which settles what a pair of tensors is.
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            raise TypeError(
                "the DataLoader streams an IterableDataset, which cannot be read twice in the same order; "
                "pass a list of batches: data=list(loader)"
            )
        _visits_all(data)
        if data.batch_sampler is None:  # automatic batching is off: an item of the dataset is a batch
            return _items(data.dataset, lambda items: data.collate_fn(items[0]), 1)[0], None
        return _items(data.dataset, data.collate_fn, data.batch_size or 1, ranks)
    if isinstance(data, IterableDataset):
        raise TypeError(
            "data is an IterableDataset, which cannot be read twice in the same order; pass a list of batches: "
            "data=list(DataLoader(dataset, batch_size=...))"
        )
    if isinstance(data, Dataset):
        return _items(data, default_collate, 1, ranks)
    if hasattr(data, "features") and hasattr(data, "__getitem__"):  # of Hugging Face datasets
        return _items(data, default_collate, 1, ranks)
    if isinstance(data, Tensor | Mapping) or (dataclasses.is_dataclass(data) and not isinstance(data, type)):
        return [data], None
    if isinstance(data, Sequence):
        if pairs:
            whole = len(data) == 2 and not all(_is_pair(_labelled_pair(item)) for item in data)
        else:
            whole = isinstance(data, tuple) and all(isinstance(item, Tensor) for item in data)
        return [data] if whole else list(data), None
    raise TypeError(
        f"data is a {type(data).__name__}, which may not give the same batches twice; pass (inputs, targets) "
        "tensors, a Dataset, a DataLoader, or a list of batches such as list(iterator)"
    )


def _within(batches: list[Any], sizes: list[int], part: slice) -> tuple[list[Any], list[int]]:
    """What the positions `part` have of batches; the first example alone if that is nothing."""
    out, start = [], 0
    for batch, size in zip(batches, sizes, strict=True):
        lo, hi = max(part.start - start, 0), min(part.stop - start, size)
        if lo < hi:
            out.append((tree_map(torch.clone, take(batch, slice(lo, hi))), hi - lo))
        start += size
    out = out or [(tree_map(torch.clone, take(batches[0], slice(0, 1))), 0)]
    return [batch for batch, _ in out], [size for _, size in out]


def _visits_all(loader: DataLoader) -> None:
    """Refuse a loader that may leave examples out or take some twice: it would be read as its whole data set."""
    n, sampler = len(loader.dataset), loader.sampler  # type: ignore[arg-type]
    if loader.batch_size is None and loader.batch_sampler is not None:  # a sampler of batches was given
        sampler = batches = loader.batch_sampler
        if isinstance(batches, list | tuple):
            sampler = [i for batch in batches for i in batch]
        elif type(batches) is BatchSampler:
            sampler = batches.sampler
    if isinstance(sampler, RandomSampler):
        whole = not sampler.replacement and sampler.num_samples == n
    elif isinstance(sampler, list | tuple | range):
        whole = sorted(sampler) == list(range(n))
    else:
        whole = isinstance(sampler, VISIT_ALL) or type(sampler).__name__ in VISIT_ALL_BY_NAME
    if not whole:
        raise ValueError(
            f"the DataLoader draws by a {type(sampler).__name__}, which need not visit each example once, as a mean over "
            "the data set does; pass a DataLoader without it, or of torch.utils.data.Subset(dataset, indices), or the "
            "batches: list(loader)"
        )


def _items(
    dataset: Any, collate: Callable[[list[Any]], Any], group: int, ranks: Ranks | None = None
) -> tuple[list[Any], int]:
    """A map-style dataset, of which this rank reads its part in its own order, `group` items to a batch, and its length.

    Samplers are not asked: they may draw from global generators.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"{type(dataset).__name__} has no length; pass a list of batches")
    n = len(dataset)
    if n == 0:
        raise ValueError("the dataset is empty")
    for i in sorted({k * (n - 1) // 7 for k in range(8)}):
        first, *others = ([torch.nan_to_num(leaf) for leaf in leaves(collate([dataset[i]]))] for _ in range(4))
        if any(
            a.shape != b.shape or not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)
        ):
            raise ValueError(
                f"reading example {i} of the dataset twice gives different values, as random augmentation "
                "does; measure on a fixed set: pass the dataset without augmentation"
            )
    together = [
        [torch.nan_to_num(leaf) for leaf in leaves(collate([dataset[i] for i in range(min(group, n))]))]
        for _ in range(4 if group > 1 else 1)
    ]
    if any(not torch.equal(a, b) for other in together[1:] for a, b in zip(together[0], other, strict=True)):
        raise ValueError(
            "collating the same examples twice gives different values, as mixing them at random does; measure on a fixed "
            "set: pass the dataset, or a DataLoader without that collate_fn"
        )
    part = (ranks or Ranks()).part(n)
    groups = range(part.start, part.stop, group)
    batches = [collate([dataset[i] for i in range(lo, min(lo + group, part.stop))]) for lo in groups]
    return batches or [collate([dataset[0]])], n


def _labelled_pair(batch: Any) -> Any:
    """(inputs, targets) of a mapping with "labels" (or "label"); everything else as it is."""
    name = next((n for n in ("labels", "label") if n in batch), None) if isinstance(batch, Mapping) else None
    if name is None:
        return batch
    return {key: value for key, value in batch.items() if key != name}, batch[name]


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2


def _ordinary(tensor: Tensor) -> Tensor:
    """A detached tensor; one made in inference mode cannot be saved for backward and is copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _signature(batch: Any) -> tuple:
    shapes = tuple((leaf.shape[1:], leaf.dtype, leaf.device) if leaf.ndim else leaf.tolist() for leaf in leaves(batch))
    others: list[Any] = []
    _others(batch, others)
    return shapes, str(others)


def _others(tree: Any, found: list[Any]) -> None:
    """Everything in a pytree that is not a tensor, with its structure, for comparison."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            found.append(key)
            _others(value, found)
    elif isinstance(tree, list | tuple):
        found.append(type(tree).__name__)
        for value in tree:
            _others(value, found)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            _others(getattr(tree, field.name), found)
    elif not isinstance(tree, Tensor):
        found.append(tree)


def _join(batches: list[Any]) -> Any:
    columns = [
        torch.cat(parts) if parts[0].ndim else parts[0]
        for parts in zip(*(leaves(batch) for batch in batches), strict=True)
    ]
    remaining = iter(columns)
    return tree_map(lambda _: next(remaining), batches[0])
