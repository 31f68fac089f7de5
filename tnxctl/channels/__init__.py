"""Channels: one connection to a daemon, or one attempt at it, below a `tnxctl.link.Link`.

channel.py     what a link expects of one
opening.py     the one that suits an endpoint
stream.py      a plain socket that the thread of the caller reads and writes: without keys, on Linux
libzmq.py      a DEALER of libzmq: with keys, and elsewhere
zmtp.py        ZeroMQ's protocol, for stream.py
names.py       host names, for stream.py
"""
