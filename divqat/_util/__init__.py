"""Utilities that all packages may import, and that import none of them."""
