"""What looks at the kernels from outside: checks and benches on a GPU, and their reports. No diffusers, no pydantic."""
