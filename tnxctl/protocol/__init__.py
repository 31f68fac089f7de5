"""The wire protocol: headers, tensor frames, errors. The only room of the client that the daemon enters."""
