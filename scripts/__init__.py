"""Scripts that maintain the repository: environment, wheel check, fuzzing, coverage and tour pages."""
