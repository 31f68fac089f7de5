"""Places where batches run. An executor runs what it is given and makes no policy; torch lives here and in models."""
