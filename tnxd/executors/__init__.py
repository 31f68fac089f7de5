"""Executors: the devices that run batches. An executor makes no policy. torch is imported here and in models alone."""
