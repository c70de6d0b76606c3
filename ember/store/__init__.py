"""What is written and read safely: paths, whole files and sealed folders, provenance, pickles. It knows no model."""
