"""Recordings of the requests that come: a file, the thread that writes it, and who begins and ends them."""
