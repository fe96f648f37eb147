"""A run folder -> pictures and pages. Imports no torch: a report can be made where none is installed."""
