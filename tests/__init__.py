"""One test file per folder; helpers in helpers.py."""
