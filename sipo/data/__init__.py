"""Preference pairs: reading, checking and labelling them, and what is computed of them once."""
