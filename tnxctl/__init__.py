"""TensorNext's light half: the client, the command tool and the wire protocol. No torch."""

__version__ = "0.1.0"
