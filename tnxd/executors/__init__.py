"""Places where batches run."""
