"""TensorNext's daemon: serves PyTorch models over ZeroMQ."""
