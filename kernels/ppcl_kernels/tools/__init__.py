"""Tools for kernels: compiles without a GPU, checks on a GPU, and reports of benches. No diffusers, no pydantic."""
