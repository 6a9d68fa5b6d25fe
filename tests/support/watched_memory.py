"""Operations counted, and the memory that they allocate."""

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def storages_of(tree: object) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in (x.untyped_storage() for x in tensors)}


class Watch(TorchDispatchMode):
    """Counts operations, and keeps track of the memory that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()
        self.storages = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation] += 1
        result = operation(*args, **(kwargs or {}))
        given = storages_of((args, kwargs))
        for identity, storage in storages_of(result).items():
            if identity not in given:
                self.storages[identity] = StorageWeakRef(storage), storage.nbytes()
        return result

    def living_bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())
