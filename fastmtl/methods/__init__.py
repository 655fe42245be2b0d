"""Gradient methods: each turns the Gram matrix of T task gradients into T weights."""

from __future__ import annotations

from fastmtl.methods.alignedmtl import AlignedMTL
from fastmtl.methods.base import Method, Seen, Weighting, check_needs, group_weights_of, needs_of, weights_of
from fastmtl.methods.cagrad import CAGrad
from fastmtl.methods.config import ConFIG
from fastmtl.methods.crmogm import CRMOGM
from fastmtl.methods.dbmtl import DBMTL
from fastmtl.methods.dualproj import DualProj
from fastmtl.methods.every import Every
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
from fastmtl.methods.names import for_one_call, get
from fastmtl.methods.nashmtl import NashMTL
from fastmtl.methods.paretomtl import ParetoMTL
from fastmtl.methods.pcd import PCD
from fastmtl.methods.pcgrad import PCGrad
from fastmtl.methods.random_weights import RandomWeights
from fastmtl.methods.sdmgrad import SDMGrad
from fastmtl.methods.sum import Sum
from fastmtl.methods.trimmed_mean import TrimmedMean
from fastmtl.methods.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DBMTL",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Every",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "Mean",
    "Method",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "ParetoMTL",
    "RandomWeights",
    "SDMGrad",
    "Seen",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "Weighting",
    "check_needs",
    "for_one_call",
    "get",
    "group_weights_of",
    "needs_of",
    "weights_of",
]
