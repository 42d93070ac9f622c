"""Generation loops over a StepModel."""
