"""The ROUTER socket, who may connect, and how other threads wake the loop. Only this room knows ZeroMQ."""
