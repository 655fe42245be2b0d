"""Methods by name."""

from __future__ import annotations

import sys
import warnings

from fastmtl.methods.alignedmtl import AlignedMTL
from fastmtl.methods.base import Method, Weighting
from fastmtl.methods.cagrad import CAGrad
from fastmtl.methods.config import ConFIG
from fastmtl.methods.dbmtl import DBMTL
from fastmtl.methods.dualproj import DualProj
from fastmtl.methods.excessmtl import ExcessMTL
from fastmtl.methods.fairgrad import FairGrad
from fastmtl.methods.graddrop import GradDrop
from fastmtl.methods.gradvac import GradVac
from fastmtl.methods.imtlg import IMTLG
from fastmtl.methods.krum import Krum
from fastmtl.methods.mean import Mean
from fastmtl.methods.mgda import MGDA
from fastmtl.methods.moco import MoCo
from fastmtl.methods.modo import MoDo
from fastmtl.methods.nashmtl import NashMTL
from fastmtl.methods.pcd import PCD
from fastmtl.methods.pcgrad import PCGrad
from fastmtl.methods.random_weights import RandomWeights
from fastmtl.methods.sdmgrad import SDMGrad
from fastmtl.methods.state import StatefulMethod
from fastmtl.methods.sum import Sum
from fastmtl.methods.upgrad import UPGrad

CLASSES: tuple[type[Method], ...] = (
    PCGrad,
    Sum,
    Mean,
    RandomWeights,
    MGDA,
    CAGrad,
    IMTLG,
    ConFIG,
    NashMTL,
    FairGrad,
    AlignedMTL,
    UPGrad,
    DualProj,
    Krum,
    GradVac,
    PCD,
    SDMGrad,
    MoDo,
    GradDrop,
    DBMTL,
    MoCo,
    ExcessMTL,
)
# those that can't be made without arguments
WITH_ARGUMENTS = ("CRMOGM", "Every", "ParetoMTL", "TrimmedMean")
METHODS: dict[str, type[Method]] = {m.__name__.lower(): m for m in CLASSES}


def get(method: str | Weighting) -> Weighting:
    """The method of that name with its default arguments; a method or a callable comes back as it is.

    Names are the classes' in lower case; other cases are accepted.

    Raises:
        ValueError: no method has that name, or one that can't be made without arguments.
        TypeError: neither a name, nor a `Method`, nor a callable `[T, T] -> [T]`.

    Example:
        >>> get("pcgrad")
        PCGrad('sum')
    """
    if isinstance(method, str):
        for name in WITH_ARGUMENTS:
            if method.lower() == name.lower():
                raise ValueError(f"method: {name} takes arguments: pass an instance, {name}(...)")
        if method.lower() not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(sorted(METHODS))}, or an instance of "
                f"{', '.join(WITH_ARGUMENTS)} (classes in fastmtl.methods), got {method!r}"
            )
        return METHODS[method.lower()]()
    if isinstance(method, type):
        raise TypeError(f"method: expected an instance, got the class {method.__name__}: write {method.__name__}()")
    if any(kind.__name__ == "Aggregator" and kind.__module__.startswith("torchjd.") for kind in type(method).__mro__):
        name = type(method).__name__
        raise TypeError(f"method: TorchJD's {name} takes a Jacobian, not a Gram matrix: {_instead_of(type(method))}")
    if isinstance(method, Method) or callable(method):
        return method
    raise TypeError(f"method: expected a name, a Method or a callable [T, T] -> [T], got {type(method).__name__}")


def _instead_of(aggregator: type) -> str:
    """What to write for an aggregator of TorchJD: the method of that name, or its weighting of a Gram matrix."""
    name, package = aggregator.__name__, sys.modules.get("torchjd.aggregation")
    own = "RandomWeights" if name == "Random" else name
    ways = [f"write fastmtl.methods.{own}(...)"] if own.lower() in METHODS or own in WITH_ARGUMENTS else []
    # of the others weightings take the Jacobian too, if there are any; these look at its number of rows alone
    of_gram = name in ("Constant", "Mean", "Random", "Sum")
    of_gram = of_gram or any(kind.__name__ == "GramianWeightedAggregator" for kind in aggregator.__mro__)
    if of_gram and hasattr(package, f"{name}Weighting"):
        ways.append(f"pass its weighting, {name}Weighting(...)")
    return ", or ".join(ways) if ways else "pass a callable [T, T] -> [T]"


def for_one_call(method: str | Weighting) -> Weighting:
    """`get`, for calls that may be one of many: by name a method with state begins anew at each, which warns."""
    found = get(method)
    if isinstance(method, str) and isinstance(found, StatefulMethod):
        name = type(found).__name__
        warnings.warn(
            f"method={method!r}: {name} keeps state from one step to the next, and a name makes a new one at each "
            f"call: pass an instance that lasts, fastmtl.methods.{name}()",
            stacklevel=3,
        )
    return found
