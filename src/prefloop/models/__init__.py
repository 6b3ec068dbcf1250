"""Language models: loading, attention over the forest, fused log-probs, sampling and scoring."""
