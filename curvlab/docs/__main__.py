"""`python -m curvlab.docs` rewrites the pages of all quantities."""

from .quantity import rewrite

print(f"{len(rewrite())} pages")
