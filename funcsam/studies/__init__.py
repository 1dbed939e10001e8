"""Training comparisons on real data: what the `funcsam` command runs."""
