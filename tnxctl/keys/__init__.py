"""CURVE keys as files, for both halves: https://rfc.zeromq.org/spec/26/ is the mechanism.

lines.py        keys in one line, to hand over      places.py       where the files are
pairs.py        pairs of keys, and their secrets    guards.py       who may read and write them
authorized.py   whom a daemon lets in               known_hosts.py  which key a host has, for clients
credentials.py  what a client needs to connect  lookup.py       where it comes from
editing.py      changes of the two TOML files

A daemon and each client have a pair. A client has to know the public key of its daemon before it connects, since
ZeroMQ has no way to ask for it; the daemon has to know the public key of each client. People carry both, each in one
line: `tnx-client alice KEY` to the daemon's host, `tnx-server gpu-box KEY` to the client's.
"""
