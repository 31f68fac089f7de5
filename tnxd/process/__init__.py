"""The process: signals, log, systemd, memory, watchdog. This room knows nothing else of the daemon but events."""
