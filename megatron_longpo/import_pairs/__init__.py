"""Preference sets in other formats to schema 1, exactly or not at all; see `convert.py`."""
