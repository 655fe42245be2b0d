"""What torch's wrappers say of the ranks: `DistributedDataParallel`, `fully_shard`, or a process group."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.distributed.dtensors import not_fully_shard
from fastmtl.distributed.ranks import WAYS, Ranks
from fastmtl.parameters import Params, describe

# of autograd, which these wrappers put around a module: each output is one input, and nothing is joined
WRAPPER_NODES = frozenset({"_DDPSinkBackward", "RegisterPostBackwardFunctionBackward"})


def find_ranks(
    params: Params | None,
    shared: Params | None,
    process_group: Any,
    call: str,
) -> Ranks | None:
    """The ranks that take part in a call with these arguments; None: this process alone.

    Args:
        params, shared: what may be, or contain, `DistributedDataParallel` or `fully_shard` modules.
        process_group: the ranks to average over, whatever the modules are.
        call: the name that errors begin with.

    Raises:
        TypeError: `process_group` is no process group; modules or parameters of other kinds of parallelism.
        ValueError: a group that this rank is not in, or for modules that have their own; several different groups.
        RuntimeError: several ranks, and no way to know what to do; modules that don't reduce their gradients.
    """
    if process_group is not None:
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{call}: process_group: expected a group that this rank is in")
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"{call}: process_group: expected a process group or None, got {type(process_group).__name__}"
            )
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = [x for x in (params, shared) if isinstance(x, nn.Module)]
    _refuse_fsdp1(modules, call)
    states = _fully_shard_params(modules)
    if states:
        if process_group is not None:
            raise ValueError(
                f"{call}: process_group: expected None for a fully_shard module, which has its own device mesh"
            )
        check_reduces(modules, call)
        return _sharding(states, call)
    if process_group is not None:
        if dist.get_rank(process_group) < 0:
            raise ValueError(f"{call}: process_group: expected a group that this rank is in")
        return _averaging(process_group, None, modules)
    wrapped = [m for top in modules for m in top.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        size = dist.get_world_size()
        if size == 1:
            return None
        raise RuntimeError(
            f"{call}: {size} ranks, and no way to know how their gradients belong together; they would silently "
            f"diverge: {WAYS}"
        )
    groups = {tuple(dist.get_process_group_ranks(m.process_group)): m.process_group for m in wrapped}
    if len(groups) > 1:
        raise ValueError(
            f"{call}: the DistributedDataParallel modules have different process groups, of ranks "
            f"{' and '.join(str(list(ranks)) for ranks in groups)}: one Gram matrix needs one group"
        )
    managed = {}
    for m in wrapped:
        if m.mixed_precision is not None:
            raise TypeError(
                f"{call}: DistributedDataParallel(mixed_precision=) puts other parameters into the graph: use "
                "torch.autocast instead"
            )
        for name, p in m.module.named_parameters():
            if name not in m.parameters_to_ignore:
                managed[p] = p
    return _averaging(wrapped[0].process_group, managed, modules)


def _averaging(
    group: dist.ProcessGroup, managed: Mapping[Tensor, Tensor] | None, modules: Sequence[nn.Module]
) -> Ranks | None:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return None
    waits = any(isinstance(m, nn.SyncBatchNorm) and m.training for top in modules for m in top.modules())
    return Ranks([group], ranks, managed, same_passes=waits)


def _sharding(states: Sequence[Any], call: str) -> Ranks:
    mesh = None
    managed: dict[Tensor, Tensor] = {}
    for state in states:
        p = state.sharded_param
        name = repr(getattr(state, "_param_fqn", None) or state._module_info.param_name)
        # sharded, or sharded within replicas; what was a DTensor before is tensor-parallel
        kinds = "".join("S" if x.is_shard() else "R" if x.is_replicate() else "?" for x in p.placements)
        if getattr(state, "is_dtensor", False) or kinds not in ("S", "RS"):
            raise not_fully_shard(p, name, call)
        if mesh is None:
            mesh, placements = p.device_mesh, p.placements
        elif p.device_mesh != mesh:
            raise ValueError(
                f"{call}: {describe(p, name)} is on {p.device_mesh}, others on {mesh}: one Gram matrix needs one mesh"
            )
        managed[p] = p
        for attribute in ("_unsharded_param", "_sharded_post_forward_param"):
            if getattr(state, attribute, None) is not None:
                managed[getattr(state, attribute)] = p
    assert mesh is not None
    groups = [mesh.get_group(d) for d in range(mesh.ndim)]
    apart = [group for group, placement in zip(groups, placements, strict=True) if placement.is_shard()]
    return Ranks(groups, mesh.mesh.flatten().tolist(), managed, apart, same_passes=True)


def _fsdp(name: str) -> Any:
    """A class of torch.distributed.fsdp; None where it was not imported, so that nobody uses it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)


def _fully_shard_groups(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Module name and torch's record of each group of parameters that `fully_shard` made in these modules."""
    kind = _fsdp("FSDPModule")
    for top in modules if kind is not None and dist.is_initialized() else ():
        for name, m in top.named_modules():
            if isinstance(m, kind):
                state = m._get_fsdp_state()
                groups = getattr(state, "_fsdp_param_groups", None)
                if groups is None:  # before torch 2.11
                    groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
                for group in groups:
                    yield name or type(m).__name__, group


def _fully_shard_params(modules: Sequence[nn.Module]) -> list[Any]:
    """torch's records of the parameters under `fully_shard` in these modules, each once."""
    found = {id(state): state for _, group in _fully_shard_groups(modules) for state in group.fsdp_params}
    return list(found.values())


def check_reduces(modules: Sequence[nn.Module], call: str) -> None:
    """Raises where a fully_shard module was told not to reduce gradients: none would arrive."""
    for name, group in _fully_shard_groups(modules):
        if not (group.reduce_grads and group.all_reduce_grads):
            raise RuntimeError(
                f"{call}: module {name!r} has set_requires_gradient_sync(False), so that no rank gets a reduced "
                "gradient: set it to True, and accumulate in a GradientBank"
            )


def _refuse_fsdp1(modules: Sequence[nn.Module], call: str) -> None:
    kind = _fsdp("FullyShardedDataParallel")
    for top in modules if kind is not None else ():
        for name, m in top.named_modules():
            if isinstance(m, kind):
                raise TypeError(
                    f"{call}: module {name or type(m).__name__!r} is a FullyShardedDataParallel, which flattens its "
                    "parameters: use torch.distributed.fsdp.fully_shard"
                )
