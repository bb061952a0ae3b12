"""Solutions without a step of training, one file each; plain tensors in, plain tensors out."""
