"""Open Inference Protocol, version 2, with the extensions of Triton that fit: tensors, documents, requests."""
