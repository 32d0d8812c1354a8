"""How samples are measured: metrics, feature extractors, reference statistics with their floor, and the score table."""
