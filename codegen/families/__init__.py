"""Kernel families: one file lowers one kind of group."""
