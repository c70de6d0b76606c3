"""Frames to tables and figures. No experiment is run, read or written here."""
