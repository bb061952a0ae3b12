"""Where batches come from: sources, caches, shards."""
