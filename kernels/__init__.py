"""Triton kernels, one file per op; installed as divqat.kernels. Never imports triton by itself."""
