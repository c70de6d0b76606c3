"""Profiles to runs: plans, notebooks as jobs, their records, and the command line."""
