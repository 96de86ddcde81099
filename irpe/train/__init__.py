"""Training and evaluating image classifiers on real data: what `irpe train DATA` and `irpe evaluate` do."""
