"""Papers that measure rather than prune: one file, one table, one figure."""
