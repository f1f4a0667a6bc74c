"""`python -m jaxdiff.tools.export`: from prompt to pixels as one StableHLO program, for use elsewhere."""
