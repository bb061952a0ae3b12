"""What decides a training run: settings, and presets of them."""
