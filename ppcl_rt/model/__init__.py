"""A diffusers transformer that runs at any ratio: what runs, what is resident, CUDA graphs."""
