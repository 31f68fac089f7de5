"""Models as strangers bring them, and what a daemon makes of them.

A *case* declares one network, its inputs and what has to become of it; an *exhibit* is a case in one format. The
*keeper* serves exhibits with a real daemon and asks them with eight clients at once; every answer is held against the
network in plain torch, run on that request alone.
"""
