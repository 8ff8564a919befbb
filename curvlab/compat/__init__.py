"""The calls of other packages, answered by curvlab: change the import line and keep the rest of the script."""
