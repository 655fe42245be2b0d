"""Run against an installed wheel, outside the checkout: ops and `backward` on the compiled backend.

`--backend reference`: on a system for which nothing is compiled.
"""

import argparse

import torch

import fastmtl
from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops.gradients import reference

parser = argparse.ArgumentParser()
parser.add_argument("--backend", default="cpu")
backend = parser.parse_args().backend
assert (dispatch.extension is not None) == (backend == "cpu"), dispatch.extension_error
assert "site-packages" in fastmtl.__file__, fastmtl.__file__
g = torch.randn(5, 1234)
order = ops.random_order(5)
with fastmtl.use_backend(backend):
    torch.testing.assert_close(ops.gram(g), g @ g.T, rtol=1e-4, atol=1e-3)
    expected = reference.pcgrad(g.double(), order).float()
    torch.testing.assert_close(ops.pcgrad(g, order), expected, rtol=1e-4, atol=1e-4)
    rows = [[x[:1000].reshape(10, 100), x[1000:]] for x in g]
    lists = torch.cat([x.reshape(-1) for x in ops.pcgrad(rows, order)])
    torch.testing.assert_close(lists, expected, rtol=1e-4, atol=1e-4)
    net = torch.nn.Linear(7, 3)
    surgery = fastmtl.backward([x.square().mean() for x in net(torch.randn(4, 7)).unbind(1)])
    assert net.weight.grad is not None and surgery.gram.shape == (3, 3)
print("torch", torch.__version__, "fastmtl", fastmtl.__version__, dispatch.build_info(), "ok")
