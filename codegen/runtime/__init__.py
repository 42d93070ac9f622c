"""What a built executable needs while it runs."""
