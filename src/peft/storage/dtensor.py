# SPDX-License-Identifier: Apache-2.0
"""Base weights that are sharded over processes as DTensors, and the activations of such layers.

Tensor parallelism splits the activations between layers: [.., out/n] after a colwise layer, [.., in/n] before a rowwise
one. Adapters are whole and equal on every process, so that files, optimisers and all methods need nothing special; what
crosses processes is chosen for that: gradients of what is whole must come out whole. Processes of one group must draw
the same random numbers (dropout), as the libraries that split models demand for the base model too.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Those that DeepSpeed ZeRO-3 partitions are whole inside; changes are those of the first process."""
    parted = [p for p in parameters if hasattr(p, "ds_id") and p.numel() == 0]  # else whole already
    if not parted:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parted, modifier_rank=0):
        yield


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "placements") and any(p.is_shard() for p in tensor.placements)


# `placements` tells a DTensor: torch.compile finds attributes by `hasattr`, but not its methods.
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes; they must all come here. An ordinary tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "placements") else tensor  # type: ignore[attr-defined]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "placements") else tensor  # type: ignore[attr-defined]


def like(value: torch.Tensor, reference: Any) -> torch.Tensor:
    """This process's part of `value`, which is whole on all of them, by the sharding of `reference`."""
    if hasattr(value, "placements") or not hasattr(reference, "placements"):
        return local(value)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = reference.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=reference.placements).to_local()


def put(reference: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole `value` into a tensor that may be sharded."""
    local(reference.data).copy_(like(value, reference))


@torch.no_grad()
def rewrite(parameter: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`change` a whole parameter that may be sharded; with ZeRO also the optimiser's own copy, which overwrites it."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed import utils  # pyright: ignore[reportMissingImports]

        value = utils.safe_get_full_fp32_param(parameter)
        if value is not None:  # the engine has an optimiser
            utils.safe_set_full_fp32_param(parameter, change(value))
    with gathered([parameter]):
        put(parameter, change(whole(parameter.detach())))


class Split:
    """How the linear layer around a sharded weight [out, in] has its activations split between processes."""

    def __init__(self, weight: Any, n_in: int, n_out: int):
        self.n_in, self.n_out = n_in, n_out
        axis = next(i for i, p in enumerate(weight.placements) if p.is_shard())
        mesh = weight.device_mesh
        self.mesh = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[axis]]
        self.inside = False  # activations are whole now
        self.input = False  # whether they come in parts, as seen in the running call
        self.output: bool | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The whole input for one that may come in parts."""
        self.input = x.shape[-1] != self.n_in
        return self.gathered(x, self.n_in) if self.input else x

    def call(self, base: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The whole output of the base layer for a whole input."""
        y = base(self.part(x) if self.input else x, *args, **kwargs)
        self.output = y.shape[-1] != self.n_out
        return self.gathered(y, self.n_out) if self.output else y

    @torch.no_grad()
    def learn(self, base: Any, x: torch.Tensor) -> None:
        """Find out once how the output comes, for paths that do without the base layer."""
        if self.output is None:
            self.call(base, x)

    def give(self, y: torch.Tensor) -> torch.Tensor:
        """The output in parts, where the base layer gives parts."""
        return self.part(y) if self.output else y

    # ---- crossings; in brackets the gradient's way back
    def gathered(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """All parts of the last dimension [its own part of an equal gradient]."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size((*part.shape[:-1], size))
        strides = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(
            part, self.mesh, [Shard(part.dim() - 1)], run_check=False, shape=shape, stride=strides
        )
        return sharded.redistribute(placements=[Replicate()]).to_local()

    def part(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This process's part of a tensor that is equal everywhere [all parts]."""
        from torch.distributed.tensor import Replicate, Shard

        return self._from([Replicate()], tensor).redistribute(placements=[Shard(dim % tensor.dim())]).to_local()

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes [the equal gradient]."""
        from torch.distributed.tensor import Partial, Replicate

        return self._from([Partial()], tensor).redistribute(placements=[Replicate()]).to_local()

    def shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is equal everywhere, about to be used for parts [the sum]."""
        from torch.distributed.tensor import Partial, Replicate

        return self._from([Replicate()], tensor).to_local(grad_placements=[Partial()])

    def _from(self, placements: list[Any], tensor: torch.Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(tensor, self.mesh, placements, run_check=False)


def agree(weight: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Copies of what is drawn at random, equal on all processes that hold parts of `weight`."""
    if is_sharded(weight):
        for tensor in tensors:
            if not tensor.is_meta and not hasattr(tensor, "placements"):
                for axis in range(weight.device_mesh.ndim):
                    torch.distributed.broadcast(tensor.data, group=weight.device_mesh.get_group(axis), group_src=0)
