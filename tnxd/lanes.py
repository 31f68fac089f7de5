"""Lane numbers beside the indices 0, 1, ... of a device's own lanes: scheduling hands them out, executors obey."""

INLINE = -1
"""The calling thread."""

BACKGROUND = -2
"""The lane for work that nobody waits for: a thread of the device that the operating system lets run last."""
