"""The PyTorch backend of WMTP: a thin mirror of `wmtp_jax` for Apple's MPS, CUDA and CPU; it never imports jax."""
