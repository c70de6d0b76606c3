"""Profiles to runs: plans, notebooks as jobs, their records and pages, and the command line."""
