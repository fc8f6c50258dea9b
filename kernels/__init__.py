"""Triton kernels, one file per op; installed as `divqat.kernels`. Importing this never imports triton."""
