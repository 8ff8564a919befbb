"""`python -m curvlab.docs` rewrites the pages that are made from registries: those of quantities, and that of figures."""

from . import figures
from .quantity import rewrite

print(f"{len(rewrite())} pages of quantities and {figures.rewrite().name}")
