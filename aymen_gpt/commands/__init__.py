"""argv -> build -> do -> report: one file per command; nothing else in the package parses argv."""
