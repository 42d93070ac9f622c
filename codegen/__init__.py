"""Fused groups to kernels to an executable."""
