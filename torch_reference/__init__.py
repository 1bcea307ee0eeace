"""The PyTorch tutorial, kept runnable: the oracle that `jax_ddpm` is compared with.

File names mirror `jax_ddpm/`. What the tutorial has, stands here with its oddities, named in
the docstrings; what it leaves out (the reverse chain, the other schedules) is written from the
papers, by another derivation than the library's wherever there is one.

Images are NCHW here, as PyTorch's are. Everything is float32 unless told otherwise.
"""
