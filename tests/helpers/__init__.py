"""What several test files use: tiny models, sound data, files to read, edits to compare."""
