"""What a run looks like to a person: curves of its metrics, and the page that explains it. Free of jax and flax."""
