"""The driver: optimize(), pipeline, profile, ledger, report, command line."""
