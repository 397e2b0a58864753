"""Preference data: reading, checking and labelling pairs."""
