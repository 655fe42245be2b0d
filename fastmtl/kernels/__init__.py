"""In a checkout: leads to the Triton kernels in `kernels/` at its root, which a wheel installs in this place.

They have no `__init__.py` there: a top-level package named `kernels` would be taken for another project's.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
