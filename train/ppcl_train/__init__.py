"""Training: from a stock model, or from nothing, to a pluggable checkpoint."""
