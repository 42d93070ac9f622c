"""What a captured program is, what its operations mean, and how it may change."""
