"""Where batches come from: sources and caches, calibration inputs, and the streams of a teacher."""
