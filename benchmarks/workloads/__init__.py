"""Data and networks that the suites measure on."""
