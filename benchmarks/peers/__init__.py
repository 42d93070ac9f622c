"""Ours and the peers on the same weights, in turns, each in a process of its own: `python -m benchmarks.peers`."""
