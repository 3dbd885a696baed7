"""A regular package, because the environment contains another package of this name (of torch-fidelity)."""
