"""torchweld: a compiler-style optimizer for transformer models."""
