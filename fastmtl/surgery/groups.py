"""Groups of shared parameters, each with a Gram matrix and weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from fastmtl.parameters import Params, describe, read_params

GroupsArgument: TypeAlias = str | Sequence[Params] | Mapping[str, Params]
BY_NAME = ("layer", "tensor")


class Groups(NamedTuple):
    """Which group each parameter is in.

    Attributes:
        names: of the groups.
        members: parameter -> position in `names`.
        all_of_them: whether the caller chose the groups, so that one without a shared parameter counts too.
    """

    names: list[str]
    members: dict[Tensor, int]
    all_of_them: bool

    def divide(self, shared: Sequence[Tensor], named: Mapping[Tensor, str] | None = None) -> dict[str, list[int]]:
        """Group -> positions of its parameters among the shared ones.

        Raises:
            ValueError: a shared parameter that is in no group.
        """
        found: dict[str, list[int]] = {name: [] for name in self.names}
        for i, p in enumerate(shared):
            if p not in self.members:
                name = str(i) if named is None else named.get(p, str(i))
                raise ValueError(f"groups: {describe(p, name)} is shared, and in none of the groups")
            found[self.names[self.members[p]]].append(i)
        return {name: positions for name, positions in found.items() if positions or self.all_of_them}


def read_groups(
    groups: GroupsArgument,
    params: Params | None,
    named: Mapping[Tensor, str],
    rename: Callable[[Mapping[Tensor, str]], dict[Tensor, str]] = dict,
) -> Groups:
    """The groups as a caller gives them, checked.

    Args:
        params: what the caller gave as such.
        named: the parameters, with the names that errors give them.
        rename: from parameters that a module shows to those that get gradients.

    Raises:
        TypeError: no name, sequence or mapping of parameters.
        ValueError: an unknown name; no group; a tensor that is no parameter; a parameter in two
            groups; layers of what is no module.
    """
    if isinstance(groups, str):
        if groups not in BY_NAME:
            raise ValueError(f"groups: expected 'layer', 'tensor' or groups of parameters, got {groups!r}")
        if groups == "layer" and not isinstance(params, nn.Module):
            raise ValueError("groups='layer': expected a module as params, whose names tell the layers")
        plain = {p: name.strip("'") for p, name in named.items()}
        if groups == "layer":
            plain = {p: name.rpartition(".")[0] or "(top)" for p, name in plain.items()}
        names = list(dict.fromkeys(plain.values()))
        at = {name: i for i, name in enumerate(names)}
        return Groups(names, {p: at[name] for p, name in plain.items()}, False)
    if isinstance(groups, Mapping):
        given = {str(name): part for name, part in groups.items()}
        if len(given) != len(groups):
            raise ValueError(f"groups: expected different names, got {list(groups)}")
    elif isinstance(groups, Sequence):
        given = {str(i): part for i, part in enumerate(groups)}
    else:
        raise TypeError(
            "groups: expected 'layer', 'tensor' or groups of parameters (a list of modules or of lists, or a dict of "
            f"them), got {type(groups).__name__}"
        )
    if not given:
        raise ValueError("groups: expected at least one group, got none")
    members: dict[Tensor, int] = {}
    called = [f"groups[{name!r}]" if isinstance(groups, Mapping) else f"groups[{i}]" for i, name in enumerate(given)]
    for i, part in enumerate(given.values()):
        # a layer without parameters is in no group, and none: `groups=list(model.trunk)` has activations too
        bare = isinstance(part, nn.Module)
        for p, shown in rename(read_params(part, called[i], allow_empty=bare)).items():
            shown = named.get(p, shown)
            outside = not p.requires_grad or (params is not None and p not in named)
            if not isinstance(p, nn.Parameter) and outside:  # one that is frozen, or left out, may be in its module
                raise ValueError(f"{shown}: expected a parameter, got another tensor of shape {list(p.shape)}")
            if members.setdefault(p, i) != i:
                raise ValueError(f"groups: {describe(p, shown)} is in {called[members[p]]} and in {called[i]}")
    if not members:
        raise ValueError("groups: expected groups of parameters, got modules without any")
    filled = sorted(set(members.values()))
    names = list(given)
    return Groups([names[i] for i in filled], {p: filled.index(i) for p, i in members.items()}, True)
