"""Open Inference Protocol over gRPC, beside HTTP in the workers of the bridge.

inference.proto   messages and methods, Triton's included   health.proto    those of gRPC's own health check
schema.py         reads both when they are needed           messages.py     their classes, and documents as messages
server.py         the server: address, TLS, limits          calls.py        what all methods have in common
inference.py      the methods                               health.py       the health check
model_infer.py    ModelInfer and ModelStreamInfer           tensors.py      their inputs as arrays
framing.py        raw contents beside protobuf              statuses.py     errors as gRPC tells them
closing.py        connections that are to end
"""
