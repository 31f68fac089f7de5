"""The serving loop, and a request's way through it: binding of inputs, admin commands, reports, counts. No torch."""
