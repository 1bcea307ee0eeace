"""How fast `jax_ddpm` is, next to PyTorch: `python -m benchmarks`. See README.md here."""
