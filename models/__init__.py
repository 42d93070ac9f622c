"""Plain model definitions and checkpoint readers: torch and graph/ops only."""
